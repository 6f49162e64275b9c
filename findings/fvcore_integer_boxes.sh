#!/usr/bin/env bash
# fvcore 0.1.5.post20221221: a resize truncates boxes and polygons whose numbers are integers.
#
# Guess: the annotations [1, 2, 10, 13] and [1.0, 2.0, 10.0, 13.0] train alike.
# Seen: ScaleTransform.apply_coords writes into the array that it is given. An int64 array stays int64,
# and x 1 scaled by 1.5 becomes 1, not 1.5: every box and polygon of a file with integer coordinates
# loses up to a pixel at each edge, towards the upper left corner. The caller's array of a polygon
# is changed as well. One float in the list is enough to be right, so files differ by luck.
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
cat > resize.py <<'PYTHON'
import sys
from importlib.metadata import version

import numpy as np
from fvcore.transforms.transform import ScaleTransform

resize = ScaleTransform(30, 40, 45, 60)  # an image of 30 x 40 grows by 1.5
box, polygon = [1, 3, 12, 16], [[1, 3], [11, 3], [11, 15]]
box_int = resize.apply_box(np.array([box]))[0].tolist()
box_float = resize.apply_box(np.array([box], float))[0].tolist()
given = np.array(polygon)
polygon_int = resize.apply_coords(given).tolist()
polygon_float = resize.apply_coords(np.array(polygon, float)).tolist()
print(f"fvcore {version('fvcore')}, numpy {np.__version__}")
print("box, integers", box_int, "floats", box_float)
print("polygon, integers", polygon_int, "floats", polygon_float)
print("the caller's polygon afterwards", given.tolist())
same = (
    box_float == [1.5, 4.5, 18.0, 24.0]
    and box_int == [1, 4, 18, 24]
    and polygon_float == [[1.5, 4.5], [16.5, 4.5], [16.5, 22.5]]
    and polygon_int == given.tolist() == [[1, 4], [16, 4], [16, 22]]
)
sys.exit(0 if same else 1)
PYTHON
"$environment/bin/python" resize.py
