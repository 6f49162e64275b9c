#!/usr/bin/env bash
# hotcoco 1.3.0: the LVIS style knows neither `ignore` nor objects and detections of area 0.
#
# Expected: COCOeval(lvis_style=True) is lvis 0.5.3 in all rules, as it is in AP of plain files.
# Seen: with one object found and one missed that has "ignore": 1, AP is 50.5 (lvis: 100); the same for a
# missed object of area 0 (lvis: 100, it is dropped). A detection of area 0 with the highest score
# halves AP (lvis: 100). A missed crowd is left out (lvis: 50.5, iscrowd means nothing to it). The values
# of lvis 0.5.3 are from a run of the same files with it.
set -eu
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet hotcoco==1.3.0
cd "$directory"
cat > script.py <<'PYTHON'
import contextlib
import io
import json
import sys

import hotcoco

LVIS = {"plain": 100.0, "ignore": 100.0, "area 0": 100.0, "detection of area 0": 100.0, "crowd": 50.5}


def annotation(number, x, **fields):
    box = {"bbox": [x, x, 20, 20], "area": 400, "image_id": 1, "category_id": 1}
    return {"id": number, "segmentation": [[x, x, x + 20, x, x + 20, x + 20]], **box, **fields}


def ap(annotations, detections):
    image = {"id": 1, "width": 100, "height": 100}
    labels = {"neg_category_ids": [], "not_exhaustive_category_ids": []}
    content = {
        "images": [image | labels],
        "categories": [{"id": 1, "name": "a", "frequency": "f"}],
        "annotations": annotations,
    }
    with open("truth.json", "w") as file:
        json.dump(content, file)
    truth = hotcoco.COCO("truth.json")
    evaluation = hotcoco.COCOeval(truth, truth.load_res(detections), "bbox", lvis_style=True)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.run()
    return round(100 * evaluation.get_results()["AP"], 1)


found = annotation(1, 10)
right = {"image_id": 1, "category_id": 1, "bbox": [10, 10, 20, 20], "score": 0.9}
empty = {"image_id": 1, "category_id": 1, "bbox": [60, 60, 0, 0], "score": 0.95}
seen = {
    "plain": ap([found], [right]),
    "ignore": ap([found, annotation(2, 50, ignore=1)], [right]),
    "area 0": ap([found, annotation(2, 50, area=0)], [right]),
    "detection of area 0": ap([found], [empty, right]),
    "crowd": ap([found, annotation(2, 50, iscrowd=1)], [right]),
}
print(f"hotcoco {hotcoco.__version__}")
for name, value in seen.items():
    print(f"{name:<20} AP {value}, lvis 0.5.3 {LVIS[name]}")
expected = [100.0, 50.5, 50.5, 50.0, 100.0]
sys.exit(0 if list(seen.values()) == expected else 1)
PYTHON
"$directory/venv/bin/python" script.py
