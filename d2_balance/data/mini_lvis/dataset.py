"""The built-in long-tail set `mini_lvis_train` / `mini_lvis_val`: a first run needs no download.

600 training and 200 validation images of about 160 pixels are rendered on first use and written
in the format of LVIS v1: masks, frequency groups, verified-absent classes and classes that are not
annotated exhaustively. The 30 classes fall off from 400 to 5 training images; see
`mini_lvis_shapes` for what they look like. The validation set has at least 16 images of each
class, so that the AP of rare classes can be measured.
"""

import json
import os
import shutil

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from iopath.common.file_io import file_lock

from d2_balance.utils.progress import progress

from ..groups import groups_from_counts
from ..records import Records, load_json
from .scene import render_image
from .shapes import CLASSES

VERSION = "v1"  # raise it with every change of the images or of the annotations
NUM_IMAGES = {"train": 600, "val": 200}
NAMES = {"mini_lvis_train": "train", "mini_lvis_val": "val"}
SEED = 2003_05176

MAX_CLASSES_PER_IMAGE = 6
MIN_VAL_IMAGES = 16  # images of a class in the validation set, at its full size


def train_image_counts(num_train: int = NUM_IMAGES["train"]) -> list[int]:
    """Number of training images of each class, in the order of the category ids.

    A Zipf-Mandelbrot law c = 400 ((1 + q) / (k + q))^s with rank k = 1..30, q = 7.5, and s such
    that the last class has 5: 6 frequent, 15 common and 9 rare classes by the cut points of LVIS.

    Args:
        num_train: size of the training set; the counts scale with it, down to 1.
    """
    q = 7.5
    s = np.log(400 / 5) / np.log((len(CLASSES) + q) / (1 + q))
    full = [400 * ((1 + q) / (cls.rank + 1 + q)) ** s for cls in CLASSES]
    return [max(1, round(c * num_train / NUM_IMAGES["train"])) for c in full]


def val_image_counts(num_val: int = NUM_IMAGES["val"]) -> list[int]:
    """Number of validation images of each class: a quarter of its training images, or 16."""
    scale = num_val / NUM_IMAGES["val"]
    return [max(1, round(max(MIN_VAL_IMAGES, c / 4) * scale)) for c in train_image_counts()]


def frequency_group(image_count: int) -> str:
    """LVIS frequency group: "r" for 1-10 training images, "c" for 11-100, "f" above."""
    return groups_from_counts([image_count])[0]


def register_mini_lvis(root: str | None = None) -> None:
    """Registers `mini_lvis_train` and `mini_lvis_val` with Detectron2. Nothing is rendered yet.

    The images are rendered when the catalog is first asked for one of the two. A second call
    with the same directory changes nothing, one with another directory registers anew.

    Args:
        root: directory of the set; `$DETECTRON2_DATASETS/mini_lvis` by default.
    """
    if root is None:
        root = os.path.join(os.environ.get("DETECTRON2_DATASETS", "datasets"), "mini_lvis")
    directory = os.path.join(root, VERSION)
    for name, split in NAMES.items():
        json_file = _json_file(directory, split)
        if name in DatasetCatalog:
            if MetadataCatalog.get(name).get("json_file") == json_file:
                continue
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
        DatasetCatalog.register(name, lambda name=name: load_mini_lvis(root, name))
        ids = range(1, len(CLASSES) + 1)
        counts = train_image_counts()
        MetadataCatalog.get(name).set(
            json_file=json_file,
            image_root=directory,
            evaluator_type="lvis",
            thing_classes=[cls.name for cls in CLASSES],
            thing_dataset_id_to_contiguous_id={i: i - 1 for i in ids},
            class_image_count=[{"id": i, "image_count": counts[i - 1]} for i in ids],
        )


def load_mini_lvis(root: str, name: str) -> Records:
    """Loads one of the two sets as Detectron2's standard dicts, and renders them if needed.

    Args:
        root: directory of the set.
        name: "mini_lvis_train" or "mini_lvis_val".

    Returns:
        One dict per image. `neg_category_ids` and `not_exhaustive_category_ids` hold the ids of
        the file, which start at 1; `category_id` of an annotation starts at 0.
    """
    json_file = build_mini_lvis(root)[name]
    return load_json(json_file, os.path.dirname(json_file))


def build_mini_lvis(root: str, force: bool = False) -> dict[str, str]:
    """Renders both sets into `root/VERSION`, unless they are there already.

    They are rendered beside it and moved when complete. Where several processes ask at once, one
    renders and the others wait for it.

    Args:
        root: directory of the set.
        force: render again what is there.

    Returns:
        The JSON file of each set by its name.

    Raises:
        FileNotFoundError: if the directory is there but a JSON file in it is missing.
        OSError: if the directory cannot be written.
    """
    return _build(root, NUM_IMAGES, force)


def _build(root: str, num_images: dict[str, int], force: bool = False) -> dict[str, str]:
    directory = os.path.join(root, VERSION)
    paths = {name: _json_file(directory, split) for name, split in NAMES.items()}
    if force or not os.path.isdir(directory):
        try:
            os.makedirs(root, exist_ok=True)
            with file_lock(directory):
                # Another process may have finished while this one waited for the lock.
                if force or not os.path.isdir(directory):
                    _render_and_move(directory, num_images)
        except OSError as e:
            raise OSError(
                f"mini_lvis cannot be rendered into {root}: {e}. Set the environment variable "
                "DETECTRON2_DATASETS to a directory that can be written"
            ) from e
    for path in paths.values():
        if not os.path.isfile(path):
            raise FileNotFoundError(
                f"{path} is missing; delete {directory} to have it rendered anew"
            )
    return paths


def _json_file(directory: str, split: str) -> str:
    return os.path.join(directory, f"mini_lvis_{split}.json")


def _render_and_move(directory: str, num_images: dict[str, int]) -> None:
    part, old = directory + ".part", directory + ".old"
    for leftover in (part, old):  # of a killed run; the lock says that nobody is at work on it
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        _render(part, num_images)
        if os.path.isdir(directory):
            os.replace(directory, old)
        os.replace(part, directory)
    finally:
        for leftover in (part, old):
            shutil.rmtree(leftover, ignore_errors=True)


def _render(directory: str, num_images: dict[str, int]) -> None:
    """Writes images and JSON files of both splits into a new directory."""
    counts = {
        "train": train_image_counts(num_images["train"]),
        "val": val_image_counts(num_images["val"]),
    }
    train = _render_split(directory, "train", counts["train"], num_images["train"])
    val = _render_split(directory, "val", counts["val"], num_images["val"])
    # As in LVIS, counts and frequency groups of both files are those of the training set.
    categories = _categories(train["annotations"])
    for split, data in (("train", train), ("val", val)):
        with open(_json_file(directory, split), "w") as f:
            json.dump(data | {"categories": categories}, f, separators=(",", ":"))


def _render_split(directory: str, split: str, counts: list[int], num_images: int) -> dict:
    """Writes the images of one split; returns its LVIS data, still without categories."""
    os.makedirs(os.path.join(directory, split))
    seed = [SEED, list(NAMES.values()).index(split)]
    first_id = 1 if split == "train" else NUM_IMAGES["train"] + 1
    may_omit = {j for j, n in enumerate(train_image_counts()) if frequency_group(n) != "r"}
    images, annotations = [], []
    plan = _plan(counts, num_images, np.random.default_rng(seed))
    for index, class_indices in enumerate(progress(plan, f"rendering mini_lvis_{split}")):
        rng = np.random.default_rng([*seed, index])
        image_id = first_id + index
        image, record, objects = render_image(image_id, class_indices, may_omit, rng)
        file_name = f"{split}/{image_id:06d}.jpg"
        image.save(os.path.join(directory, file_name), quality=95, subsampling=0)
        images.append(record | {"file_name": file_name, "coco_url": f"mini_lvis/{file_name}"})
        annotations.extend(objects)
    annotations = [{"id": i, **annotation} for i, annotation in enumerate(annotations, start=1)]
    info = {"description": "mini_lvis, rendered by d2_balance", "version": VERSION}
    return {"info": info, "images": images, "annotations": annotations}


def _plan(counts: list[int], num_images: int, rng: np.random.Generator) -> list[list[int]]:
    """Draws the class indices of each image, so that class j is in exactly counts[j] of them."""
    plan: list[list[int]] = [[] for _ in range(num_images)]
    for j in sorted(range(len(counts)), key=lambda j: counts[j]):
        room = [i for i, classes in enumerate(plan) if len(classes) < MAX_CLASSES_PER_IMAGE]
        chosen = rng.permutation(room).tolist()
        if counts[j] == max(counts):  # no image stays empty
            chosen = sorted(chosen, key=lambda i: len(plan[i]) > 0)
        for i in chosen[: counts[j]]:
            plan[i].append(j)
    return plan


def _categories(train_annotations: list[dict]) -> list[dict]:
    """The LVIS categories, with counts and frequency groups from the training set."""
    categories = []
    for class_id, cls in enumerate(CLASSES, start=1):
        found = [a["image_id"] for a in train_annotations if a["category_id"] == class_id]
        categories.append(
            {
                "id": class_id,
                "name": cls.name,
                "synset": f"{cls.name}.n.01",
                "synonyms": [cls.name],
                "def": cls.definition,
                "image_count": len(set(found)),
                "instance_count": len(found),
                "frequency": frequency_group(len(set(found))),
            }
        )
    return categories
