"""The training script as a user calls it: train, stop, resume, evaluate, mistakes."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog

from d2_balance.cli.main import build_parser
from d2_balance.engine.train import train

from .conftest import RETINANET
from .engine.conftest import write_dataset

ROOT = Path(__file__).parents[1]
NAMES = ("script_train", "script_test")
CONFIG = """
  DEVICE: cpu
  WEIGHTS: ""
  BALANCE: {{CLS_LOSS: GHMC, BOX_LOSS: SmoothL1, BETA_DECAY: {{ENABLED: True, PERIOD: 2}}}}
DATASETS:
  TRAIN: [script_train]
  TEST: [script_test]
  REGISTER:
    - {{NAME: script_train, JSON: {json}, IMAGES: {images}}}
    - [script_test, {json}, {images}]
DATALOADER: {{NUM_WORKERS: 0}}
INPUT: {{MIN_SIZE_TRAIN: [48, 64], MIN_SIZE_TEST: 48}}
SOLVER: {{IMS_PER_BATCH: 2, MAX_ITER: 6, STEPS: [], WARMUP_ITERS: 2, CHECKPOINT_PERIOD: 2}}
SEED: 7
VERSION: 2
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    directory = tmp_path_factory.mktemp("script")
    json_file, images = write_dataset(directory / "data")
    text = RETINANET.replace("MODEL:", "MODEL:", 1).replace(
        "RETINANET: {NUM_CONVS: 1}", "RETINANET: {NUM_CONVS: 1, NUM_CLASSES: 6}"
    )
    text = text.replace("META_ARCHITECTURE: RetinaNet", "META_ARCHITECTURE: BalancedRetinaNet")
    path = directory / "small.yaml"
    path.write_text(text.rstrip() + CONFIG.format(json=json_file, images=images))
    return str(path)


@pytest.fixture(autouse=True)
def clean_up():
    """Takes the datasets off the catalogs, and the handlers of a run off the loggers."""
    loggers = [logging.getLogger(name) for name in ("d2_balance", "detectron2", "fvcore")]
    before = [(x, list(x.handlers), x.propagate, x.level) for x in loggers]
    yield
    for logger, handlers, propagate, level in before:
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)
    for name in NAMES:
        if name in DatasetCatalog:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


def parsed(arguments):
    return build_parser("train").parse_args(["train", *arguments])


def run(config, *arguments):
    return train(parsed(["--config-file", config, *map(str, arguments)]))


def state(path):
    return torch.load(path)["model"]


KILLED = """
import os, sys
from detectron2.engine import HookBase
from d2_balance.cli.main import main
from d2_balance.engine import BalancedTrainer

class Kill(HookBase):
    def before_step(self):
        if self.trainer.iter == 5:
            os._exit(9)

build_hooks = BalancedTrainer.build_hooks
BalancedTrainer.build_hooks = lambda self: [*build_hooks(self), Kill()]
main(["train", *sys.argv[1:]])
"""


def call(*command):
    # with as many threads as this process has: on them depends the last bit of a sum
    env = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, env=env, capture_output=True, text=True
    )


def test_a_killed_process_resumes_to_the_same_weights_and_state(config, tmp_path):
    parts, whole = tmp_path / "parts", tmp_path / "whole"
    done = call("-c", KILLED, "--config-file", config, "OUTPUT_DIR", parts)
    assert done.returncode == 9, done.stderr
    assert (parts / "last_checkpoint").read_text() == "model_0000003.pth"
    run(config, "--resume", "OUTPUT_DIR", parts)
    results = run(config, "OUTPUT_DIR", whole)

    expected, found = state(whole / "model_final.pth"), state(parts / "model_final.pth")
    assert expected.keys() == found.keys()
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []
    assert found["cls_loss.density.acc"].sum() > 0
    assert found["box_loss.beta"].item() == pytest.approx(0.11 - 2 * 0.01)  # floor(5 / 2) steps

    # what a run leaves behind
    assert set(results) == {"bbox"}
    for name in ("summary.md", "losses.png", "density_GHMC.png", "metrics.json", "log.txt"):
        assert (whole / name).stat().st_size > 0
    assert list(whole.glob("events.out.tfevents.*"))
    last = [json.loads(x) for x in (whole / "metrics.json").read_text().splitlines()][-1]
    assert "bbox/AP50" in last


def test_a_run_is_not_overwritten_but_evaluated(config, tmp_path, capsys):
    out = tmp_path / "out"
    run(config, "OUTPUT_DIR", out, "SEED", "-1")
    seed = json.loads((out / "config.yaml").read_text().split("\nSEED: ")[1].split("\n")[0])
    assert seed >= 0
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}

    with pytest.raises(SystemExit) as end:
        run(config, "OUTPUT_DIR", out)
    assert end.value.code == 2
    assert f"OUTPUT_DIR {out} holds a run" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before

    # finished: --resume evaluates once more, with the seed of the run
    run(config, "--resume", "OUTPUT_DIR", out, "SEED", "-1")
    assert f"SEED: {seed}\n" in (out / "config.yaml").read_text()
    assert (out / "metrics.json").read_bytes() == before[out / "metrics.json"]

    # an evaluation writes beside it, and needs no training set
    weights = ["MODEL.WEIGHTS", out / "model_final.pth", "DATASETS.TRAIN", "('gone',)"]
    run(config, "--eval-only", "OUTPUT_DIR", out, *weights)
    assert "evaluation only" in (out / "eval_1" / "summary.md").read_text()
    assert not list((out / "eval_1").glob("*.pth"))


def test_a_mistake_ends_with_one_message_and_status_2(config, tmp_path):
    out = tmp_path / "out"
    done = call(
        "train_net.py", "--config-file", config, "OUTPUT_DIR", out, "MODEL.BALANCE.CLS_LOSS", "XX"
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(
        "d2-balance train: error: MODEL.BALANCE.CLS_LOSS: 'XX' is unknown; must be one of "
    )
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr
    # corrected, the same directory can be used
    assert not (out / "last_checkpoint").exists()
    run(config, "OUTPUT_DIR", out, "SOLVER.MAX_ITER", "1")


def test_training_that_diverges_ends_with_one_message_and_status_2(config, tmp_path, capsys):
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as end:
        run(config, "OUTPUT_DIR", out, "SOLVER.BASE_LR", "1e30")
    assert end.value.code == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert ": error: The loss is not finite at iteration " in message
    assert "Lower SOLVER.BASE_LR or set SOLVER.CLIP_GRADIENTS.ENABLED True. Run" in message
    (saved,) = out.glob("replay_*_rank0.pt")
    assert message.endswith(f"d2-balance replay {saved}")
    log = (out / "log.txt").read_text()
    assert "The loss is not finite at iteration " in log and "Traceback" not in log
    assert not (out / "model_final.pth").exists() and not (out / "summary.md").exists()


def test_eql_trains_on_a_coco_file_and_says_what_changes_nothing(config, tmp_path):
    """README's lines on own data: no image-level labels, and here no class below lambda."""
    text = Path(config).read_text()
    json_file = text.split("JSON: ")[1].split(",")[0]
    data = json.loads(Path(json_file).read_text())
    for image in data["images"]:
        del image["neg_category_ids"], image["not_exhaustive_category_ids"]
    data["categories"] = data["categories"][:4]  # those that have objects
    own = tmp_path / "own.json"
    own.write_text(json.dumps(data))
    path = tmp_path / "own.yaml"
    path.write_text(text.replace(json_file, str(own)).replace("GHMC", "EQL"))
    out = tmp_path / "out"
    run(str(path), "OUTPUT_DIR", out, "SOLVER.MAX_ITER", "1", "MODEL.RETINANET.NUM_CLASSES", "4")
    sentence = (
        "EQL: no class is below MODEL.BALANCE.EQL.LAMBDA 0.00177; the rarest is in 33.33% of the "
        "training images. It trains as cross-entropy."
    )
    log = (out / "log.txt").read_text()
    assert log.count(sentence) == 1
    assert "USE_IMAGE_LEVEL_LABELS is auto: script_train has none." in log
    # before Detectron2 logs the environment and the config
    assert log.index("USE_IMAGE_LEVEL_LABELS is auto") < log.index("Running with full config")
    assert f"- {sentence}" in (out / "summary.md").read_text()
