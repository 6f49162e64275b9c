#!/usr/bin/env bash
# torch 2.14.1: two ways to write one sum in half precision differ by more than half on a CPU.
#
# Guess: index_add_, scatter_add_ and index_put_ add in the type of the tensor and stop at 2,048 (float16)
# or 256 (bfloat16), so that the gradients of x[index], index_select and gather do so too; segment_reduce,
# a reduction, adds in float32.
# Seen: scatter_add_ and the gradient of gather are right (5,000 and 4,992), and segment_reduce stops at 2,048
# and 256, like index_add_. A loss that takes a parameter of each class with x.gather(0, labels)
# trains it, one with x[labels] hardly does. Sum in float32.
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

N = 5000
zeros = torch.zeros(N, dtype=torch.long)


def gradient(take, dtype):
    x = torch.zeros(1, dtype=dtype, requires_grad=True)
    take(x).sum().backward()
    return x.grad.item()


def sums(dtype):
    ones = torch.ones(N, dtype=dtype)
    return {
        "index_add_": torch.zeros(1, dtype=dtype).index_add_(0, zeros, ones).item(),
        "x[index]": gradient(lambda x: x[zeros], dtype),
        "segment_reduce": torch.segment_reduce(ones, "sum", lengths=torch.tensor([N])).item(),
        "scatter_add_": torch.zeros(1, dtype=dtype).scatter_add_(0, zeros, ones).item(),
        "gather": gradient(lambda x: x.gather(0, zeros), dtype),
    }


half, brain = sums(torch.float16), sums(torch.bfloat16)
print(f"torch {torch.__version__}, sum of {N} ones: float16 {half}, bfloat16 {brain}")
same = list(half.values()) == [2048] * 3 + [5000] * 2
sys.exit(0 if same and list(brain.values()) == [256] * 3 + [4992] * 2 else 1)
PYTHON
"$environment/bin/python" script.py
