#!/usr/bin/env bash
# datumaro 1.13.12: objects of the category with id 0 lose their class.
#
# Guess: a COCO file whose category ids begin with 0 is imported with the class of every object, as pycocotools
# and Detectron2 read it. Label Studio's converter and YOLO exports number them so.
# Seen: the class of id 0 is among the labels, its objects have label None, and one line in the log says so.
# Written back, the classes have the ids 1 and 2 and the objects 0 and 2: the first class has no object,
# and its objects name a category that the file does not have. Add 1 to every category id before.
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


os.makedirs("in/annotations")
os.makedirs("in/images/val")
Image.new("RGB", (40, 30)).save("in/images/val/a.png")
annotations = [
    {"id": n + 1, "image_id": 1, "category_id": n, "bbox": [5 * n, 5, 9, 9], "area": 81, "iscrowd": 0}
    for n in range(2)
]
with open("in/annotations/instances_val.json", "w") as file:
    json.dump(
        {
            "images": [{"id": 1, "file_name": "a.png", "width": 40, "height": 30}],
            "annotations": annotations,
            "categories": [{"id": 0, "name": "cat"}, {"id": 1, "name": "dog"}],
        },
        file,
    )
dataset = datumaro.Dataset.import_from("in", "coco_instances")
names = [label.name for label in dataset.categories()[datumaro.AnnotationType.label]]
[item] = dataset
labels = {a.id: None if a.label is None else names[a.label] for a in item.annotations}
print(f"datumaro {version('datumaro')}: classes {names}, labels of cat 1 and dog 2 {labels}")
dataset.export("out", "coco_instances")
with open("out/annotations/instances_val.json") as file:
    data = json.load(file)
ids = [c["id"] for c in data["categories"]], sorted(a["category_id"] for a in data["annotations"])
print(f"written back: ids of the classes {ids[0]}, of the objects {ids[1]}")
sys.exit(0 if labels == {1: None, 2: "dog"} and ids == ([1, 2], [0, 2]) else 1)
PYTHON
"$directory/venv/bin/python" script.py
