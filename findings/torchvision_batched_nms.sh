#!/usr/bin/env bash
# torchvision 0.29.1: batched_nms keeps other boxes than NMS class by class if there are 1,203 classes.
#
# Expected: "each index value correspond to a category, and NMS will not be applied between elements of
# different categories": the boxes that NMS of each class keeps.
# Seen: up to 1,000 boxes are moved apart by class times the largest coordinate, in float32. For class 1,200
# of an image of 4,000 pixels that is 4.8 million, where numbers are 0.5 apart: boxes of 4 to 24
# pixels are rounded to half a pixel, and of some 490 that are kept 18 are others. With 80 classes it is one.
# More than 1,000 boxes are taken class by class. Detectron2's batched_nms calls it with float32.
set -eu
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
# `make findings` lets the scripts with torch share one environment, which takes gigabytes
environment=${FINDINGS_TORCH:-$directory/venv}
if [ ! -e "$environment/ready" ]; then
  python3 -m venv "$environment"
  "$environment/bin/pip" install --quiet fvcore==0.1.5.post20221221 numpy==2.4.6 \
    torch==2.14.1 torchvision==0.29.1
  touch "$environment/ready"
fi
cd "$directory"
cat > script.py <<'PYTHON'
import sys

import torch
import torchvision
from torchvision.ops import batched_nms, nms


def different(num_classes, size, count=400):
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(count, 2, generator=generator) * size
    boxes = torch.cat([corner, corner + torch.rand(count, 2, generator=generator) * 20 + 4], dim=1)
    boxes = torch.cat([boxes, boxes + torch.rand(count, 4, generator=generator) * 3])
    label = torch.randint(num_classes - 20, num_classes, (count,), generator=generator).repeat(2)
    scores = torch.rand(2 * count, generator=generator)
    kept = set(batched_nms(boxes, scores, label, 0.5).tolist())
    apart = set()
    for k in label.unique().tolist():
        at = torch.nonzero(label == k)[:, 0]
        apart |= set(at[nms(boxes[at], scores[at], 0.5)].tolist())
    return len(kept ^ apart), len(apart)


lvis, coco = different(1203, 4000), different(80, 1333)
print(f"torchvision {torchvision.__version__}: {lvis[0]} of {lvis[1]} boxes differ with 1,203 classes")
print(f"and images of 4,000 pixels, {coco[0]} of {coco[1]} with 80 and 1,333")
sys.exit(0 if lvis[0] >= 8 and coco[0] <= 3 else 1)
PYTHON
"$environment/bin/python" script.py
