"""What the built-in long-tail set is drawn with: classes, objects and backgrounds.

A class is a shape in the colour of that shape, plain or with one detail. The plain classes are
the frequent ones. The others differ from a frequent class in a detail only, and each detail is
common on one shape and rare on another, so that what a rare class looks like can be learned while
its score is pushed down by the objects of its frequent look-alike: the case that the equalization
loss (arXiv 2003.05176) is about.

Coordinates are rounded to integers before they are drawn and textures use plain arithmetic only,
so that the pixels do not depend on the last bit of a sine.
"""

import colorsys
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageChops, ImageDraw

SUPERSAMPLE = 4
HUES = {
    "disc": 0,
    "square": 210,
    "triangle": 50,
    "star": 120,
    "cross": 300,
    "heart": 175,
}  # degrees
SHAPES = tuple(HUES)
DETAILS = {
    "dotted": "with a dark dot in the middle",
    "barred": "with a dark bar across the middle",
    "bordered": "with a dark border",
    "halved": "whose lower half is pale",
}


@dataclass(frozen=True)
class MiniClass:
    """One class of the set. `detail` is empty for the plain, frequent look-alike."""

    name: str
    shape: str
    detail: str
    rank: int  # 0 = the most frequent class

    @property
    def definition(self) -> str:
        """The class in words, for the `def` field of a LVIS category."""
        return f"a {self.shape} {DETAILS.get(self.detail, 'of one colour')}"


def _make_classes() -> tuple[MiniClass, ...]:
    ranks = {(shape, ""): rank for rank, shape in enumerate(SHAPES)}
    for block in range(len(DETAILS)):
        for j, shape in enumerate(SHAPES):
            # The shift by one per shape makes each detail common on one shape and rare on another.
            detail = list(DETAILS)[(block + j) % len(DETAILS)]
            ranks[shape, detail] = len(ranks)
    return tuple(
        MiniClass(f"{shape}_{detail}" if detail else shape, shape, detail, ranks[shape, detail])
        for shape in SHAPES
        for detail in ("", *DETAILS)
    )


CLASSES = _make_classes()


def _outline(shape: str) -> list[tuple[float, float]]:
    """Corners of a shape that fills the circle of radius 1 around the origin; y points down."""

    def polar(degrees: float, radius: float = 1.0) -> tuple[float, float]:
        angle = math.radians(degrees)
        return radius * math.sin(angle), -radius * math.cos(angle)

    if shape == "disc":
        return [polar(7.5 * i, 0.92) for i in range(48)]
    if shape == "square":
        return [polar(45 + 90 * i, 1.1) for i in range(4)]
    if shape == "triangle":
        return [(x, y + 0.12) for x, y in (polar(120 * i, 1.12) for i in range(3))]
    if shape == "star":
        return [polar(36 * i, 0.55 if i % 2 else 1.08) for i in range(10)]
    if shape == "cross":
        a, b = 0.36, 0.98
        quarter = [(a, -b), (a, -a), (b, -a)]
        turns = [(1, 0, 0, 1), (0, -1, 1, 0), (-1, 0, 0, -1), (0, 1, -1, 0)]
        return [(x * p + y * q, x * r + y * s) for p, q, r, s in turns for x, y in quarter]
    if shape == "heart":
        points = []
        for i in range(48):  # the usual heart curve, 16 sin^3 t and 13 cos t - 5 cos 2t - ...
            t = math.radians(7.5 * i)
            y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
            points.append((math.sin(t) ** 3, -(y + 2.5) / 16))
        return points
    raise ValueError(f"unknown shape {shape!r}; must be one of {', '.join(SHAPES)}")


@dataclass(frozen=True)
class Patch:
    """A drawn object on its own square of S x S pixels."""

    image: Image.Image  # RGB
    alpha: Image.Image  # L, the silhouette
    mask: np.ndarray  # (S, S) bool, the silhouette
    key: np.ndarray  # (S, S) bool, the part by which the class is told from its look-alikes


def draw_object(cls: MiniClass, diameter: float, rng: np.random.Generator) -> Patch:
    """Draws one object with jittered colour and rotation.

    Args:
        cls: its class.
        diameter: of the circle around the shape, in pixels.
        rng: source of the jitter.
    """
    size = math.ceil(diameter * 1.12) + 2
    wide = size * SUPERSAMPLE
    radius = diameter * SUPERSAMPLE / 2
    turn = math.radians(rng.uniform(-15, 15))
    cos, sin = math.cos(turn), math.sin(turn)

    def place(points: list[tuple[float, float]]) -> list[tuple[int, int]]:
        return [
            (
                round(wide / 2 + radius * (x * cos - y * sin)),
                round(wide / 2 + radius * (x * sin + y * cos)),
            )
            for x, y in points
        ]

    silhouette = Image.new("L", (wide, wide))
    corners = place(_outline(cls.shape))
    ImageDraw.Draw(silhouette).polygon(corners, fill=255)
    detail = ImageChops.darker(_draw_detail(cls.detail, corners, place, wide, radius), silhouette)
    alpha, detail_alpha = silhouette.reduce(SUPERSAMPLE), detail.reduce(SUPERSAMPLE)

    body, mark = _colours(cls, rng)
    image = Image.new("RGB", (size, size), body)
    if cls.detail:
        image.paste(mark, mask=detail_alpha)
    return Patch(image, alpha, np.asarray(alpha) >= 128, np.asarray(detail_alpha) >= 128)


def _draw_detail(name: str, corners: list, place, wide: int, radius: float) -> Image.Image:
    """Return a mask of the detail, still unclipped.

    A plain object gets the mask of a dot: hiding its middle would make it look like any of its
    family.
    """
    mask = Image.new("L", (wide, wide))
    pen = ImageDraw.Draw(mask)
    if name in ("dotted", ""):
        circle = [(math.cos(math.radians(a)), math.sin(math.radians(a))) for a in range(0, 360, 15)]
        pen.polygon(place([(0.32 * x, 0.32 * y) for x, y in circle]), fill=255)
    elif name == "barred":
        pen.polygon(place([(-1.2, -0.15), (1.2, -0.15), (1.2, 0.15), (-1.2, 0.15)]), fill=255)
    elif name == "bordered":
        # Half of the line lies outside of the silhouette and is clipped.
        pen.line([*corners, *corners[:2]], fill=255, width=round(0.38 * radius), joint="curve")
    elif name == "halved":
        pen.polygon(place([(-1.2, 0.1), (1.2, 0.1), (1.2, 1.2), (-1.2, 1.2)]), fill=255)
    return mask


def _colours(cls: MiniClass, rng: np.random.Generator) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """RGB of the body and of the detail."""
    hue = (HUES[cls.shape] + rng.uniform(-10, 10)) % 360 / 360
    body = colorsys.hsv_to_rgb(hue, rng.uniform(0.65, 0.95), rng.uniform(0.7, 1.0))
    if cls.detail == "halved":
        mark = colorsys.hsv_to_rgb(hue, rng.uniform(0.05, 0.2), rng.uniform(0.85, 1.0))
    else:
        mark = (rng.uniform(0.05, 0.18),) * 3
    return tuple(round(255 * v) for v in body), tuple(round(255 * v) for v in mark)


def draw_background(height: int, width: int, rng: np.random.Generator) -> Image.Image:
    """A dull textured background: a gradient, low-frequency noise, and often stripes or checks."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    base = np.array(colorsys.hsv_to_rgb(rng.random(), rng.uniform(0, 0.3), rng.uniform(0.3, 0.75)))
    image = np.empty((height, width, 3), dtype=np.float32)
    image[:] = 255 * base

    grad = rng.uniform(-30, 30, size=2).tolist()
    image += (grad[0] * (x / width - 0.5) + grad[1] * (y / height - 0.5))[..., None]

    cells = int(rng.integers(4, 10))
    coarse = Image.fromarray(rng.integers(0, 256, size=(cells, cells, 3), dtype=np.uint8))
    noise = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)
    image += (noise - 127.5) * rng.uniform(0.1, 0.3)

    kind, period = rng.integers(0, 4), rng.uniform(8, 32)
    steer = rng.uniform(-1, 1, size=2).tolist()
    wave = np.abs((steer[0] * x + steer[1] * y) / period % 2 - 1) - 0.5  # triangle wave, +-0.5
    if kind == 1:
        image += (rng.uniform(15, 35) * wave)[..., None]
    elif kind == 2:
        image += (rng.uniform(10, 25) * np.sign(wave))[..., None]
    elif kind == 3:
        checks = (x // period + y // period) % 2 - 0.5
        image += (rng.uniform(10, 25) * checks)[..., None]
    return Image.fromarray(np.clip(image, 0, 255).astype(np.uint8))
