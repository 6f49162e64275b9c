"""Predictions of several processes are written per rank and merged on rank 0."""

import json

import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.structures import Boxes, Instances

from d2_balance.evaluation import LVISGroupEvaluator
from d2_balance.evaluation.files import RankPredictions, atomic_path, file_name_of

from ..two_ranks import joined, start_ranks


def _detect(evaluator, image_id, box):
    instances = Instances((100, 200), pred_boxes=Boxes(torch.tensor([box])))
    instances.scores, instances.pred_classes = torch.tensor([0.9]), torch.tensor([0])
    evaluator.process([{"image_id": image_id}], [{"instances": instances}])


def _work(rank, directory):
    MetadataCatalog.get("two_ranks").set(json_file=f"{directory}/two_ranks.json")
    results = []
    with joined(rank, directory):
        for output_dir in (f"{directory}/out", None):
            evaluator = LVISGroupEvaluator("two_ranks", output_dir=output_dir)
            for _ in range(2):  # the second round must not find the files of the first
                evaluator.reset()
                _detect(evaluator, 1 + rank, [0.0, 10.0, 20.0, 30.0])
                results.append(evaluator.evaluate())
    with open(f"{directory}/rank{rank}.json", "w") as f:
        json.dump(results, f)


def test_two_ranks_give_one_result_on_rank_0(tmp_path):
    images = [{"id": n, "height": 100, "width": 200} for n in (1, 2)]
    annotations = [
        {"id": n, "image_id": n, "category_id": 1, "bbox": [0, 10, 20, 20], "area": 400}
        for n in (1, 2)
    ]
    categories = [{"id": 1, "name": "c", "frequency": "r"}]
    dataset = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "two_ranks.json").write_text(json.dumps(dataset))
    start_ranks(_work, (str(tmp_path),))
    rank0, rank1 = (json.loads((tmp_path / f"rank{n}.json").read_text()) for n in (0, 1))
    assert rank1 == [{}] * 4
    for results in rank0:
        # each rank finds the object of its image; one rank alone would reach 51 of 101
        assert results["bbox"]["AP"] == pytest.approx(100)
        assert results["bbox"]["APr"] == pytest.approx(100)
    saved = json.loads((tmp_path / "out/predictions_two_ranks.json").read_text())
    assert [r["image_id"] for r in saved] == [1, 2]
    assert not (tmp_path / "out/.two_ranks").exists()


def test_rank_files_keep_content_and_order(tmp_path):
    directory = str(tmp_path / "parts")
    first, second = RankPredictions(directory, 0), RankPredictions(directory, 1)
    first.append("a\tb", [{"score": 0.1, "name": "tab\tand\nline"}], True)
    first.append(2, [], False)
    second.append(3, [{"score": 1.0}, {"score": 0.5}], False)
    expected = [
        ("a\tb", True, [{"score": 0.1, "name": "tab\tand\nline"}]),
        (2, False, []),
        (3, False, [{"score": 1.0}, {"score": 0.5}]),
    ]
    assert list(first.heads([0, 1])) == [head[:2] for head in expected]
    first.write_results([0, 1], str(tmp_path / "all.json"))
    merged = json.loads((tmp_path / "all.json").read_text())
    assert merged == [d for _, _, found in expected for d in found]
    first.remove([0, 1])
    assert not (tmp_path / "parts").exists()


def test_a_new_run_empties_what_a_killed_one_left(tmp_path):
    RankPredictions(str(tmp_path), 0).append(1, [{"score": 0.1}], False)
    assert list(RankPredictions(str(tmp_path), 0).heads([0])) == []


def test_a_rank_on_another_file_system_is_named(tmp_path):
    files = RankPredictions(str(tmp_path), 0)
    with pytest.raises(FileNotFoundError, match="rank 1 are missing; .* file system"):
        list(files.heads([0, 1]))


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_path(str(path)) as temporary:
        with open(temporary, "w") as f:
            f.write("half")
        raise RuntimeError
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["table.csv"]


def test_file_names_hold_no_separators():
    assert file_name_of("my/set: 1_val-2.0") == "my_set__1_val-2.0"
