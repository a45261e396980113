# SPDX-License-Identifier: Apache-2.0
"""Squared error of a block under a candidate scale, float32, summed in the same order on every
device.
"""

from __future__ import annotations

import torch

from exporter.codecs.constants import E2M1_MAX

_EXPONENT = 0x7F800000
_ONE = 0x3F800000


def round_e2m1(y: torch.Tensor) -> torch.Tensor:
    """Return magnitudes (float32) rounded to E2M1 values, ties to the even code, clipped at 6."""
    y = y.clamp(max=E2M1_MAX)
    magic = ((y.view(torch.int32) & _EXPONENT).clamp_(min=_ONE) + (22 << 23)).view(torch.float32)
    return (y + magic).sub_(magic)


def block_loss(magnitude: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return sum over the last dimension of (|x| - scale * q(|x| / scale))^2, float32.

    The sum folds halves, so that its order, and thus its bits, are the same on CPU and GPU.

    Args:
        magnitude: |x|, float32 [..., 16].
        scale: effective scale of each block, float32 [...].
    """
    wide = scale.unsqueeze(-1)
    errors = round_e2m1(magnitude / wide).mul_(wide).sub_(magnitude).square_()
    while errors.shape[-1] > 1:
        half = errors.shape[-1] // 2
        errors = errors[..., :half] + errors[..., half:]
    return errors[..., 0]
