"""Remedies that change nothing on the data are named, and those that do are not."""

import re

import pytest
import torch
from detectron2.modeling import build_model

from d2_balance.data.class_counts import ClassCounts
from d2_balance.modeling.inert import inert_remedies

from ..conftest import CLASSES, small_cfg

BALANCE = "MODEL.BALANCE."


def counts_of(tmp_path, images, total=1000):

    path = str(tmp_path / "counts.json")
    counts = torch.tensor(images)
    ClassCounts(counts, counts * 2, total, tuple("abcdef")).save(path)
    return path


def sentences(path, *overrides, kind="faster"):
    cfg = small_cfg(kind, BALANCE + "CLASS_COUNTS_FILE", path, *overrides)
    return inert_remedies(cfg, build_model(cfg))


LONG_TAIL, EVEN = [400, 120, 40, 8, 2, 1], [100] * CLASSES


@pytest.mark.parametrize(
    ("images", "overrides", "text"),
    [
        (EVEN, [BALANCE + "CLS_LOSS", "EQL"], "EQL: no class is below .*0.00177; the .*10.00%"),
        (EVEN, [BALANCE + "CLS_LOSS", "DropLoss"], "DropLoss: no class is below"),
        (EVEN, [BALANCE + "CLS_LOSS", "SoftmaxEQL"], "SoftmaxEQL: no class is below"),
        (EVEN, [BALANCE + "CLS_LOSS", "BAGS"], "BAGS: .*CUTS puts all classes into one group"),
        (LONG_TAIL, [BALANCE + "CLS_LOSS", "Federated"], "Federated: .*SAMPLED 50 is not"),
        (EVEN, [BALANCE + "CLS_LOSS", "BalancedSoftmax"], "BalancedSoftmax: .*no logit is shifted"),
        (EVEN, [BALANCE + "CLS_LOSS", "LogitAdjusted"], "LogitAdjusted: .*no logit is shifted"),
        (
            EVEN,
            ["DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler",
             "DATALOADER.REPEAT_THRESHOLD", "0.05"],
            "RepeatFactorTrainingSampler: .*THRESHOLD 0.05; .*10.00%. No image is repeated",
        ),
        (
            LONG_TAIL,
            [BALANCE + "PROPOSAL_SAMPLER", "OHEM", BALANCE + "OHEM.ROIS_PER_IMAGE", "40"],
            "OHEM: .*ROIS_PER_IMAGE 40 is not below .*TRAIN 40; no proposal is left out",
        ),
        (
            LONG_TAIL,
            [BALANCE + "BETA_DECAY.ENABLED", "True", "SOLVER.MAX_ITER", "10000"],
            "BETA_DECAY: AMOUNT is 0.01, PERIOD 10000 and .*MAX_ITER 10000; beta never falls",
        ),
        (
            EVEN,
            ["DATALOADER.COPY_PASTE.ENABLED", "True", "DATALOADER.COPY_PASTE.THRESHOLD", "0.05"],
            "COPY_PASTE: no class .* THRESHOLD 0.05; the rarest is in 10.00%. Nothing is pasted",
        ),
        (EVEN, [BALANCE + "NORCAL.GAMMA", "0.6"], "NORCAL: all classes are equally frequent"),
    ],
)  # fmt: skip
def test_what_changes_nothing_is_named_once(tmp_path, images, overrides, text):

    (sentence,) = sentences(counts_of(tmp_path, images), *overrides)
    assert re.search(text, sentence), sentence


@pytest.mark.parametrize(
    "overrides",
    [
        [BALANCE + "CLS_LOSS", "EQL"],
        [BALANCE + "CLS_LOSS", "BAGS"],
        [BALANCE + "CLS_LOSS", "Federated", BALANCE + "FEDERATED.NUM_SAMPLED", "3"],
        [BALANCE + "CLS_LOSS", "BalancedSoftmax"],
        [BALANCE + "CLS_LOSS", "GHMC"],
        [BALANCE + "PROPOSAL_SAMPLER", "OHEM", BALANCE + "OHEM.ROIS_PER_IMAGE", "39"],
        [BALANCE + "BETA_DECAY.ENABLED", "True", "SOLVER.MAX_ITER", "10001"],
        [BALANCE + "NORCAL.GAMMA", "0.6"],
        ["DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler",
         "DATALOADER.REPEAT_THRESHOLD", "0.05"],
        [],
    ],
)  # fmt: skip
def test_what_changes_something_is_not(tmp_path, overrides):
    assert sentences(counts_of(tmp_path, LONG_TAIL), *overrides) == []


def test_every_stage_of_a_cascade_is_named_once(tmp_path):
    path = counts_of(tmp_path, EVEN)
    assert len(sentences(path, BALANCE + "CLS_LOSS", "EQL", kind="cascade")) == 1
