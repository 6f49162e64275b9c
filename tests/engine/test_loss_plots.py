"""The plots draw what they are given; what they look like is seen in the demo."""

import matplotlib.image
import pytest

from d2_balance.engine import loss_plots as plots
from d2_balance.engine.loss_plots import plot_density, plot_losses


@pytest.fixture
def drawn(monkeypatch):
    """The figures, caught before they are written."""
    figures = []
    save = plots.save_figure
    monkeypatch.setattr(plots, "save_figure", lambda f, path: (figures.append(f), save(f, path)))
    return figures


def metrics(**losses):
    return [{"iteration": 19 + 20 * i, "lr": 0.1, **losses} for i in range(3)]


def test_every_loss_has_a_line_and_nothing_else(tmp_path, drawn):
    records = metrics(total_loss=3.0, loss_cls=2.0, loss_box_reg=1.0)
    records[1]["bbox/AP"] = 30.0
    plot_losses(records, str(tmp_path / "losses.png"))
    (axes,) = drawn[0].axes
    assert [line.get_label() for line in axes.lines] == ["total_loss", "loss_box_reg", "loss_cls"]
    assert axes.lines[0].get_xdata().tolist() == [19, 39, 59]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("iteration", "loss")
    assert matplotlib.image.imread(tmp_path / "losses.png").shape[2] == 4
    assert [p.name for p in tmp_path.iterdir()] == ["losses.png"]


def test_losses_of_very_different_size_get_a_logarithmic_axis(tmp_path, drawn):
    plot_losses(metrics(total_loss=50.0, loss_cls=0.1), str(tmp_path / "losses.png"))
    assert drawn[0].axes[0].get_yscale() == "log"


def test_metrics_without_a_loss_are_refused(tmp_path):
    with pytest.raises(ValueError, match="hold no loss"):
        plot_losses([{"iteration": 1, "lr": 0.1}], str(tmp_path / "losses.png"))


def density_records(count):
    return [
        {
            "iteration": 20 * (i + 1),
            "stats": {"GHMC": {"density": [100.0 + i, 5.0, 0.0], "weight": [0.1, 1.9, 0.0]}},
        }
        for i in range(count)
    ]


def test_density_and_weight_are_drawn_by_gradient_norm(tmp_path, drawn):
    plot_density(density_records(9), "GHMC", str(tmp_path / "density.png"))
    left, right = drawn[0].axes
    assert [bar.get_height() for bar in left.patches[:3]] == [108.0, 5.0, 0.0]
    assert [bar.get_height() for bar in right.patches[:3]] == [0.1, 1.9, 0.0]
    assert left.get_xlim() == right.get_xlim() == (0.0, 1.0)
    labels = [text.get_text() for text in left.get_legend().get_texts()]
    assert sorted(labels) == ["iteration 100", "iteration 180", "iteration 20"]
    assert "1 of 3 bins empty" in drawn[0].get_suptitle()


def test_one_record_is_enough(tmp_path, drawn):
    plot_density(density_records(1), "GHMC", str(tmp_path / "density.png"))
    assert len(drawn) == 1


def test_another_source_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no density of GHMR"):
        plot_density(density_records(2), "GHMR", str(tmp_path / "density.png"))
