"""Composes the images of the built-in long-tail set and outlines what is visible in them."""

from dataclasses import dataclass

import numpy as np
from contourpy import FillType, contour_generator
from PIL import Image

from .shapes import CLASSES, Patch, draw_background, draw_object

MIN_DIAMETER, MAX_DIAMETER = 16.0, 80.0  # pixels
MIN_VISIBLE = 0.5  # fraction of an object that must stay visible
MIN_KEY_VISIBLE = 0.7  # the same for the part that tells its class
MIN_PART_AREA = 4.0  # pixels; smaller visible fragments are not outlined
POSITIONS_PER_SIZE = 12
MAX_OBJECTS_PER_IMAGE = 9
NUM_NEGATIVE = (4, 8)  # verified-absent classes of an image
NOT_EXHAUSTIVE_SHARE = 0.05  # of the images with several objects of one class
SIZES = [(160, 160)] * 6 + [(128, 160)] * 2 + [(160, 128)] * 2  # height, width


@dataclass
class SceneObject:
    """One object, with its masks cut to the window `rows`, `columns` of the image."""

    class_index: int
    rows: slice
    columns: slice
    mask: np.ndarray  # bool, silhouette
    key: np.ndarray  # bool, the part that tells the class
    full_area: int  # pixels, with the part outside of the image
    full_key: int


class Scene:
    """A background on which objects are placed one above the other.

    Args:
        height, width: of the image in pixels.
        rng: source of everything random.
    """

    def __init__(self, height: int, width: int, rng: np.random.Generator) -> None:
        self.height, self.width, self.rng = height, width, rng
        self.image = draw_background(height, width, rng)
        self.objects: list[SceneObject] = []
        self.owner = np.full((height, width), -1, dtype=np.int64)  # index of the object on top

    def add(self, class_index: int, required: bool) -> bool:
        """Places one object where it hides no other and is not hidden too much by the border.

        A required object gets smaller until it fits; any other is given up after one size.

        Raises:
            RuntimeError: if a required object does not fit at the smallest size.
        """
        log_size = self.rng.uniform(np.log(MIN_DIAMETER), np.log(MAX_DIAMETER))
        diameter = float(np.exp(log_size))
        while True:
            patch = draw_object(CLASSES[class_index], diameter, self.rng)
            for _ in range(POSITIONS_PER_SIZE):
                if self._place(class_index, patch):
                    return True
            if not required:
                return False
            if diameter <= MIN_DIAMETER:
                raise RuntimeError(
                    f"no room for a {CLASSES[class_index].name} among {len(self.objects)} objects "
                    f"in an image of {self.width}x{self.height} pixels"
                )
            diameter = max(MIN_DIAMETER, 0.8 * diameter)

    def _place(self, class_index: int, patch: Patch) -> bool:
        size = patch.mask.shape[0]
        top, left = self._corner(size)
        rows = slice(max(top, 0), min(top + size, self.height))
        columns = slice(max(left, 0), min(left + size, self.width))
        cut = np.s_[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
        new = SceneObject(
            class_index,
            rows,
            columns,
            patch.mask[cut],
            patch.key[cut],
            int(patch.mask.sum()),
            int(patch.key.sum()),
        )
        owner = self.owner.copy()
        owner[rows, columns][new.mask] = len(self.objects)
        touched = np.unique(self.owner[rows, columns][new.mask])
        seen = [(len(self.objects), new)] + [(int(i), self.objects[i]) for i in touched if i >= 0]
        if not all(_recognisable(owner, index, obj) for index, obj in seen):
            return False
        self.owner = owner
        self.objects.append(new)
        self.image.paste(patch.image, (left, top), patch.alpha)
        return True

    def _corner(self, size: int) -> tuple[int, int]:
        """Top and left of a patch: often beside an earlier object, so that objects overlap."""
        if self.objects and self.rng.random() < 0.35:
            near = self.objects[int(self.rng.integers(len(self.objects)))]
            y, x = (
                (near.rows.start + near.rows.stop) / 2,
                (near.columns.start + near.columns.stop) / 2,
            )
            reach = 0.35 * (size + near.rows.stop - near.rows.start)
            y, x = y + self.rng.uniform(-reach, reach), x + self.rng.uniform(-reach, reach)
        else:
            y, x = self.rng.uniform(0, self.height), self.rng.uniform(0, self.width)
        half = size / 2
        # Objects may stick out of the image by a quarter of their size.
        y = min(max(y, half / 2), self.height - half / 2)
        x = min(max(x, half / 2), self.width - half / 2)
        return round(y - half), round(x - half)


def _recognisable(owner: np.ndarray, index: int, obj: SceneObject) -> bool:
    on_top = owner[obj.rows, obj.columns] == index
    return (
        on_top.sum() >= MIN_VISIBLE * obj.full_area
        and (on_top & obj.key).sum() >= MIN_KEY_VISIBLE * obj.full_key
    )


def render_image(
    image_id: int, class_indices: list[int], may_omit: set[int], rng: np.random.Generator
) -> tuple[Image.Image, dict, list[dict]]:
    """Renders one image with one to three objects of each class asked for.

    Args:
        image_id: id of the image.
        class_indices: the classes in it, as indices of `CLASSES`.
        may_omit: classes of which an object may stay without annotation.
        rng: source of everything random.

    Returns:
        The image; its LVIS record without file name; its annotations, still without ids.
    """
    height, width = SIZES[int(rng.integers(len(SIZES)))]
    scene = Scene(height, width, rng)
    extra = [j for j in class_indices for _ in range(int(rng.choice(3, p=[0.65, 0.25, 0.1])))]
    for j in rng.permutation(class_indices):
        scene.add(int(j), required=True)
    for j in rng.permutation(extra)[: MAX_OBJECTS_PER_IMAGE - len(class_indices)]:
        scene.add(int(j), required=False)

    annotations = [_annotation(scene, index, image_id) for index in range(len(scene.objects))]
    omitted = _choose_omitted([obj.class_index for obj in scene.objects], may_omit, rng)
    not_exhaustive = [] if omitted is None else [annotations.pop(omitted)["category_id"]]

    absent = [j for j in range(len(CLASSES)) if j not in class_indices]
    num_negative = rng.integers(NUM_NEGATIVE[0], NUM_NEGATIVE[1] + 1)
    record = {
        "id": image_id,
        "width": width,
        "height": height,
        "neg_category_ids": sorted(int(j) + 1 for j in rng.permutation(absent)[:num_negative]),
        "not_exhaustive_category_ids": not_exhaustive,
    }
    return scene.image, record, annotations


def _choose_omitted(
    class_indices: list[int], may_omit: set[int], rng: np.random.Generator
) -> int | None:
    """Index of an object to leave without annotation: now and then one of several of its class."""
    several = [
        i for i, j in enumerate(class_indices) if j in may_omit and class_indices.count(j) > 1
    ]
    if not several or rng.random() >= NOT_EXHAUSTIVE_SHARE:
        return None
    return several[int(rng.integers(len(several)))]


def _annotation(scene: Scene, index: int, image_id: int) -> dict:
    """Outlines what is visible of one object, as a LVIS annotation without id."""
    obj = scene.objects[index]
    visible = scene.owner[obj.rows, obj.columns] == index
    corner = (obj.columns.start, obj.rows.start)
    polygons = [p + corner for p in mask_to_polygons(visible) if polygon_area(p) >= MIN_PART_AREA]
    (x0, y0), (x1, y1) = (f(np.concatenate(polygons), axis=0).tolist() for f in (np.min, np.max))
    return {
        "image_id": image_id,
        "category_id": obj.class_index + 1,
        "bbox": [x0, y0, x1 - x0, y1 - y0],
        "area": sum(polygon_area(p) for p in polygons),
        "segmentation": [p.ravel().tolist() for p in polygons],
    }


def mask_to_polygons(mask: np.ndarray) -> list[np.ndarray]:
    """Outlines a mask in the coordinates of LVIS, where pixel (0, 0) covers [0, 1] x [0, 1].

    LVIS polygons cannot have holes: a part with a hole is cut in two through it.

    Args:
        mask: (H, W) bool.

    Returns:
        Polygons (V, 2) of x, y inside [0, W] x [0, H], without points on straight lines.
    """
    padded = np.pad(mask, 1).astype(np.float64)
    contours = contour_generator(z=padded, fill_type=FillType.OuterOffset)
    polygons = []
    for points, offsets in zip(*contours.filled(0.5, 2.0), strict=True):
        if len(offsets) > 2:  # an outer contour and at least one hole
            hole = points[offsets[1] : offsets[2], 0] - 0.5
            column = int((hole.min() + hole.max()) / 2)
            left, right = mask.copy(), mask.copy()
            left[:, column:] = False
            right[:, :column] = False
            return mask_to_polygons(left) + mask_to_polygons(right)
        polygons.append(_drop_straight(points[:-1] - 0.5))  # the last point repeats the first
    return polygons


def polygon_area(polygon: np.ndarray) -> float:
    """Area of a polygon (V, 2) that does not cross itself, in square pixels."""
    x, y = polygon.T
    return float(abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2)


def _drop_straight(points: np.ndarray) -> np.ndarray:
    before, after = points - np.roll(points, 1, axis=0), np.roll(points, -1, axis=0) - points
    return points[before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0]]
