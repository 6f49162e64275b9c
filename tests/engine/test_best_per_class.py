"""TEST.DETECTIONS_PER_CLASS: the best of each class over a test set, found in bounded memory."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.structures import Boxes, Instances

from d2_balance.engine import BalancedTrainer
from d2_balance.engine.best_per_class import best_per_class, check_best_per_class
from d2_balance.evaluation import LVISGroupEvaluator
from d2_balance.evaluation.best_scores import BestScores

from ..conftest import small_cfg
from ..two_ranks import joined, start_ranks
from .conftest import TEST, run_cfg


def best_of(category, score, limit):
    """The least score of the `limit` best of each class; 0 where there are fewer."""
    floors = {}
    for k in np.unique(category).tolist():
        own = np.sort(score[category == k])[::-1]
        floors[k] = float(own[limit - 1]) if len(own) >= limit else 0.0
    return floors


@pytest.mark.parametrize("ranks", [1, 3])
def test_floors_are_the_least_scores_that_count_and_memory_is_bounded(ranks, monkeypatch):
    monkeypatch.setattr("d2_balance.evaluation.best_scores._CHUNK", 50)
    rng = np.random.default_rng(0)
    parts = [BestScores(6, 20) for _ in range(ranks)]
    categories, scores = [], []
    for n in range(300):
        category = rng.integers(0, 5, 7)  # class 5 is never predicted
        score = rng.random(7).astype(np.float32).round(3)
        categories.append(category), scores.append(score)
        kept = parts[n % ranks].add(category, score)
        assert (kept | (score < best_floor(parts[n % ranks], category))).all()
        assert len(parts[n % ranks]._score) <= 6 * 20
    category, score = np.concatenate(categories), np.concatenate(scores)

    join_threads(parts)
    for part in parts:
        assert part.floors[5] == 0
        for k, value in best_of(category, score, 20).items():
            assert part.floors[k] == np.float32(value)


def best_floor(best, category):
    return best.floors[category]


def join_threads(parts):
    """Every part is joined in a thread of its own, as if it were a rank."""
    barrier, sums = threading.Barrier(len(parts)), [0] * len(parts)

    def join(number):
        def total(counts):
            sums[number] = counts
            barrier.wait(60)
            result = sum(sums)
            barrier.wait(60)
            return result

        parts[number].join(total)

    with ThreadPoolExecutor(len(parts)) as pool:
        list(pool.map(join, range(len(parts))))


class Detector(torch.nn.Module):
    """Gives the detections of a table above its thresholds, the best of each image."""

    device, num_classes = torch.device("cpu"), 4

    def __init__(self, table):
        super().__init__()
        self.table, self.test_score_thresh, self.test_topk_per_image = table, 0.0, 3
        self.given = []

    def forward(self, inputs):
        outputs = []
        for image in inputs:
            category, score = (torch.from_numpy(c) for c in self.table[image["image_id"]])
            threshold = torch.as_tensor(self.test_score_thresh, dtype=torch.float32)
            threshold = threshold.expand(4)[category]
            at = (score > threshold).nonzero().squeeze(1)
            at = at[torch.argsort(score[at], descending=True)]
            if self.test_topk_per_image >= 0:
                at = at[: self.test_topk_per_image]
            self.given.append(len(at))
            instances = Instances(
                (50, 50), pred_boxes=Boxes(torch.tensor([[0.0, 0, 9, 9]] * len(at)))
            )
            instances.scores, instances.pred_classes = score[at], category[at]
            outputs.append({"instances": instances})
        return outputs


def make_set(directory, name="best_per_class"):
    images = [
        {"id": n, "height": 50, "width": 50, "neg_category_ids": [1, 2, 3, 4]} for n in range(1, 61)
    ]
    categories = [{"id": k, "name": f"class {k}", "frequency": "r"} for k in range(1, 5)]
    objects = [
        {"id": n, "image_id": n, "category_id": 1 + n % 3, "bbox": [0, 0, 9, 9], "area": 81}
        for n in range(1, 31)
    ]
    for image in images:
        image["not_exhaustive_category_ids"] = []
    path = directory / f"{name}.json"
    path.write_text(
        json.dumps({"images": images, "categories": categories, "annotations": objects})
    )
    MetadataCatalog.get(name).set(json_file=str(path))
    rng = np.random.default_rng(3)
    table = {
        n: (rng.choice(4, 12, p=(0.6, 0.3, 0.09, 0.01)), rng.random(12).astype(np.float32))
        for n in range(1, 61)
    }
    return name, table


def evaluated(name, table, images, directory, limit=10):
    evaluator = LVISGroupEvaluator(
        name, output_dir=str(directory), ap=("fixed",), per_class=limit, keep_per_class=True
    )
    model = Detector(table)
    with best_per_class(model, evaluator, list):
        evaluator.reset()
        for n in images:
            evaluator.process([{"image_id": n}], model([{"image_id": n}]))
        results = evaluator.evaluate()
    assert (model.test_score_thresh, model.test_topk_per_image) == (0.0, 3)
    return results, model


def kept_of(path):
    found = json.loads(path.read_text())
    return {(d["image_id"], d["category_id"], d["score"]) for d in found}


def expected_of(table, limit):
    """The best of each class over all images, a tenth more than the limit."""
    rows = [(n, int(k) + 1, float(s)) for n, cs in table.items() for k, s in zip(*cs, strict=True)]
    kept = set()
    for k in range(1, 5):
        own = sorted((r for r in rows if r[1] == k), key=lambda r: -r[2])
        kept |= set(own[: int(np.ceil(1.1 * limit))])
    return kept


def test_the_best_of_each_class_are_kept_and_the_rest_is_not_even_given(tmp_path, monkeypatch):
    monkeypatch.setattr("d2_balance.evaluation.best_scores._CHUNK", 30)
    name, table = make_set(tmp_path)
    results, model = evaluated(name, table, range(1, 61), tmp_path / "out")
    assert kept_of(tmp_path / f"out/predictions_{name}.json") == expected_of(table, 10)
    # no limit of an image at first, and thresholds that have risen at the end
    assert model.given[0] == 12 and max(model.given[-5:]) < 6
    plain = LVISGroupEvaluator(name, ap=("fixed",), per_class=10, distributed=False)
    everything = Detector(table)
    everything.test_topk_per_image = -1
    plain.reset()
    for n in range(1, 61):
        plain.process([{"image_id": n}], everything([{"image_id": n}]))
    assert results["bbox_fixed"] == pytest.approx(plain.evaluate()["bbox_fixed"], nan_ok=True)


def _work(rank, directory):
    name, table = make_set(Path(directory) / str(rank), "best_of_ranks")
    with joined(rank, directory):
        evaluated(name, table, range(1 + rank, 61, 2), f"{directory}/out")


def test_two_ranks_keep_what_one_would(tmp_path):
    for rank in "01":
        (tmp_path / rank).mkdir()
    start_ranks(_work, (str(tmp_path),))
    _, table = make_set(tmp_path, "best_of_all")
    assert kept_of(tmp_path / "out/predictions_best_of_ranks.json") == expected_of(table, 10)


@pytest.mark.parametrize("kind", ["mask", "cascade", "retinanet", "fcos"])
@pytest.mark.usefixtures("dataset")
def test_models_give_the_best_of_each_class_of_everything_they_see(kind, tmp_path):
    """Thresholds that rise cut nothing else than a cut of all detections afterwards."""
    keys = ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, "MODEL.RETINANET.SCORE_THRESH_TEST", 0.0]
    keys += ["MODEL.FCOS.SCORE_THRESH_TEST", 0.0, "MODEL.RETINANET.TOPK_CANDIDATES_TEST", 100]
    keys += ["MODEL.FCOS.TOPK_CANDIDATES_TEST", 100, "TEST.DETECTIONS_PER_IMAGE", 100000]
    found = {}
    model = None
    for limit in (0, 4):
        cfg = run_cfg(tmp_path / str(limit), *keys, "TEST.DETECTIONS_PER_CLASS", limit, kind=kind)
        if model is None:
            model = BalancedTrainer.build_model(cfg).eval()
            for head in (m for m in model.modules() if hasattr(m, "cls_score")):
                torch.nn.init.normal_(head.cls_score.weight, std=0.1)  # scores that differ
        results = BalancedTrainer.test(cfg, model)
        path = tmp_path / f"{limit}/inference/predictions_{TEST}.json"
        found[limit] = json.loads(path.read_text())
    assert {"bbox_fixed", "bbox_pool"} < set(results)
    assert ("segm_fixed" in results) == (kind == "mask") == ("segmentation" in found[4][0])
    floors = {
        k: sorted((d["score"] for d in found[0] if d["category_id"] == k), reverse=True)[:5][-1]
        for k in {d["category_id"] for d in found[0]}
    }
    every = [d for d in found[0] if d["score"] >= floors[d["category_id"]]]
    key = ("image_id", "category_id", "score")
    assert sorted([[d[k] for k in key] for d in every]) == sorted(
        [[d[k] for k in key] for d in found[4]]
    )
    assert len(found[0]) > len(found[4]) >= 5


def test_what_does_not_go_with_it_is_refused():
    cfg = small_cfg("faster")
    cfg.TEST.DETECTIONS_PER_CLASS = -1
    with pytest.raises(ValueError, match="must be at least 0"):
        check_best_per_class(cfg)
    cfg.TEST.DETECTIONS_PER_CLASS, cfg.TEST.AUG.ENABLED = 10, True
    with pytest.raises(ValueError, match=r"does not work with TEST\.AUG\.ENABLED"):
        check_best_per_class(cfg)
    with (
        pytest.raises(ValueError, match="does not work with the model Linear"),
        best_per_class(torch.nn.Linear(1, 1), None, list),
    ):
        pass
