#!/usr/bin/env bash
# globox 2.9.0 and pycocotools 2.0.11: perfect detections of an exported file do not get AP 100.
#
# Expected: 100 for detections equal to the objects; the issues of pycocotools know that the id 0 is trouble.
# Seen: globox numbers annotations from 0. pycocotools keeps the id of the object that a detection has been
# matched to, and takes 0 for "none": the first object of the file counts as found, its detection as
# wrong. With three objects AP is 44. Add 1 to every annotation id.
set -eu
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet globox==2.9.0 pycocotools==2.0.11
cd "$directory"
cat > script.py <<'PYTHON'
import contextlib
import io
import json
import sys
from importlib.metadata import version
from pathlib import Path

from globox import Annotation, AnnotationSet, BoundingBox
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

images = AnnotationSet()
for n in range(3):
    box = BoundingBox.create(label="cat", coords=(5, 5, 20, 20))
    images.add(Annotation(f"{n}.png", (40, 30), [box]))
images.save_coco(Path("set.json"), auto_ids=True)
data = json.loads(Path("set.json").read_text())
detections = [
    {key: a[key] for key in ("image_id", "category_id", "bbox")} | {"score": 0.9}
    for a in data["annotations"]
]


def precision(first):
    for n, annotation in enumerate(data["annotations"]):
        annotation["id"] = first + n
    Path("set.json").write_text(json.dumps(data))
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO("set.json")
        evaluation = COCOeval(truth, truth.loadRes(detections), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return float(evaluation.stats[0])


ids = [a["id"] for a in data["annotations"]]
found, right = precision(ids[0]), precision(1)
print(f"globox {version('globox')} writes the ids {ids}; pycocotools {version('pycocotools')}:")
print(f"AP of perfect detections {found:.3f}, with ids from 1 {right:.3f}")
sys.exit(0 if ids[0] == 0 and found < 0.9 < 0.99 < right else 1)
PYTHON
"$directory/venv/bin/python" script.py
