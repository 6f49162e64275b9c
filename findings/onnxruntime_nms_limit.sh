#!/usr/bin/env bash
# onnxruntime 1.32.0: NonMaxSuppression without max_output_boxes_per_class returns nothing.
#
# Expected: the input is optional, so without it there is no limit.
# Seen: no box comes back, without error or warning: the default of the operator is 0, "no output". A
# graph of one's own around an exported detector, which leaves the input out, finds no object in any
# image. Give a limit, the number of boxes for none.
set -eu
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
python3 -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet onnx==1.23.2 onnxruntime==1.32.0 numpy==2.4.6
cd "$directory"
cat > script.py <<'PYTHON'
import sys

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

BOXES = np.array([[[0, 0, 10, 10], [20, 20, 30, 30]]], np.float32)
SCORES = np.array([[[0.9, 0.8]]], np.float32)


def kept(limit):
    names = ["boxes", "scores"] if limit is None else ["boxes", "scores", "limit"]
    limits = [] if limit is None else [helper.make_tensor("limit", TensorProto.INT64, [1], [limit])]
    graph = helper.make_graph(
        [helper.make_node("NonMaxSuppression", names, ["kept"])],
        "nms",
        [
            helper.make_tensor_value_info("boxes", TensorProto.FLOAT, [1, "n", 4]),
            helper.make_tensor_value_info("scores", TensorProto.FLOAT, [1, 1, "n"]),
        ],
        [helper.make_tensor_value_info("kept", TensorProto.INT64, ["k", 3])],
        limits,
    )
    opset = [helper.make_opsetid("", 21)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=10)
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return len(session.run(None, {"boxes": BOXES, "scores": SCORES})[0])


without, limited = kept(None), kept(2)
print(f"onnxruntime {onnxruntime.__version__}: of 2 boxes {without} without a limit, {limited} of 2")
sys.exit(0 if (without, limited) == (0, 2) else 1)
PYTHON
"$directory/venv/bin/python" script.py
