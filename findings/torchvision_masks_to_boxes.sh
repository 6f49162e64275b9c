#!/usr/bin/env bash
# torchvision 0.29.1: masks_to_boxes gives an empty mask the box [0, 0, 0, 0].
#
# Guess: a mask without a pixel raises an error, for it has no box.
# Seen: [0, 0, 0, 0], without a warning, which no later step can tell from a box in the corner; and a mask of
# the one pixel in the corner has the same box. Boxes that are made from masks of copy-paste or of a
# crop then hold objects without area: look at the masks before.
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

masks = torch.zeros(2, 8, 8, dtype=torch.bool)
masks[1, 0, 0] = True
boxes = torchvision.ops.masks_to_boxes(masks).tolist()
print(f"torchvision {torchvision.__version__}: box of an empty mask {boxes[0]}, of one pixel {boxes[1]}")
sys.exit(0 if boxes == [[0, 0, 0, 0]] * 2 else 1)
PYTHON
"$environment/bin/python" script.py
