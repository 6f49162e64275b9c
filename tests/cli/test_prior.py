"""`d2-balance prior`: the table, the file, and what is refused."""

import json

import pytest

from d2_balance.cli import main as cli
from d2_balance.cli.prior import report
from d2_balance.data.priors.foreground import ForegroundPrior, PartCount

from ..conftest import RETINANET
from ..data.conftest import coco_data, names, write  # noqa: F401  fixtures


@pytest.fixture
def config(tmp_path, write, names):  # noqa: F811
    """A small RetinaNet on two images of 40 x 30 pixels and three objects."""
    json_file, directory = write(coco_data())
    name = names()
    path = tmp_path / "config.yaml"
    data = f"DATASETS: {{REGISTER: [[{name}, {json_file}, {directory}]], TRAIN: [{name}]}}\n"
    size = "INPUT: {MIN_SIZE_TRAIN: [30], MAX_SIZE_TRAIN: 40}\n"
    model = RETINANET.replace("NUM_CONVS: 1", "NUM_CONVS: 1, NUM_CLASSES: 2")
    path.write_text(data + size + model + "  PIXEL_STD: [1.0, 1.0, 1.0]\n")
    return str(path)


def test_the_command_prints_the_table_and_writes_the_file(config, tmp_path, capsys):
    output = str(tmp_path / "prior.json")
    assert cli.main(["prior", "--config-file", config, "--output", output]) == 0
    out = capsys.readouterr().out
    prior = ForegroundPrior.load(output)
    part = prior.parts["RetinaNet"]
    assert prior.instance_count == (1, 2) and part.outputs == 2 and part.positives >= 3
    assert out.startswith("2 images\n") and f"MODEL.BALANCE.PRIOR_FILE {output}" in out
    assert f"{part.samples:,}" in out and f"{part.prior:.3e}" in out and f"{part.bias:.3f}" in out


def test_a_sample_says_so(config, capsys):
    assert cli.main(["prior", "--config-file", config, "--max-images", "1"]) == 0
    assert "1 image of 2, sampled with seed 0" in capsys.readouterr().out


def test_an_existing_file_stays_without_overwrite(config, tmp_path, capsys):
    output = tmp_path / "prior.json"
    output.write_text("mine")
    arguments = ["prior", "--config-file", config, "--output", str(output)]
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert "exists; --overwrite replaces it" in error and len(error.splitlines()) == 1
    assert output.read_text() == "mine"
    assert cli.main([*arguments, "--overwrite"]) == 0
    assert json.loads(output.read_text())["num_images"] == 2


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["MODEL.RETINANET.NUM_CLASES", "3"], "did you mean MODEL.RETINANET.NUM_CLASSES"),
        (["MODEL.RETINANET.NUM_CLASSES", "3"], "NUM_CLASSES"),
        (["DATASETS.TRAIN", "()"], "DATASETS.TRAIN, which is empty"),
    ],
)
def test_bad_settings_end_with_one_line(config, extra, message, capsys):
    assert cli.main(["prior", "--config-file", config, *extra]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
    assert error.startswith("d2-balance prior: error: ")


def test_negative_numbers_of_images_are_refused(config, capsys):
    with pytest.raises(SystemExit):
        cli.main(["prior", "--config-file", config, "--max-images", "-1"])
    assert "-1 is not an integer" in capsys.readouterr().err


def test_losses_in_the_table_are_those_of_the_formula():
    part = PartCount(10, 10_000, 80)
    text = report(ForegroundPrior({"RetinaNet": part}, (10,), ("a",), 1, 1))
    # 4.605 + 79999 * 0.01005 = 808.6; 0.693 + 79999 * 0.693 = 55452
    assert "| 808.6 " in text and "| 5.545e+04 " in text and "1.250e-05" in text
