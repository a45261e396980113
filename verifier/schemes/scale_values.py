# SPDX-License-Identifier: Apache-2.0
"""How zero, NaN, infinite and negative scales look in each dtype that a scale is stored in.

Sources: OCP 8-bit Floating Point Specification 1.0 (E4M3 has no infinity; 0x7F and 0xFF are NaN);
OCP Microscaling Formats 1.0, section 5.4.1 (E8M0: 0xFF is NaN, no zero, no sign); IEEE 754 for F32
and F16; BF16 is the upper half of F32. U8 holds E8M0 exponents.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class ScaleBits:
    """The bit patterns of one dtype.

    Attributes:
        width: bytes of a value.
        sign: the mask of the sign bit; 0 where the dtype has no sign.
        exponent: the mask of the exponent bits that, all set, make NaN and infinity; 0 for dtypes
            whose only NaN is ``nan``.
        nan: the magnitude pattern of NaN in dtypes without infinity.
        zero: whether a magnitude of 0 is the value 0 (E8M0's is 2^-127).
        least: the smallest positive value as text, for messages.
        largest: the largest finite value as text, for messages.
        huge: the magnitude pattern from which on a factor is implausible (10^8); 0 for dtypes
            whose largest value is plausible.
        tiny: the magnitude pattern below which a divisor is implausible (10^-8).
    """

    width: int
    sign: int
    exponent: int = 0
    nan: int = 0
    zero: bool = True
    least: str = ""
    largest: str = ""
    huge: int = 0
    tiny: int = 0

    @property
    def float(self) -> bool:
        """Whether the dtype is one of the model's floats, not of one byte."""
        return self.width > 1


SCALE_BITS: dict[str, ScaleBits] = {
    "F8_E4M3": ScaleBits(1, 0x80, nan=0x7F, least="2^-9", largest="448"),
    "F8_E8M0": ScaleBits(1, 0, nan=0xFF, zero=False, least="2^-127", largest="2^127", huge=0x9A),
    "U8": ScaleBits(1, 0, nan=0xFF, zero=False, least="2^-127", largest="2^127", huge=0x9A),
    "BF16": ScaleBits(
        2, 0x8000, 0x7F80, least="9.2e-41", largest="3.4e38", huge=0x4CBF, tiny=0x322B
    ),
    "F16": ScaleBits(2, 0x8000, 0x7C00, least="6.0e-8", largest="65504"),
    "F32": ScaleBits(
        4,
        0x8000_0000,
        0x7F80_0000,
        least="1.4e-45",
        largest="3.4e38",
        huge=0x4CBE_BC20,
        tiny=0x322B_CC77,
    ),
}
"""By the dtype's name in safetensors; U8 as a scale is E8M0."""
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32}


@dataclass(frozen=True, slots=True)
class ScaleFlaws:
    """Which values of a scale tensor cannot be used, as boolean arrays of one dimension.

    ``huge`` is a flaw of a factor, ``tiny`` of a divisor.
    """

    zero: npt.NDArray[np.bool_]
    nan: npt.NDArray[np.bool_]
    infinite: npt.NDArray[np.bool_]
    negative: npt.NDArray[np.bool_]
    huge: npt.NDArray[np.bool_]
    tiny: npt.NDArray[np.bool_]

    @property
    def any(self) -> bool:
        """Whether there is any."""
        return any(
            bool(mask.any())
            for mask in (self.zero, self.nan, self.infinite, self.negative, self.huge)
        )


def scale_flaws(raw: npt.NDArray[Any], dtype: str) -> ScaleFlaws:
    """Return the flaws of a scale tensor from its bytes.

    Args:
        raw: its values in their own dtype, or its bytes as uint8.
        dtype: a key of `SCALE_BITS`.
    """
    bits = SCALE_BITS[dtype]
    flat = np.ascontiguousarray(raw).reshape(-1).view(_UNSIGNED[bits.width])
    magnitude = flat & ~np.array(bits.sign, flat.dtype) if bits.sign else flat
    if bits.exponent:
        top = magnitude >= bits.exponent
        infinite = magnitude == bits.exponent
        nan = top & ~infinite
    else:
        nan, infinite = magnitude == bits.nan, np.zeros(flat.shape, bool)
    zero = magnitude == 0 if bits.zero else np.zeros(flat.shape, bool)
    negative = (flat & bits.sign) != 0 if bits.sign else np.zeros(flat.shape, bool)
    negative &= ~zero & ~nan
    none = np.zeros(flat.shape, bool)
    huge = (magnitude >= bits.huge) & ~nan & ~infinite & ~negative if bits.huge else none
    tiny = (magnitude < bits.tiny) & ~zero & ~negative if bits.tiny else none
    return ScaleFlaws(zero, nan, infinite, negative, huge, tiny)


def pattern_value(pattern: int, dtype: str) -> float:
    """Return the value of a bit pattern of a float dtype."""
    width = SCALE_BITS[dtype].width
    if dtype == "BF16":
        pattern, dtype, width = pattern << 16, "F32", 4
    raw = np.array([pattern], _UNSIGNED[width])
    return float(raw.view(np.float16 if dtype == "F16" else np.float32)[0])
