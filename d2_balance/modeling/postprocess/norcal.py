"""NorCal: scores of frequent classes are lowered after training.

    p'_j = (p_j / n_j^gamma) / (sum_k p_k / n_k^gamma + p_background)

n_j is the number of training images of class j. Background keeps its score, so that the sum over
classes and background stays 1.

Source: Pan et al., On Model Calibration for Long-Tailed Object Detection and Instance
Segmentation, arXiv:2107.02170, equation 5.
"""

from __future__ import annotations

import torch
from torch import Tensor


def norcal(probs: Tensor, class_count: Tensor, gamma: float) -> Tensor:
    """Calibrate the probabilities of a softmax head.

    Args:
        probs: (R, K + 1), the last column background.
        class_count: (K,) training images of each class; 0 counts as 1.
        gamma: strength, at least 0; 0 changes nothing.

    Returns:
        (R, K + 1), which add up to 1 for each sample.
    """
    # in logarithms, which cannot overflow; log 0 = -inf stays 0
    shift = gamma * class_count.clamp(min=1).log().to(probs.dtype)
    logits = probs.log() - torch.cat([shift, shift.new_zeros(1)])
    return logits.softmax(dim=1)
