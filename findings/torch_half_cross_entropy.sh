#!/usr/bin/env bash
# torch 2.14.1: cross_entropy of 100,000 samples in float16 is NaN, with class weights infinite.
#
# Guess: the mean over the samples is finite and right to 1e-3, as that of
# binary_cross_entropy_with_logits, smooth_l1_loss and mean() is.
# Seen: on a CPU the sum of all samples, 230,000, and the number of samples are rounded to float16 before
# the division: inf / inf, or inf / 50,000 with weights of 0.5. In bfloat16 it is 2.27 in place of
# 2.303. A dense head has that many anchors in one image. Compute losses in float32.
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
from torch.nn import functional

logits, labels = torch.zeros(100_000, 10), torch.zeros(100_000, dtype=torch.long)


def losses(dtype):
    weight = torch.full((10,), 0.5, dtype=dtype)
    binary = functional.binary_cross_entropy_with_logits(logits.to(dtype), logits.to(dtype))
    return (
        functional.cross_entropy(logits.to(dtype), labels).item(),
        functional.cross_entropy(logits.to(dtype), labels, weight).item(),
        binary.item(),
    )


right, half, brain = map(losses, (torch.float32, torch.float16, torch.bfloat16))
print(f"torch {torch.__version__}, plain, with weights, binary: float32 {right}")
print(f"float16 {half}, bfloat16 {brain}")
same = half[0] != half[0] and half[1] == float("inf") and abs(half[2] - right[2]) < 1e-3
sys.exit(0 if same and abs(brain[0] - right[0]) > 0.03 else 1)
PYTHON
"$environment/bin/python" script.py
