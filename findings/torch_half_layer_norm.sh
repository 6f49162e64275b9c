#!/usr/bin/env bash
# torch 2.14.1: on a CPU the gradient of layer_norm's bias is summed in half precision.
#
# Expected: the bias of layer_norm gets a gradient that is summed in float32 and rounded once, as the biases
# of linear, conv2d and group_norm do: 5,000 for 5,000 gradients of one, 4,992 in bfloat16.
# Seen: 2,048 in float16 and 256 in bfloat16: from there on adding one changes nothing. A ViTDet that is
# trained or tested in bfloat16 on a CPU moves the biases of its norms too little, in silence: one
# image has thousands of tokens. Keep norms in float32, or train under autocast, which does so.
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

N, C = 5000, 4


def gradients(dtype):
    bias = torch.zeros(C, dtype=dtype, requires_grad=True)
    functional.layer_norm(torch.rand(N, C, dtype=dtype), (C,), None, bias).sum().backward()
    linear = torch.zeros(C, dtype=dtype, requires_grad=True)
    functional.linear(torch.ones(N, 8, dtype=dtype), torch.ones(C, 8, dtype=dtype), linear).sum().backward()
    group = torch.zeros(C, dtype=dtype, requires_grad=True)
    images = torch.rand(1, C, 50, 100, dtype=dtype)
    functional.group_norm(images, 2, None, group).sum().backward()
    return [p.grad[0].item() for p in (bias, linear, group)]


half, brain = gradients(torch.float16), gradients(torch.bfloat16)
print(f"torch {torch.__version__}, layer_norm, linear, group_norm: float16 {half}, bfloat16 {brain}")
sys.exit(0 if half == [2048, 5000, 5000] and brain == [256, 4992, 4992] else 1)
PYTHON
"$environment/bin/python" script.py
