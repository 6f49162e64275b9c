"""Time that copy-paste adds to the training mapper, per image at 640 pixels.

    python benchmarks/bm_copy_paste.py [--images 200] [--size 640] [--repeat 5] [--json FILE]

Images of noise are written as JPEG of 640 x 480 pixels, with twelve objects each; three of twenty
classes are rare. The mapper takes turns with and without copy-paste, for boxes and for masks.
"first" reads the image of every object that is pasted; "kept" finds it in memory, as a run does
after its first minutes.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
from detectron2.data import transforms as T
from detectron2.structures import BoxMode
from measuring import about, in_turn, in_words
from PIL import Image
from tabulate import tabulate

from d2_balance.data.copy_paste import CopyPaste
from d2_balance.data.mapper import BalancedMapper

OBJECTS, CLASSES, RARE = 12, 20, 3
LIMIT = 1.15


def make_records(directory: Path, images: int) -> list[dict]:
    """Records of images with objects; the last `RARE` classes are in a fiftieth of the images."""
    rng = np.random.default_rng(0)
    records = []
    for n in range(images):
        coarse = rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)  # compresses as photographs do
        image = Image.fromarray(coarse).resize((640, 480), Image.Resampling.BICUBIC)
        path = directory / f"{n}.jpg"
        image.save(path, quality=90)
        annotations = []
        for k in range(OBJECTS):
            side = float(rng.choice([24, 48, 96, 160]))
            x, y = rng.uniform(0, [640 - side, 480 - side]).tolist()
            angle = np.linspace(0, 2 * np.pi, 24, endpoint=False)
            circle = np.stack(
                [x + side / 2 * (1 + np.cos(angle)), y + side / 2 * (1 + np.sin(angle))]
            )
            rare = k == 0 and n % 50 < RARE
            annotations.append(
                {
                    "bbox": [x, y, side, side],
                    "bbox_mode": BoxMode.XYWH_ABS,
                    "category_id": CLASSES - 1 - n % 50
                    if rare
                    else int(rng.integers(CLASSES - RARE)),
                    "segmentation": [circle.T.ravel().tolist()],
                }
            )
        record = {"file_name": str(path), "height": 480, "width": 640, "image_id": n}
        records.append(record | {"annotations": annotations})
    return records


def mapper_of(records: list[dict], masks: bool, size: int, cache: int | None) -> BalancedMapper:
    """Return the training mapper; with copy-paste unless `cache` is None."""
    mapper = BalancedMapper(
        True,
        augmentations=[T.ResizeShortestEdge([size], 1333, "choice"), T.RandomFlip()],
        image_format="BGR",
        use_instance_mask=masks,
        instance_mask_format="bitmask",
    )
    if cache is not None:
        mapper.copy_paste = CopyPaste(records, threshold=0.1, use_masks=masks, cache_bytes=cache)
    return mapper


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--size", type=int, default=640, help="shortest side, in pixels")
    parser.add_argument("--repeat", type=int, default=5, help="passes over the images of each kind")
    parser.add_argument("--json", help="file for the figures")
    args = parser.parse_args()
    rows, figures = [], {}
    with tempfile.TemporaryDirectory() as directory:
        records = make_records(Path(directory), args.images)
        for masks in (False, True):
            plain = mapper_of(records, masks, args.size, None)
            for name, cache in (("kept", 64 << 20), ("first", 0)):
                pasting = mapper_of(records, masks, args.size, cache)

                def run(mapper: BalancedMapper) -> None:
                    np.random.seed(0)
                    for record in records:
                        mapper(record)

                ours, theirs = in_turn(
                    lambda m=pasting: run(m), lambda m=plain: run(m), args.repeat
                )
                kind = "masks" if masks else "boxes"
                figures[f"{kind}_{name}"] = {"seconds": ours, "plain": theirs}
                per_image = [f"{1e3 * t / len(records):.2f}" for t in (theirs, ours)]
                rows.append([kind, name, *per_image, f"{ours / theirs:.3f}"])
    machine = about()
    print(in_words(machine))
    print(f"Limit: {LIMIT} times the mapper without, with objects kept in memory.\n")
    headers = ["model of", "objects", "mapper (ms per image)", "with copy-paste (ms)", "ratio"]
    print(tabulate(rows, headers, tablefmt="github"))
    if args.json:
        content = {"machine": machine, "figures": figures}
        Path(args.json).write_text(json.dumps(content, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
