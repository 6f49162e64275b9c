"""CARL: boxes weighted by the score of their class (PISA, prime sample attention).

With p_i the score of the object's class (its gradient stays):

    v_i = ((1 - b) p_i + b)^k,   c_i = v_i P / sum_j v_j
    L_box = sum_i (1 + c_i) L_i   (add, as the published models)   or   sum_i c_i L_i   (replace)

Scores of badly placed boxes fall, because their box loss is above the average.

Source: Cao et al., Prime Sample Attention in Object Detection, arXiv:1904.04821, equation 6.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from d2_balance.losses import Samples
from d2_balance.losses._base import check

from .base import REWEIGHTERS, Reweighter


def object_scores(samples: Samples) -> Tensor:
    """(P,) probability of the object's class, with gradient."""
    logits, own = samples.logits[samples.pos], samples.labels[samples.pos].unsqueeze(1)
    sigmoid = samples.logits.shape[1] == samples.num_classes
    prob = logits.sigmoid() if sigmoid else logits.softmax(dim=1)
    return prob.gather(1, own).squeeze(1)


@REWEIGHTERS.register()
class CARL(Reweighter):
    """Classification-aware regression loss (arXiv:1904.04821, equation 6).

    Args:
        k: exponent, at least 0.
        bias: b, weight of a score of 0, in [0, 1].
        mode: "add" keeps the box loss and adds the weighted one; "replace" has the weighted one.

    Raises:
        ValueError: an argument is out of range.
    """

    needs_scores = True

    def __init__(
        self, *, k: float = 1.0, bias: float = 0.2, mode: Literal["add", "replace"] = "add"
    ) -> None:
        super().__init__()
        check(self, "k", k, k >= 0, "a number of at least 0")
        check(self, "bias", bias, 0 <= bias <= 1, "a number in [0, 1]")
        check(self, "mode", mode, mode in ("add", "replace"), "one of add, replace")
        self.k, self.bias, self.mode = k, bias, mode

    def forward(self, samples: Samples, cls: Tensor, box: Tensor) -> tuple[None, Tensor]:
        value = ((1 - self.bias) * object_scores(samples) + self.bias).pow(self.k)  # (P,)
        weight = value * (len(value) / value.sum().clamp(min=1e-12))
        return None, weight + 1 if self.mode == "add" else weight
