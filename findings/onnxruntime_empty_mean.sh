#!/usr/bin/env bash
# onnxruntime 1.32.0: the mean over no element is 0, where torch and numpy say NaN.
#
# Guess: ReduceMean over an axis of length 0 is NaN, as torch.mean of no box is, whose sum 0 is divided
# by 0.
# Seen: 0, without a warning. A graph that averages scores or features over the boxes of an image gives 0 in
# images without a box, and whoever tells them by NaN, as in eager mode, counts them as measured. Count
# the boxes in the graph, and divide by the count.
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


def run(op, rank, *inputs, **attributes):
    names = [f"in{n}" for n in range(len(inputs))]
    kinds = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}
    graph = helper.make_graph(
        [helper.make_node(op, names, ["out"], **attributes)],
        "graph",
        [
            helper.make_tensor_value_info(name, kinds[value.dtype.name], [None] * value.ndim)
            for name, value in zip(names, inputs)
        ],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, [None] * rank)],
    )
    opset = [helper.make_opsetid("", 21)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=10)
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, dict(zip(names, inputs)))[0]


boxes = np.zeros((0, 3), np.float32)
found = run("ReduceMean", 1, boxes, np.array([0], np.int64), keepdims=0).tolist()
whole = run("ReduceMean", 0, boxes[:, 0], keepdims=0).tolist()
print(f"onnxruntime {onnxruntime.__version__}: mean over no box {found}, over an empty vector {whole}")
with np.errstate(invalid="ignore"):
    print("numpy:", (boxes.sum(axis=0) / np.float32(len(boxes))).tolist())
sys.exit(0 if found == [0, 0, 0] and whole == 0 else 1)
PYTHON
"$directory/venv/bin/python" script.py
