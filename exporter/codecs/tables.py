# SPDX-License-Identifier: Apache-2.0
"""The values of the bytes of OCP Microscaling v1.0 as tensors: E2M1 (section 5.3.3), E8M0 (section
5.4.1).
"""

from __future__ import annotations

import torch

from exporter.codecs.constants import E8M0_BIAS

E8M0_NAN = 255
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def e2m1_pairs() -> torch.Tensor:
    """Return the two values of each packed byte, the low nibble's first; float32 [256, 2]."""
    nibble = torch.tensor([*_E2M1, *(-m for m in _E2M1)])
    byte = torch.arange(256)
    return torch.stack([nibble[byte & 15], nibble[byte >> 4]], 1)


def e8m0_powers() -> torch.Tensor:
    """Return 2^(byte - 127) of each byte, NaN for 255; float32 [256]."""
    powers = torch.ldexp(torch.ones(256), torch.arange(256) - E8M0_BIAS)
    powers[E8M0_NAN] = torch.nan
    return powers
