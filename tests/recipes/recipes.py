"""A recipe of small stages, what stands in for its trainings, and how it is run."""

import json
from pathlib import Path

import yaml
from PIL import Image

from d2_balance.cli import main as cli
from d2_balance.recipes import stages
from d2_balance.utils.lock import LOCK_FILE

ROOT = Path(__file__).parents[2]
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
    """LVIS style, one or two objects an image."""
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


def recipe(**changes):
    content = {
        "output": "out",
        "datasets": [[f"challenge_{n}", f"{n}.json", "images"] for n in ("train", "val")],
        "stages": [
            {
                "name": "two",
                "kind": "classes",
                "from": "challenge_train",
                "keep": ["often", "rare"],
            },
            {"name": "parts", "kind": "split", "from": "challenge_train", "fraction": 0.4},
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
        Image.new("RGB", (64, 64), (i, 40, 90)).save(f"images/{i}.jpg")
    found["categories"] = [{"id": c["id"], "name": f"a {c['name']}"} for c in found["categories"]]
    Path("more.json").write_text(json.dumps(found))
    Path("map.yaml").write_text("a rare: rare\na often: often\n")
    external = {"NAME": "more", "JSON": "more.json", "IMAGES": "images", "TARGET": "parts_rest"}
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
                "CLASS_COUNTS_FILE": changes.get("counts", "counts.json"),
                "CLS_LOSS": "EQL",
            },
        },
    }
    Path("recipe.yaml").write_text(yaml.safe_dump(content))


def run(*arguments):
    return cli.main(["challenge", "recipe.yaml", *arguments])


class Fakes:
    """Stands in for the training: writes weights or predictions at once."""

    def __init__(self, monkeypatch):
        self.calls, self.fails = [], ""
        monkeypatch.setattr(stages, "_train_process", self)

    def __call__(self, work, *arguments):
        self.calls.append(work.stage.name)
        config = yaml.safe_load(Path(arguments[arguments.index("--config-file") + 1]).read_text())
        if self.fails == work.stage.name:
            Path(work.path("half.json")).write_text("broken")
            raise stages.StageError("the training ended with status 3")
        directory = Path(config["OUTPUT_DIR"])
        (directory / "inference").mkdir(parents=True, exist_ok=True)
        if work.stage.kind == "train":
            (directory / "model_final.pth").write_text("weights")
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
        (directory / f"inference/predictions_{name}.json").write_text(json.dumps(found))


def contents(directory):
    return {
        p: p.read_bytes() for p in Path(directory).rglob("*") if p.is_file() and p.name != LOCK_FILE
    }
