#!/usr/bin/env bash
# datumaro 1.13.12: a mask with a hole comes back from COCO to COCO without its hole.
#
# Expected: an object with an RLE and iscrowd 0 comes back as an RLE (with iscrowd 1, as datumaro writes its own
# masks), and every pixel of it stays.
# Seen: the import makes polygons of RLEs with iscrowd 0, of the outer borders only, along the pixels' centres:
# a ring is a disk afterwards, a pixel smaller at the right and lower edge, and `area` is that of
# the disk. No warning. A dataset that was only split or filtered with datumaro has other masks.
set -eu
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet datumaro==1.13.12
cd "$directory"
cat > script.py <<'PYTHON'
import json
import os
import sys
from importlib.metadata import version

import datumaro
from PIL import Image


WIDTH, HEIGHT = 40, 30


def runs(mask):
    counts, value, length = [], 0, 0
    for pixel in (mask(x, y) for x in range(WIDTH) for y in range(HEIGHT)):
        if pixel != value:
            counts.append(length)
            value, length = pixel, 0
        length += 1
    return [*counts, length]


def ring(x, y):
    return int(5 <= x < 25 and 5 <= y < 25 and not (10 <= x < 20 and 10 <= y < 20))


os.makedirs("in/annotations")
os.makedirs("in/images/val")
Image.new("RGB", (WIDTH, HEIGHT)).save("in/images/val/a.png")
annotation = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [5, 5, 20, 20], "area": 300}
annotation |= {"iscrowd": 0, "segmentation": {"size": [HEIGHT, WIDTH], "counts": runs(ring)}}
with open("in/annotations/instances_val.json", "w") as file:
    json.dump(
        {
            "images": [{"id": 1, "file_name": "a.png", "width": WIDTH, "height": HEIGHT}],
            "annotations": [annotation],
            "categories": [{"id": 1, "name": "ring"}],
        },
        file,
    )
datumaro.Dataset.import_from("in", "coco_instances").export("out", "coco_instances")
with open("out/annotations/instances_val.json") as file:
    [found] = json.load(file)["annotations"]
print(f"datumaro {version('datumaro')}: area 300 became {found['area']}, iscrowd {found['iscrowd']}")
print("segmentation", found["segmentation"])
same = found["area"] == 361 and len(found["segmentation"]) == 1 and found["iscrowd"] == 0
sys.exit(0 if same else 1)
PYTHON
"$directory/venv/bin/python" script.py
