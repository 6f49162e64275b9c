"""Python configs train what YAML configs train, and survive a round trip through YAML."""

from pathlib import Path

import pytest
from detectron2.config import LazyConfig
from detectron2.engine import defaults

from d2_balance.engine import use_datasets
from d2_balance.engine.resume.random_state import seed_everything
from d2_balance.engine.setup.lazy import SAVED, is_lazy, read_lazy, read_run, save_lazy
from d2_balance.engine.setup.validate import validate

ROOT = Path(__file__).parents[2]
LAZY, QUICK = ROOT / "configs/lazy", ROOT / "configs/quick_schedules"
SHORT = ["train.max_iter=2", "train.device=cpu", "dataloader.train.total_batch_size=2"]


def yaml_run(name, directory):
    overrides = ["MODEL.DEVICE", "cpu", "SOLVER.MAX_ITER", "2", "SOLVER.IMS_PER_BATCH", "2"]
    return read_run(str(QUICK / f"{name}.yaml"), [*overrides, "OUTPUT_DIR", str(directory)])


def lazy_run(path, directory, *overrides):
    return read_run(str(path), [*SHORT, f"train.output_dir={directory}", *overrides])


def train(cfg, kind, start=None):
    """Losses of every iteration, and the trainer."""
    cfg.SOLVER.WARMUP_ITERS = 0
    seed_everything(3)
    trainer = kind(cfg)
    if start is not None:
        trainer.model.load_state_dict(start)
    trainer.test = lambda cfg, model: {}
    first = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    losses, write = [], trainer._trainer._write_metrics

    def note(values, *others):
        losses.append({name: value.item() for name, value in values.items()})
        write(values, *others)

    trainer._trainer._write_metrics = note
    trainer.train()
    return losses, first, trainer


@pytest.mark.parametrize(
    "name",
    [
        "retinanet_R_18_focal_mini_lvis",
        "retinanet_R_18_ghm_mini_lvis",
        "mask_rcnn_R_18_eql_mini_lvis",
    ],
)
def test_equal_losses_on_equal_seeds(tmp_path, name):
    """From equal weights: Detectron2 draws those of RoI heads in another order for YAML."""
    cfg, kind = yaml_run(name, tmp_path / "yaml")
    # the schedules of both are 40 iterations with a warm-up of 10, here of 2 and 0.5
    expected, start, from_yaml = train(cfg, kind)
    cfg, kind = lazy_run(LAZY / f"{name}.py", tmp_path / "lazy", "lr_multiplier.warmup_length=0.0")
    cfg.MODEL.DEVICE = "cpu"
    found, _, from_lazy = train(cfg, kind, start)
    assert found == expected
    ours, theirs = from_lazy.model.state_dict(), from_yaml.model.state_dict()
    assert ours.keys() == theirs.keys()


def test_the_names_of_a_lazy_config_are_those_of_yaml(tmp_path):
    name = "mask_rcnn_R_18_eql_mini_lvis"
    cfg, _ = lazy_run(LAZY / f"{name}.py", tmp_path)
    other, _ = yaml_run(name, tmp_path)
    for key in ("META_ARCHITECTURE", "MASK_ON", "ROI_HEADS.NAME", "ROI_HEADS.NUM_CLASSES",
                "BALANCE.CLS_LOSS", "BALANCE.EQL.LAMBDA"):  # fmt: skip
        found, expected = cfg.MODEL, other.MODEL
        for part in key.split("."):
            found, expected = found[part], expected[part]
        assert found == expected, key
    assert cfg.SOLVER.CLIP_GRADIENTS == other.SOLVER.CLIP_GRADIENTS
    assert cfg.DATASETS.TRAIN == other.DATASETS.TRAIN
    validate(cfg, registered=False)


def test_a_saved_lazy_config_trains_the_same(tmp_path):
    path = LAZY / "retinanet_R_18_ghm_mini_lvis.py"
    cfg, kind = lazy_run(path, tmp_path / "py")
    expected, *_ = train(cfg, kind)
    save_lazy(kind, str(tmp_path))
    saved = tmp_path / SAVED
    assert is_lazy(str(saved)) and not (tmp_path / f"{SAVED}.pkl").exists()
    cfg, kind = read_run(str(saved), [f"train.output_dir={tmp_path / 'saved'}"])
    assert train(cfg, kind)[0] == expected


@pytest.mark.parametrize(
    "path", sorted(p for p in LAZY.rglob("*.py") if p.parent.name != "common"), ids=lambda p: p.stem
)
def test_every_lazy_config_is_plain_yaml_when_saved(tmp_path, path):
    """Without lambdas or other objects that only Python knows."""
    lazy = LazyConfig.load(str(path))
    LazyConfig.save(lazy, str(tmp_path / SAVED))
    assert not (tmp_path / f"{SAVED}.pkl").exists()
    again = LazyConfig.load(str(tmp_path / SAVED))
    LazyConfig.save(again, str(tmp_path / "again.yaml"))
    assert (tmp_path / "again.yaml").read_text() == (tmp_path / SAVED).read_text()
    assert "lambda " not in (tmp_path / SAVED).read_text()
    cfg, _ = read_run(str(path))
    assert cfg.MODEL.BALANCE.CLS_LOSS or "coco" in path.stem


def test_keys_of_yaml_are_reached_through_run(tmp_path):
    cfg, _ = lazy_run(
        LAZY / "retinanet_R_18_focal_mini_lvis.py", tmp_path, "run.SOLVER.EMA.ENABLED=True"
    )
    assert cfg.SOLVER.EMA.ENABLED and cfg.SOLVER.CLIP_GRADIENTS.ENABLED


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["SOLVER.MAX_ITER", "3"], "lazy config; overrides are name=value"),
        (["optimizer.lr0=3"], "optimizer.lr0=3"),
        (["run.SOLVER.EMAA=3"], "SOLVER.EMAA"),
    ],
)
def test_overrides_that_do_not_fit_are_named(overrides, message):
    with pytest.raises(ValueError, match=message):
        read_run(str(LAZY / "retinanet_R_18_focal_mini_lvis.py"), overrides)


def test_a_config_without_a_part_is_refused(tmp_path):
    path = tmp_path / "config.py"
    path.write_text("train = dict(max_iter=3)\n")
    with pytest.raises(ValueError, match="lacks model, dataloader, optimizer, lr_multiplier"):
        read_lazy(str(path))
    path.write_text("train = dict(\n")
    with pytest.raises(ValueError, match="syntax"):
        read_lazy(str(path))


def test_ddp_options_of_train_reach_the_model(tmp_path, monkeypatch):
    """What Detectron2's training script passes on; without a GPU the model is on the CPU."""
    cfg, kind = lazy_run(LAZY / "retinanet_R_18_focal_mini_lvis.py", tmp_path)
    assert kind.ddp_options() == {"broadcast_buffers": False}
    kind.lazy.train.ddp = {"find_unused_parameters": True, "fp16_compression": True}
    seen = {}
    monkeypatch.setattr(defaults, "create_ddp_model", lambda model, **o: seen.update(o) or model)
    cfg.MODEL.DEVICE = "cpu"
    kind(cfg)
    assert seen == {
        "broadcast_buffers": False,
        "find_unused_parameters": True,
        "fp16_compression": True,
        "device_ids": None,
    }


def test_a_transformer_without_timm_is_named_before_training(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"ViT \(12 blocks, 768 channels\) needs the package timm"):
        read_run(str(LAZY / "ViTDet/coco_mask_rcnn_vitdet_b.py"))


def test_own_data_are_registered_and_the_evaluator_follows_them(tmp_path):
    lazy = LazyConfig.load(str(LAZY / "retinanet_R_18_focal_mini_lvis.py"))
    use_datasets(lazy.dataloader, train=["a", "b"], test="c")
    lazy.run.DATASETS = {"REGISTER": [["a", "a.json", "images"]]}
    LazyConfig.save(lazy, str(tmp_path / SAVED))
    cfg, _ = read_run(str(tmp_path / SAVED))
    assert cfg.DATASETS.TRAIN == ("a", "b") and cfg.DATASETS.TEST == ("c",)
    assert cfg.DATASETS.REGISTER == [["a", "a.json", "images"]]
    assert "evaluator" not in lazy.dataloader
