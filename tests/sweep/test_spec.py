"""Sweep files: what they may say, and what each mistake is told."""

import pytest
import yaml

from d2_balance import get_config_file
from d2_balance.sweep.checks import check_remedies
from d2_balance.sweep.spec import Remedy, read_sweep, with_suggestions


def write(tmp_path, text):
    (tmp_path / "base.yaml").write_text("VERSION: 2\n")
    path = tmp_path / "sweep.yaml"
    path.write_text(text)
    return str(path)


def test_names_become_fragments_and_the_baseline_comes_first(tmp_path):
    text = "base: base.yaml\nremedies: [EQL, CARL, OHEM, GIoU, RepeatFactorTrainingSampler]\n"
    spec = read_sweep(write(tmp_path, text))
    assert spec.remedies[0].name == "baseline" and spec.seeds == (1, 2, 3)
    balance = {r.name: r.fragment.get("MODEL", {}).get("BALANCE") for r in spec.remedies}
    assert balance["EQL"] == {"CLS_LOSS": "EQL"} and balance["CARL"] == {"REWEIGHTERS": ["CARL"]}
    assert balance["OHEM"] == {"PROPOSAL_SAMPLER": "OHEM"}
    assert balance["GIoU"] == {"BOX_LOSS": "GIoU"}
    sampler = spec.remedy("RepeatFactorTrainingSampler").fragment
    assert sampler == {"DATALOADER": {"SAMPLER_TRAIN": "RepeatFactorTrainingSampler"}}


def test_configs_merge_overrides_then_the_remedy(tmp_path):
    text = (
        "base: base.yaml\noverrides: {SOLVER: {MAX_ITER: 9, BASE_LR: 1}}\n"
        "remedies: {fast: {SOLVER: {BASE_LR: 2}}}\nseeds: [7]\n"
    )
    spec = read_sweep(write(tmp_path, text))
    config = spec.config("fast", 7, "out")
    assert config["SOLVER"] == {"MAX_ITER": 9, "BASE_LR": 2}
    assert config["SEED"] == 7 and config["OUTPUT_DIR"] == "out"
    assert config["_BASE_"] == str(tmp_path / "base.yaml")
    assert spec.config("baseline", 7, "out")["SOLVER"]["BASE_LR"] == 1


def test_suggestions_take_the_place_of_the_word(tmp_path):
    spec = read_sweep(write(tmp_path, "base: base.yaml\nremedies: [EQL, suggested]\n"))
    found = with_suggestions(spec, [Remedy("EQL", {}), Remedy("rfs", {"A": 1}, "tail")])
    assert [r.name for r in found.remedies] == ["baseline", "EQL", "rfs"]


GOOD = "base: base.yaml\nremedies: [EQL]\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "must be a mapping"),
        ("remedies: [EQL]\n", "base is missing"),
        ("base: base.yaml\n", "remedies is missing"),
        (GOOD + "sedes: [1]\n", "unknown field 'sedes'.*seeds"),
        ("base: base.yaml\nremedies: [EQLL]\n", "'EQLL' is unknown.*EQL"),
        ("base: base.yaml\nremedies: [3]\n", "3 must be a name"),
        ("base: base.yaml\nremedies: [EQL, EQL]\n", "EQL stands there twice"),
        ("base: base.yaml\nremedies: [{a/b: {}}]\n", "names a directory"),
        (GOOD + "seeds: [1, 1]\n", "seeds is .* different integers"),
        (GOOD + "seeds: []\n", "seeds is"),
        (GOOD + "metric: AP\n", "metric is 'AP'; must be a task and a figure"),
        (GOOD + "reference: Focal\n", "reference is 'Focal'; must be one of baseline, EQL"),
        (GOOD + "cuts: [3]\n", "cuts is"),
        (GOOD + "overrides: [1]\n", "overrides is .*; must be a mapping"),
        (GOOD + "early_stopping: {first: 2}\n", r"must be .* first, a number in \(0, 1\)"),
        (GOOD + "early_stopping: {reduction_factor: 1}\n", "integer of at least 2"),
        ("base: [\n", "sweep.yaml: "),
    ],
)
def test_mistakes_name_the_file_the_field_and_what_it_must_be(tmp_path, text, message):
    with pytest.raises(ValueError, match=message) as error:
        read_sweep(write(tmp_path, text))
    assert "sweep.yaml" in str(error.value)


def test_remedies_that_do_not_fit_are_listed_together_under_their_reason(tmp_path):
    base = get_config_file("quick_schedules/faster_rcnn_R_18_softmax_mini_lvis.yaml")
    path = tmp_path / "sweep.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "base": base,
                "overrides": {"MODEL": {"WEIGHTS": "missing.pth"}},
                "remedies": ["Seesaw", "BAGS"],
            }
        )
    )
    with pytest.raises(ValueError, match="3 of 3 remedies do not fit") as raised:
        check_remedies(read_sweep(str(path)))
    (line,) = str(raised.value).splitlines()[1:]
    assert line.startswith("- baseline, Seesaw, BAGS: MODEL.WEIGHTS: the file 'missing.pth'")
