"""benchmarks/README.md takes the figures of the benchmarks, and names every loss and target."""

import json
from pathlib import Path

import pytest

from benchmarks import performance_page
from d2_balance.losses import CLS_LOSSES

PAGE = Path(__file__).parents[1] / "benchmarks/README.md"


@pytest.fixture
def directory(tmp_path):
    """What the benchmarks write, with figures that say where they belong."""
    shapes = [f"dense 100,000 x 80, {count} positive" for count in performance_page.POSITIVES]
    shapes += ["dense 10,000 x 80, 100 positive", "RoI 1,024 x 80, 256 positive"]
    rows = [
        {"shape": shape, "loss": loss, "ms": 7.0, "times plain": 10.0 * number + place}
        | {"copies": 12.4, "extra memory": -1.0 + place}
        for number, loss in enumerate(performance_page.TARGETS)
        for place, shape in enumerate(shapes)
    ]
    rows.append({"shape": "RoI 20 images x 512, 9 positive", "loss": "ISR", "ms": 1.0})
    about = {"device": "a machine", "threads": 2}
    losses = {"about": about, "rows": rows, "peers": [{"loss": "GHMC", "times faster": 4.5}]}
    losses["gradients"] = [{"head": "dense", "loss": "DR", "gradient in R": 0.5}]
    (tmp_path / "losses.json").write_text(json.dumps(losses))
    train = {"about": about, "rows": [{"model": "RetinaNet", "method": "GHMC", "stock": 0.25}]}
    (tmp_path / "train.json").write_text(json.dumps(train))
    for head in ("dense", "roi"):
        (tmp_path / f"growth_{head}.png").write_bytes(head.encode())
    return tmp_path


def write(directory, monkeypatch):
    page = directory / "page/README.md"
    page.parent.mkdir(exist_ok=True)
    page.write_text(PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["performance_page.py", str(directory), "--page", str(page)])
    performance_page.main()
    return page


def test_figures_come_into_the_page(directory, monkeypatch):
    page = write(directory, monkeypatch)
    lines = page.read_text(encoding="utf-8").splitlines()
    names = list(performance_page.TARGETS)
    focal, ap = 10 * names.index("Focal"), 10 * names.index("AP")
    assert f"| `Focal` | {focal}.00 | 1.60 | {focal + 1}.00 | 1.60 | 7.00 | 12 | 0.00 |" in lines
    assert f"| `AP` | {ap}.00 | 5.00 | {ap + 1}.00 | 6.00 | 7.00 | 12 | 0.00 |" in lines
    # by shape, small ones first; what weights rows has no line
    assert f"| `Focal` | {focal + 2}.00 | {focal}.00 | {focal + 1}.00 |" in lines
    assert f"| `Focal` | {focal + 3}.00 |" in lines and not any("`ISR`" in line for line in lines)
    assert "device a machine, threads 2" in lines and "| GHMC | 4.50 |" in lines
    assert "| dense | `DR` | 0.50 |" in lines
    assert (page.parent / "growth_roi.png").read_bytes() == b"roi"
    # a second time the page stays as it is
    text = page.read_text(encoding="utf-8")
    performance_page.main()
    assert page.read_text(encoding="utf-8") == text


def test_a_benchmark_that_is_missing_leaves_the_page_alone(directory, monkeypatch):
    page = write(directory, monkeypatch)
    before = page.read_bytes()
    (directory / "train.json").unlink()
    with pytest.raises(FileNotFoundError, match="train.json"):
        performance_page.main()
    assert page.read_bytes() == before


def test_losses_with_a_target_exist():
    assert set(performance_page.TARGETS) <= {name for name, _ in CLS_LOSSES}
