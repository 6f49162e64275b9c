"""DisAlign: the logits of a frozen detector, aligned in a short second stage.

    z'_j = z_j + c ((alpha_j - 1) z_j + beta_j)  for the K classes;  background stays as it is
    c = sigmoid(v . x + v_0), one number for each sample

alpha starts at 1 and beta at 0, so that z' = z. Only alpha, beta and v are trained.

Shapes: R samples, d features, K classes.

Source: Zhang et al., arXiv:2103.16370.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class DisAlign(nn.Module):
    """Scale and shift of the class logits, by a confidence of each sample.

    Args:
        in_features: d.
        num_classes: K.
    """

    def __init__(self, in_features: int, num_classes: int) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.ones(num_classes))
        self.logit_bias = nn.Parameter(torch.zeros(num_classes))
        self.confidence = nn.Linear(in_features, 1)
        nn.init.normal_(self.confidence.weight, std=0.01)
        nn.init.zeros_(self.confidence.bias)

    def forward(self, logits: Tensor, x: Tensor) -> Tensor:
        """Return aligned logits.

        Args:
            logits: (R, C), the first K columns are the classes.
            x: (R, d) features that they were computed from.
        """
        num_classes = len(self.logit_scale)
        with torch.autocast(x.device.type, enabled=False):
            dtype = torch.promote_types(logits.dtype, self.logit_scale.dtype)
            z, x = logits[:, :num_classes].to(dtype), x.to(dtype)
            confidence = self.confidence(x).sigmoid()
            z = z + confidence * ((self.logit_scale - 1) * z + self.logit_bias)
        return torch.cat([z, logits[:, num_classes:].to(dtype)], dim=1)
