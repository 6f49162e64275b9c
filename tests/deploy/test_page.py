"""The code of docs/use.md runs as it is printed; that of other packages if they are installed."""

import importlib.util
import re
import shlex
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from d2_balance.cli.main import main
from tests.deploy.conftest import NAMES, make_run
from tests.deploy.test_load import LOW

PAGE = (Path(__file__).parents[2] / "docs" / "use.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
# those of a model of this package, not of other projects' weights
COMMANDS = re.findall(r"^d2-balance (?:predict|export) .*output/run .*$", PAGE, flags=re.MULTILINE)


def chunks():
    """Blocks of code; one that imports nothing goes on from the one before."""
    joined = []
    for block in BLOCKS:
        if joined and not re.search(r"^(import|from) ", block, flags=re.MULTILINE):
            joined[-1] += block
        else:
            joined.append(block)
    return joined


@pytest.fixture
def directory(tmp_path, monkeypatch):
    """A working directory with the files that the page names."""
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path, "mask", "MODEL.BALANCE.CLS_LOSS", "EQL", "INPUT.FORMAT", "RGB", *LOW)
    (tmp_path / "output").mkdir()
    shutil.move(tmp_path / "run", tmp_path / "output" / "run")
    (tmp_path / "images").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (2, 72, 96, 3), np.uint8)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "images" / f"{number}.png")
    Image.fromarray(pixels.repeat(8, 1).repeat(8, 2)[0]).save(tmp_path / "large.jpg")
    writer = cv2.VideoWriter("film.mp4", cv2.VideoWriter.fourcc(*"mp4v"), 5, (96, 72))
    for image in pixels:
        writer.write(image)
    writer.release()
    return tmp_path


@pytest.mark.parametrize("number", range(len(chunks())))
def test_code(directory, number):
    first, *_ = every = chunks()
    for package in re.findall(r"^(?:import|from) (\w+)", every[number], flags=re.MULTILINE):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"the package {package} is not installed")
    for command in COMMANDS:  # of which the code takes files
        output = command.partition("--output ")[2].split()[0]
        if output in every[number]:
            assert main(shlex.split(command)[1:]) == 0
    names = {"image": cv2.imread(str(directory / "images" / "0.png"))}
    exec(first, names)
    if number:
        exec(every[number], names)
    assert len(names["instances"])
    if "result" in names:  # of SAHI
        found = names["result"].object_prediction_list
        assert {each.category.name for each in found} <= set(NAMES)


@pytest.mark.parametrize("command", COMMANDS)
def test_command(directory, command):
    words = shlex.split(command)[1:]
    if "onnx" in words:
        pytest.importorskip("onnxruntime")
    assert main(words) == 0
    assert Path(words[words.index("--output") + 1]).exists()


def test_file_for_triton(directory):
    onnxruntime = pytest.importorskip("onnxruntime")
    (command,) = (c for c in COMMANDS if "onnx" in c)
    assert main(shlex.split(command)[1:]) == 0
    session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
    types = {"TYPE_FP32": "tensor(float)", "TYPE_INT64": "tensor(int64)"}
    told = re.findall(
        r'^(?:input|output) {.*"(\w+)", data_type: (\w+), dims: \[(.*)\] }',
        PAGE,
        flags=re.MULTILINE,
    )
    tensors = [*session.get_inputs(), *session.get_outputs()]
    assert [name for name, *_ in told] == [tensor.name for tensor in tensors]
    for (name, kind, dims), tensor in zip(told, tensors, strict=True):
        assert types[kind] == tensor.type, name
        sizes = [int(size) for size in dims.split(", ")]
        assert len(sizes) == len(tensor.shape), name
        for size, own in zip(sizes, tensor.shape, strict=True):
            # Triton takes a size for one that the model leaves open, and no other way round
            assert own == size or isinstance(own, str), (name, tensor.shape)
