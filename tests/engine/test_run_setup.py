"""From the command line to a config: keys, device, directory, seed, messages."""

import pytest
import torch

from d2_balance.engine import read_config
from d2_balance.engine.setup.run import (
    holds_run,
    last_checkpoint,
    prepare_run,
    short_messages,
    use_cpu_without_cuda,
)

from ..conftest import small_cfg


def test_file_and_command_line_are_merged(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("MODEL: {BALANCE: {CLS_LOSS: GHMC, GHMC: {BINS: 10}}}\nVERSION: 2\n")
    cfg = read_config(str(path), ["MODEL.BALANCE.GHMC.MOMENTUM", "0.5"])
    assert cfg.MODEL.BALANCE.CLS_LOSS == "GHMC"
    assert (cfg.MODEL.BALANCE.GHMC.BINS, cfg.MODEL.BALANCE.GHMC.MOMENTUM) == (10, 0.5)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["MODEL.BALANCE.GHMC.BIN", "3"],
            r"command line: unknown key MODEL.BALANCE.GHMC.BIN; did you mean .*GHMC.BINS",
        ),
        (["SOLVER.MAXITER", "3"], r"unknown key SOLVER.MAXITER; did you mean SOLVER.MAX_ITER"),
        (["MODEL.BALANCE.GHMC.BINS", "many"], r"Type mismatch.*MODEL.BALANCE.GHMC.BINS"),
        (["MODEL.BALANCE.GHMC.BINS"], r"odd length"),
        (["MODEL.BALANCE.EQL.LAMBDA_", "0.1"], r"renamed to MODEL.BALANCE.EQL.LAMBDA"),
    ],
)
def test_mistakes_on_the_command_line_are_named(overrides, expected):
    with pytest.raises(ValueError, match=expected):
        read_config("", overrides)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("MODEL: {BALANCE: {CLS_LOS: GHMC}}", "unknown key MODEL.BALANCE.CLS_LOS; did you mean"),
        ("MODEL: [", "a.yaml"),
        ("_BASE_: missing.yaml", "missing.yaml"),
    ],
)
def test_mistakes_in_a_file_name_the_file(tmp_path, text, expected):
    path = tmp_path / "a.yaml"
    path.write_text(text + "\nVERSION: 2\n")
    with pytest.raises(ValueError, match=expected) as error:
        read_config(str(path))
    assert str(error.value).startswith(str(path))


def test_a_config_file_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="nowhere.yaml"):
        read_config("nowhere.yaml")


def test_cuda_becomes_cpu_only_where_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cfg = small_cfg("retinanet", "MODEL.DEVICE", "cuda")
    assert use_cpu_without_cuda(cfg) and cfg.MODEL.DEVICE == "cpu"
    assert not use_cpu_without_cuda(cfg)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    cfg = small_cfg("retinanet", "MODEL.DEVICE", "cuda")
    assert not use_cpu_without_cuda(cfg) and cfg.MODEL.DEVICE == "cuda"


def cfg_in(directory, *overrides):
    return small_cfg("retinanet", "OUTPUT_DIR", str(directory), *overrides)


def started_run(directory, seed=11):
    directory.mkdir()
    (directory / "config.yaml").write_text(f"SEED: {seed}\n")
    (directory / "last_checkpoint").write_text("model_0000003.pth")


def test_a_directory_with_a_run_is_refused_and_left_alone(tmp_path):
    started_run(tmp_path / "out")
    before = {p.name: p.read_text() for p in (tmp_path / "out").iterdir()}
    with pytest.raises(ValueError, match=r"OUTPUT_DIR .*out holds a run.*--resume.*another"):
        prepare_run(cfg_in(tmp_path / "out"))
    assert {p.name: p.read_text() for p in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ([], False),
        (["config.yaml", "log.txt"], False),  # a run that was refused at its start
        (["last_checkpoint"], True),
        (["model_final.pth"], True),
        (["summary.md"], True),
        (["metrics.json"], True),
    ],
)
def test_what_counts_as_a_run(tmp_path, files, expected):
    for name in files:
        (tmp_path / name).write_text("x")
    assert holds_run(str(tmp_path)) is expected


def test_empty_metrics_and_missing_directories_are_no_run(tmp_path):
    (tmp_path / "metrics.json").touch()
    assert not holds_run(str(tmp_path))
    assert not holds_run(str(tmp_path / "missing"))


def test_a_new_run_draws_a_seed_and_keeps_a_given_one(tmp_path):
    seeds = set()
    for _ in range(3):
        cfg = cfg_in(tmp_path)
        prepare_run(cfg)
        seeds.add(cfg.SEED)
    assert len(seeds) == 3 and min(seeds) >= 0
    cfg = cfg_in(tmp_path, "SEED", "5")
    prepare_run(cfg)
    assert cfg.SEED == 5


def test_a_resumed_run_keeps_its_seed(tmp_path):
    started_run(tmp_path / "out", seed=11)
    cfg = cfg_in(tmp_path / "out")
    prepare_run(cfg, resume=True)
    assert (11, str(tmp_path / "out")) == (cfg.SEED, cfg.OUTPUT_DIR)


def test_resuming_nothing_starts_afresh(tmp_path):
    cfg = cfg_in(tmp_path / "new")
    prepare_run(cfg, resume=True)
    assert cfg.SEED >= 0 and not (tmp_path / "new").exists()


def test_an_evaluation_writes_beside_a_run(tmp_path):
    started_run(tmp_path / "out")
    cfg = cfg_in(tmp_path / "out")
    prepare_run(cfg, eval_only=True)
    assert str(tmp_path / "out" / "eval_1") == cfg.OUTPUT_DIR
    (tmp_path / "out" / "eval_1").mkdir()
    cfg = cfg_in(tmp_path / "out")
    prepare_run(cfg, eval_only=True)
    assert str(tmp_path / "out" / "eval_2") == cfg.OUTPUT_DIR
    cfg = cfg_in(tmp_path / "free")
    prepare_run(cfg, eval_only=True)
    assert str(tmp_path / "free") == cfg.OUTPUT_DIR


def test_an_evaluation_takes_class_counts_from_the_weights(tmp_path):
    cfg = cfg_in(tmp_path)
    prepare_run(cfg, eval_only=True)
    assert cfg.MODEL.BALANCE.CLASS_COUNTS_FILE == "checkpoint"
    cfg = cfg_in(tmp_path, "MODEL.BALANCE.CLASS_COUNTS_FILE", "counts.json")
    prepare_run(cfg, eval_only=True)
    assert cfg.MODEL.BALANCE.CLASS_COUNTS_FILE == "counts.json"
    cfg = cfg_in(tmp_path)
    prepare_run(cfg)
    assert cfg.MODEL.BALANCE.CLASS_COUNTS_FILE == ""


def test_an_evaluation_with_resume_takes_the_last_checkpoint(tmp_path):
    started_run(tmp_path / "out")
    checkpoint = str(tmp_path / "out" / "model_0000003.pth")
    assert last_checkpoint(str(tmp_path / "out")) == checkpoint
    cfg = cfg_in(tmp_path / "out", "MODEL.WEIGHTS", "other.pth")
    prepare_run(cfg, eval_only=True, resume=True)
    assert checkpoint == cfg.MODEL.WEIGHTS


def test_mistakes_of_the_user_end_in_one_message(capsys):
    with pytest.raises(SystemExit) as end, short_messages("train_net.py"):
        read_config("", ["NO.SUCH.KEY", "1"])
    assert end.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("train_net.py: error: command line: unknown key NO.SUCH.KEY")


@pytest.mark.parametrize("bug", [lambda: int("x"), lambda: {}["x"], lambda: torch.ones(2).view(3)])
def test_bugs_keep_their_traceback(bug):
    with pytest.raises((ValueError, KeyError, RuntimeError)), short_messages("train_net.py"):
        bug()


def test_true_and_false_are_taken_where_the_values_are_words(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("MODEL: {BALANCE: {EQL: {USE_IMAGE_LEVEL_LABELS: False}}}\n")
    assert read_config(str(path)).MODEL.BALANCE.EQL.USE_IMAGE_LEVEL_LABELS == "never"
    key = "MODEL.BALANCE.EQL.USE_IMAGE_LEVEL_LABELS"
    words = {"True": "always", True: "always", "auto": "auto", "never": "never"}
    for value, word in words.items():
        cfg = read_config(str(path), [key, value])
        assert word == cfg.MODEL.BALANCE.EQL.USE_IMAGE_LEVEL_LABELS
    assert read_config("", ["MODEL.MASK_ON", "True"]).MODEL.MASK_ON is True
    # what a run saves is read by Detectron2 itself
    (tmp_path / "config.yaml").write_text(cfg.dump())
    again = read_config()
    again.merge_from_file(str(tmp_path / "config.yaml"))
    assert again.MODEL.BALANCE == cfg.MODEL.BALANCE
