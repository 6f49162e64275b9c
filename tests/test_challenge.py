"""`d2-balance challenge`: refused recipes, resume between and inside stages, the report."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from d2_balance import cli
from d2_balance.challenge import class_maps, stages
from d2_balance.challenge.datasets import DataSets, keep_classes, split
from d2_balance.challenge.recipe import Recipe
from d2_balance.challenge.training import check_config, read_training_config
from d2_balance.data import register_json
from d2_balance.data.class_map import load_class_map
from d2_balance.data.metadata import target_categories
from d2_balance.engine.lock import LOCK_FILE
from d2_balance.engine.train_stream import check_weights_of_sets
from tests.conftest import FASTER

ROOT = Path(__file__).parents[1]
NAMES = ["rare", "common", "often", "other"]
SMALL = """
  DEVICE: cpu
  WEIGHTS: ""
INPUT: {MIN_SIZE_TRAIN: [64], MIN_SIZE_TEST: 64}
DATALOADER: {NUM_WORKERS: 0}
SOLVER: {IMS_PER_BATCH: 2, MAX_ITER: 6, STEPS: [], WARMUP_ITERS: 2, CHECKPOINT_PERIOD: 1}
TEST: {DETECTIONS_PER_IMAGE: 20}
SEED: 3
VERSION: 2
"""


def annotations(first, count):
    """LVIS style, one or two objects a picture."""
    images, objects = [], []
    for i in range(first, first + count):
        images.append(
            {"id": i, "width": 64, "height": 64, "file_name": f"{i}.jpg"}
            | {"neg_category_ids": [1, 2, 3, 4], "not_exhaustive_category_ids": []}
        )
        for category in {3, 1 + i % 4}:
            box = [4 * category, 6, 24, 30]
            objects.append(
                {"id": len(objects) + 1, "image_id": i, "category_id": category, "bbox": box}
                | {"area": 720, "iscrowd": 0}
            )
    categories = [
        {"id": n, "name": name, "frequency": "rcff"[n - 1], "image_count": 10**n}
        for n, name in enumerate(NAMES, start=1)
    ]
    return {"images": images, "annotations": objects, "categories": categories}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    for name, first, count in (("train", 1, 10), ("val", 101, 4)):
        (tmp_path / f"{name}.json").write_text(json.dumps(annotations(first, count)))
        for i in range(first, first + count):
            Image.new("RGB", (64, 64), (i, 90, 200 - i)).save(tmp_path / f"pictures/{i}.jpg")
    model = FASTER.replace("META_ARCHITECTURE: GeneralizedRCNN", "META_ARCHITECTURE: BalancedRCNN")
    model = model.replace("StandardROIHeads", "BalancedStandardROIHeads")
    model = model.replace(
        "BATCH_SIZE_PER_IMAGE: 24",
        "BATCH_SIZE_PER_IMAGE: 24, SCORE_THRESH_TEST: 0.0, NUM_CLASSES: 4",
    )
    (tmp_path / "small.yaml").write_text(model.rstrip() + SMALL)
    return tmp_path


def recipe(**changes):
    content = {
        "output": "out",
        "datasets": [[f"challenge_{n}", f"{n}.json", "pictures"] for n in ("train", "val")],
        "stages": [
            {
                "name": "two",
                "kind": "classes",
                "from": "challenge_train",
                "keep": ["often", "rare"],
            },
            {"name": "parts", "kind": "split", "from": "challenge_train", "share": 0.4},
            {
                "name": "expert",
                "kind": "train",
                "config": "small.yaml",
                "train": ["two"],
                "overrides": {"MODEL": {"ROI_HEADS": {"NUM_CLASSES": 2}}},
            },
            {
                "name": "model",
                "kind": "train",
                "config": "small.yaml",
                "weights": "expert",
                "train": ["parts_rest"],
                "test": ["challenge_val"],
            },
            {"name": "held", "kind": "predict", "model": "model", "dataset": "parts_held"},
            {
                "name": "val",
                "kind": "predict",
                "model": "model",
                "dataset": "challenge_val",
                "overrides": {"TEST": {"AUG": {"ENABLED": True, "MIN_SIZES": [48, 64]}}},
            },
            {
                "name": "expert_val",
                "kind": "predict",
                "model": "expert",
                "dataset": "challenge_val",
                "classes": "two",
            },
            {
                "name": "merged",
                "kind": "ensemble",
                "dataset": "challenge_val",
                "inputs": [
                    {"predictions": "val"},
                    {"predictions": "expert_val", "classes": "two"},
                ],
            },
            {
                "name": "factors",
                "kind": "fit",
                "predictions": "held",
                "dataset": "parts_held",
                "test": ["challenge_val"],
                "max_dets": 2,
            },
            {
                "name": "rescored",
                "kind": "rescore",
                "predictions": "merged",
                "factors": "factors",
                "dataset": "challenge_val",
                "max_dets": 2,
            },
            {"name": "again", "kind": "evaluate", "predictions": "val", "dataset": "challenge_val"},
        ],
    }
    content |= changes
    Path("recipe.yaml").write_text(yaml.safe_dump(content))
    return content


def with_second_files(content, **changes):
    """Ignore regions, an external set and counts for the second training, as in the real recipe."""
    counts = [{"name": n, "image_count": 4, "instance_count": 5} for n in NAMES]
    Path("counts.json").write_text(json.dumps({"num_images": 10, "classes": counts}))
    found = annotations(201, 6)
    for i in range(201, 207):
        Image.new("RGB", (64, 64), (i, 40, 90)).save(f"pictures/{i}.jpg")
    found["categories"] = [{"id": c["id"], "name": f"a {c['name']}"} for c in found["categories"]]
    Path("more.json").write_text(json.dumps(found))
    Path("map.yaml").write_text("a rare: rare\na often: often\n")
    external = {"NAME": "more", "JSON": "more.json", "IMAGES": "pictures", "TARGET": "parts_rest"}
    content["stages"][3]["train"] = ["parts_rest", "more"]
    content["stages"][3]["overrides"] = {
        "DATASETS": {
            "IGNORE_REGIONS": [["parts_rest", changes.get("regions", "train.json")]],
            "EXTERNAL": [external | {"CLASS_MAP": "map.yaml"} | changes.get("external", {})],
            "TRAIN_REPEAT_FACTOR": [["more", 1.0]],
        },
        "DATALOADER": {
            "SAMPLER_TRAIN": "WeightedRepeatFactorTrainingSampler",
            "REPEAT_THRESHOLD": 0.5,
        },
        "MODEL": {
            "PROPOSAL_GENERATOR": {"NAME": "BalancedRPN"},
            "BALANCE": {
                "CLASS_STATISTICS": changes.get("counts", "counts.json"),
                "CLS_LOSS": "EQL",
            },
        },
    }
    Path("recipe.yaml").write_text(yaml.safe_dump(content))


def run(*arguments):
    return cli.main(["challenge", "recipe.yaml", *arguments])


# ---- what stages do, with training and prediction replaced


class Fakes:
    """Stands in for train_net.py: writes weights or predictions at once."""

    def __init__(self, monkeypatch):
        self.calls, self.fails = [], ""
        monkeypatch.setattr(stages, "_train_net", self)

    def __call__(self, work, *arguments):
        self.calls.append(work.stage.name)
        config = yaml.safe_load(Path(arguments[arguments.index("--config-file") + 1]).read_text())
        if self.fails == work.stage.name:
            Path(work.path("half.json")).write_text("broken")
            raise stages.StageError("train_net.py ended with status 3")
        folder = Path(config["OUTPUT_DIR"])
        (folder / "inference").mkdir(parents=True, exist_ok=True)
        if work.stage.kind == "train":
            (folder / "model_final.pth").write_text("weights")
            return
        name = config["DATASETS"]["TEST"][0]
        file = next(e[1] for e in config["DATASETS"]["REGISTER"] if e[0] == name)
        truth = json.loads(Path(file).read_text())
        found = [
            {"image_id": i["id"], "category_id": c["id"], "score": 0.9 / (n + 2)}
            | {"bbox": [4 * c["id"], 6, 24, 30]}
            for i in truth["images"]
            for n, c in enumerate(truth["categories"])
        ]
        (folder / f"inference/predictions_{name}.json").write_text(json.dumps(found))


@pytest.fixture
def fakes(folder, monkeypatch):
    return Fakes(monkeypatch)


def contents(folder):
    return {
        p: p.read_bytes() for p in Path(folder).rglob("*") if p.is_file() and p.name != LOCK_FILE
    }


def test_all_stages_run_and_the_report_has_each(folder, fakes, capsys):
    recipe()
    assert run() == 0
    assert fakes.calls == ["expert", "model", "held", "val", "expert_val"]
    text = (folder / "out/report.md").read_text()
    assert "11 of 11 stages" in text and (folder / "out/report.html").stat().st_size > 1000
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if "|" in line}
    head = [cell.strip() for cell in rows["stage"].split("|")]
    assert [c for c in head if "box" in c] == [
        f"box {m}" for m in ("AP", "AP50", "APr", "APc", "APf")
    ]
    values = dict(zip(head, (c.strip() for c in rows["val"].split("|")), strict=True))
    assert values["evaluated on"] == "challenge_val" and float(values["box APf"]) > 50
    merged = json.loads((folder / "out/merged/predictions.json").read_text())
    assert len(merged) == 4 * 4  # the expert's two classes join the model's four
    assert len(json.loads((folder / "out/rescored/predictions.json").read_text())) == 4 * 2
    config = yaml.safe_load((folder / "out/model/config.yaml").read_text())
    assert config["MODEL"]["WEIGHTS"] == str(folder / "out/expert/run/model_final.pth")
    two = json.loads((folder / "out/two/annotations.json").read_text())
    assert [c["name"] for c in two["categories"]] == ["rare", "often"]


@pytest.mark.parametrize("stage", ["expert", "model", "val"])
def test_a_run_goes_on_behind_the_stage_that_failed(folder, fakes, capsys, stage):
    recipe()
    fakes.fails = stage
    assert run() == 1
    assert f"stage {stage}: train_net.py ended with status 3" in capsys.readouterr().err
    before = contents("out")
    assert not (folder / f"out/{stage}/done.json").exists()
    assert "not done" in (folder / "out/report.md").read_text()
    fakes.fails, fakes.calls = "", []
    assert run("--resume") == 0
    assert (
        fakes.calls
        == (["expert", "model", "held", "val", "expert_val"])[
            ["expert", "model", "held", "val"].index(stage) :
        ]
    )
    after = contents("out")
    changed = {str(p.relative_to("out")) for p, text in before.items() if after.get(p) != text}
    # what a failed stage left is gone or its own; outputs of the others are as they were
    assert all(p.startswith(("report", "logs", f".{stage}", f"{stage}/")) for p in changed)
    assert not list(Path("out").glob(".*.partial"))


def test_a_finished_run_does_nothing(folder, fakes):
    recipe()
    assert run() == 0
    before, fakes.calls = contents("out"), []
    assert run("--resume") == 0 and fakes.calls == [] and contents("out") == before


def test_a_folder_that_is_not_empty_needs_resume(folder, fakes, capsys):
    recipe()
    (folder / "out").mkdir()
    (folder / "out/mine.txt").write_text("x")
    assert run() == 2
    assert "out is not empty, and nothing is overwritten: pass --resume" in capsys.readouterr().err
    assert list((folder / "out").iterdir()) == [folder / "out/mine.txt"]


def test_two_runs_do_not_share_a_folder(folder, fakes, capsys):
    recipe()
    (folder / "out").mkdir()
    code = (
        "import fcntl, sys; f = open('out/.lock', 'w'); fcntl.lockf(f, fcntl.LOCK_EX); "
        "print('held', flush=True); sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as other:
        assert other.stdout.readline() == "held\n"
        assert run() == 2
        other.stdin.close()
    assert "is being written by another run" in capsys.readouterr().err and fakes.calls == []
    assert run() == 0


def remove(path):
    subprocess.run(["rm", "-r", path], check=True)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda: remove("out/expert"), "stage expert is missing in .*out, and stage model, which"),
        (lambda: remove("out/val/predictions.json"), "stage val is done, but its predictions.json"),
        (lambda: remove("out/model/run"), "stage model is done, but its run/model_final.pth is"),
    ],
)
def test_what_is_missing_on_resume_is_named(folder, fakes, capsys, spoil, message):
    recipe()
    assert run() == 0
    spoil()
    fakes.calls = []
    assert run("--resume") == 2 and fakes.calls == []
    assert re.search(message, capsys.readouterr().err)


def test_other_settings_are_not_mixed_with_what_is_done(folder, fakes, capsys):
    content = recipe()
    assert run() == 0
    content["stages"][8]["max_dets"] = 3
    Path("recipe.yaml").write_text(yaml.safe_dump(content))
    assert run("--resume") == 2
    error = capsys.readouterr().err
    assert re.search(r"stage factors in .*out was made with other settings \(max_dets\)", error)
    remove("out/factors")
    assert run("--resume") == 2  # made from the old factors
    assert "stage rescored, which is done, was made from it" in capsys.readouterr().err
    remove("out/rescored")
    assert run("--resume") == 0
    recipe()
    (folder / "small.yaml").write_text((folder / "small.yaml").read_text() + "\nOUTPUT_DIR: x\n")
    assert run("--resume") == 2


@pytest.mark.parametrize(
    "place, value, message",
    [
        ((0, "kind"), "clases", "kind 'clases' is unknown; did you mean classes"),
        ((0, "name"), "a b", "a name has letters, digits"),
        ((1, "name"), "two", "another stage has this name"),
        ((1, "shar"), 1, "unknown field 'shar'; did you mean share"),
        ((1, "share"), None, "split needs share"),
        ((2, "config"), "gone.yaml", "config 'gone.yaml' does not exist in"),
        ((2, "train"), ["nothing"], "stage expert: the data set 'nothing' is neither registered"),
        ((2, "overrides"), {"SOLVER": {"MAX": 1}}, "stage expert: overrides: .*SOLVER.MAX"),
        ((4, "model"), "modell", "held.: model: 'modell' is no stage of kind train before this"),
        ((7, "inputs"), [{"predictions": "model"}], r"inputs\[0\]: 'model' is no stage of kind"),
        ((8, "dataset"), "challenge_val", "is challenge_val|which is evaluated on"),
        ((9, "factors"), "merged", "factors: 'merged' is no stage of kind fit"),
    ],
)
def test_recipes_that_cannot_work_are_refused(folder, fakes, capsys, place, value, message):
    content = recipe()
    content["stages"][place[0]][place[1]] = value
    Path("recipe.yaml").write_text(yaml.safe_dump(content))
    status = run()
    error = capsys.readouterr().err
    assert status in (1, 2) and re.search(message, error), error
    if status == 2:
        assert not os.path.exists("out")


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"regions": "gone.json"},
            r"IGNORE_REGIONS\[0\]: the annotation file 'gone.json' does not",
        ),
        ({"external": {"JSON": "gone.json"}}, r"EXTERNAL\[0\]: the annotation file 'gone.json'"),
        ({"external": {"CLASS_MAP": "gone.yaml"}}, r"EXTERNAL\[0\]: the class map 'gone.yaml'"),
        ({"external": {"TARGET": "parts"}}, r"EXTERNAL\[0\]: TARGET 'parts' is no data set of the"),
        ({"external": {"NAME": "mor"}}, "the data set 'more' is neither registered"),
        ({"counts": "gone.json"}, "CLASS_STATISTICS: the file 'gone.json' does not exist"),
    ],
)
def test_second_files_are_looked_for_before_the_first_stage(
    folder, fakes, capsys, changes, message
):
    with_second_files(recipe(), **changes)
    assert run() == 2 and fakes.calls == [] and not os.path.exists("out")
    assert re.search(f"recipe.yaml: stage model: .*{message}", capsys.readouterr().err)
    with_second_files(recipe())
    assert run() == 0


def with_maps(content):
    """Class maps for the external set, for ignore regions, and for both inputs of an ensemble."""
    with_second_files(content)
    Path("regions.yaml").write_text("rare: rare\nother: null\n")
    content["stages"][3]["overrides"]["DATASETS"]["IGNORE_REGIONS"][0].append("regions.yaml")
    Path("two.yaml").write_text("often: often\nrare: common\n")
    content["stages"][7]["inputs"][1]["map"] = "two.yaml"
    Path("recipe.yaml").write_text(yaml.safe_dump(content))


@pytest.mark.parametrize(
    "file, text, message",
    [
        (
            "map.yaml",
            "a rar: rare",
            r"model: DATASETS.EXTERNAL\[0\]: .*map.yaml: 'a rar': .*more.json",
        ),
        (
            "map.yaml",
            "a rare: rar",
            r"model: .*'a rare': parts_rest has no class 'rar'; did you me",
        ),
        ("map.yaml", "- rare", r"model: .*map.yaml: a class map has lines 'source class: target"),
        (
            "regions.yaml",
            "oftn: rare",
            r"model: DATASETS.IGNORE_REGIONS\[0\]: .*regions.yaml: 'oftn",
        ),
        (
            "regions.yaml",
            "rare: frequent",
            r"model: .*regions.yaml: 'rare': parts_rest has no class 'frequ",
        ),
        # the expert knows two of the classes
        ("two.yaml", "other: rare", r"merged: inputs\[1\]: .*two.yaml: 'other': two has no class"),
        ("two.yaml", "often: oft", r"merged: inputs\[1\]: .*'often': challenge_val has no class"),
    ],
)
def test_class_maps_are_checked_before_the_first_stage(folder, fakes, capsys, file, text, message):
    with_maps(recipe())
    Path(file).write_text(text + "\n")
    assert run() == 2 and fakes.calls == [] and not os.path.exists("out")
    assert re.search(f"recipe.yaml: stage {message}", capsys.readouterr().err)


def test_class_maps_of_classes_that_are_not_known_yet_are_left_to_their_stage(
    folder, fakes, monkeypatch
):
    with_maps(recipe())
    monkeypatch.setattr(DataSets, "file", lambda self, name: None)
    Path("two.yaml").write_text("other: rare\n")
    assert run() == 1
    assert fakes.calls == ["expert", "model", "held", "val", "expert_val"]


def test_classes_are_known_of_files_and_of_what_stages_make_of_them(folder):
    recipe()
    found = Recipe.read("recipe.yaml")
    lists = class_maps.ClassLists(found, DataSets(found.datasets))
    register_json("challenge_known", "train.json", "pictures")
    try:
        for name in ("challenge_train", "challenge_known", "parts_rest", "parts_held"):
            assert [c["name"] for c in lists.of_set(name)] == NAMES
        assert [c["name"] for c in lists.of_set("challenge_known", trains=True)] == NAMES
        assert [c["name"] for c in lists.of_set("two")] == ["rare", "often"]
        os.remove("train.json")
        assert lists.of_set("challenge_known") is None
    finally:
        DatasetCatalog.remove("challenge_known")
        MetadataCatalog.remove("challenge_known")
    assert lists.of_set("nothing") is None


def test_maps_of_finished_stages_are_not_read_again(folder, fakes, monkeypatch):
    with_maps(recipe())
    assert run() == 0
    monkeypatch.setattr(class_maps, "read_class_map", None)
    assert run("--resume") == 0


@pytest.mark.parametrize("name", sorted(p.name for p in ROOT.glob("configs/recipes/*.yaml")))
def test_recipes_name_configs_and_keys_that_exist(name):
    found = Recipe.read(str(ROOT / "configs/recipes" / name))
    texts = [check_config(stage, found) for stage in found.stages if stage.kind == "train"]
    assert len(texts) >= 2
    kinds = {stage.kind for stage in found.stages}
    assert {"train", "predict", "ensemble", "fit", "rescore"} <= kinds


def test_the_recipe_of_2019_has_what_the_authors_describe():
    found = Recipe.read(str(ROOT / "configs/recipes/lvis_v0.5_2019.yaml"))
    stage = next(s for s in found.stages if s.name == "lvis_model")
    cfg = read_training_config(stage, found)
    node = cfg.MODEL.RESNETS
    assert (node.DEPTH, node.NUM_GROUPS, node.WIDTH_PER_GROUP) == (101, 64, 4)
    assert node.DEFORM_ON_PER_STAGE == [False, True, True, True] and node.NORM == "SyncBN"
    assert cfg.MODEL.BALANCE.CLS_LOSS == "EQL" and "RepeatFactor" in cfg.DATALOADER.SAMPLER_TRAIN
    # what ignores regions, and trains boxes that have no mask
    assert cfg.MODEL.PROPOSAL_GENERATOR.NAME == "BalancedRPN"
    assert cfg.MODEL.ROI_HEADS.NAME == "BalancedStandardROIHeads"
    (regions,), (external,) = cfg.DATASETS.IGNORE_REGIONS, cfg.DATASETS.EXTERNAL
    assert regions[0] == external["TARGET"] == "lvis_rest"
    assert list(cfg.DATASETS.TRAIN) == ["lvis_rest", external["NAME"]]
    check_weights_of_sets(cfg)
    # the class map fits both sides
    files = {ROOT / regions[2]}
    for other in found.stages:
        for entry in other["inputs"] or []:
            if entry.get("classes") == "coco_2017_val":
                files.add((ROOT / "configs/recipes" / entry["map"]).resolve())
    (file,) = files
    classes = load_class_map(
        str(file), target_categories("coco_2017_val"), target_categories("lvis_v0.5_train")
    )
    assert len(classes.matched) == 78 and classes.left_out == ["hot dog", "oven"]
    assert ("tv", "television_set") in classes.matched


# ---- derived data sets


def test_classes_that_are_left_out_leave_no_trace():
    data = annotations(1, 8)
    found = keep_classes(data, None, [2, 1], "x")
    assert [c["name"] for c in found["categories"]] == ["common", "other"]
    assert {a["category_id"] for a in found["annotations"]} == {2, 4}
    assert {i["id"] for i in found["images"]} == {a["image_id"] for a in found["annotations"]}
    assert all(set(i["neg_category_ids"]) <= {2, 4} for i in found["images"])
    with pytest.raises(ValueError, match="'oftn'.*did you mean 'often'"):
        keep_classes(data, ["oftn"], None, "x")
    with pytest.raises(ValueError, match="give keep"):
        keep_classes(data, None, None, "x")


def test_a_split_has_each_picture_once():
    data = annotations(1, 20)
    rest, held = split(data, 0.25, 0)
    ids = [{i["id"] for i in part["images"]} for part in (rest, held)]
    assert len(ids[1]) == 5 and not ids[0] & ids[1] and ids[0] | ids[1] == set(range(1, 21))
    for part, own in zip((rest, held), ids, strict=True):
        assert {a["image_id"] for a in part["annotations"]} == own
    assert split(data, 0.25, 0)[1] == held != split(data, 0.25, 1)[1]
    with pytest.raises(ValueError, match="share is 1"):
        split(data, 1, 0)
    with pytest.raises(ValueError, match="leaves a part empty"):
        split(data, 0.01, 0)


# ---- the real thing


def start(*arguments):
    command = [sys.executable, "-m", "d2_balance.cli", "challenge", "recipe.yaml", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.slow
def test_a_killed_run_goes_on_inside_a_training(folder):
    content = recipe()
    content["stages"][2]["overrides"]["SOLVER"] = {"MAX_ITER": 2}
    with_second_files(content)
    content["stages"][3]["overrides"]["SOLVER"] = {"MAX_ITER": 40, "CHECKPOINT_PERIOD": 2}
    Path("recipe.yaml").write_text(yaml.safe_dump(content))
    process = start()
    checkpoint = folder / "out/model/run/last_checkpoint"
    for _ in range(3000):
        if checkpoint.exists() or process.poll() is not None:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    printed = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signal.SIGTERM, printed
    assert not (folder / "out/model/done.json").exists()
    before = contents("out/expert")
    process = start("--resume")
    printed = process.communicate(timeout=500)[0]
    assert process.returncode == 0, printed
    assert "expert (train): done before" in printed
    log = (folder / "out/logs/model.log").read_text()
    resumed = [int(n) for n in re.findall(r"Starting training from iteration (\d+)", log)]
    assert resumed[0] == 0 and 0 < resumed[1] < 40
    assert "ignore regions from" in log and "2 classes of more are classes of parts_rest" in log
    assert contents("out/expert") == before
    assert "11 of 11 stages" in (folder / "out/report.md").read_text()
