# SPDX-License-Identifier: Apache-2.0
"""The distance of a weight from its base."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from verifier.decoding import decode
from verifier.reconstruction.distance import Distance, RowChunk, _fast, distance, norm2, peak_of
from verifier.reconstruction.yardstick import COMPARED, max_scales, nearest
from verifier.schemes import FORMATS


def _encoded(fmt: str, out: int, in_: int, size: float) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return BF16 values and stored parts that are near them, with arbitrary codes."""
    rng = np.random.default_rng(out + in_)
    values = (rng.standard_normal((out, in_)) * size * 2.0 ** rng.integers(-9, 9, (out, 1))).astype(
        ml_dtypes.bfloat16
    )
    parts = dict(max_scales(values.astype(np.float32), fmt) or {})
    width = in_ // 2 if FORMATS[fmt].packed else in_
    codes = rng.integers(0, 256, (out, width)).astype(np.uint8)
    parts["weight"] = (
        codes
        if FORMATS[fmt].packed
        else np.where((codes & 0x7F) == 0x7F, 1, codes).astype(np.uint8)
    )
    return values, {k: np.asarray(v) for k, v in parts.items()}


@pytest.mark.parametrize("fmt", sorted(COMPARED))
@pytest.mark.parametrize("shape", [(3, 64), (130, 192), (37, 96), (1, 32)])
@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-18], ids=str)
@pytest.mark.parametrize("wide", [False, True], ids=["bf16", "f32"])
def test_the_fast_pass_agrees_with_the_decoder(
    fmt: str, shape: tuple[int, int], size: float, wide: bool
) -> None:
    values, parts = _encoded(fmt, *shape, size)
    base = values.astype(np.float32)
    amax = float(np.abs(base).max())
    chunk = RowChunk(parts, base if wide else values.view(np.uint16))
    assert peak_of(chunk.reference) == amax
    result, defined = distance([chunk], fmt, amax)
    scales = max_scales(base, fmt, amax)
    assert defined == (scales is not None)
    assert result.size == pytest.approx(norm2(base), rel=1e-4)
    assert result.error == pytest.approx(norm2(decode(parts, fmt) - base), rel=1e-4)
    if scales is not None:
        assert result.by_max == pytest.approx(norm2(nearest(base, scales, fmt) - base), rel=1e-3)


def test_a_chunk_that_is_not_finite_is_reported() -> None:
    values, parts = _encoded("mxfp8", 4, 64, 1.0)
    parts["weight"][1, 3] = 0x7F
    result, _ = distance(
        [RowChunk(parts, values.view(np.uint16))], "mxfp8", peak_of(values.view(np.uint16))
    )
    assert np.isnan(result.error)
    values[2, 2] = np.nan
    assert peak_of(values.view(np.uint16)) == np.inf
    values[2, 2] = -np.inf
    assert peak_of(values.view(np.uint16)) == np.inf


@pytest.mark.parametrize("fmt", ["nvfp4", "nvfp4_ct", "mxfp8"])
@pytest.mark.parametrize("scale", [0, 1, 0x38])
@pytest.mark.parametrize("wide", [False, True], ids=["bf16", "f32"])
def test_rows_of_zeros_take_the_fast_pass(fmt: str, scale: int, wide: bool) -> None:
    values, parts = _encoded(fmt, 4, 64, 1.0)
    reference = np.zeros(values.shape, np.float32 if wide else np.uint16)
    reference[1] = -0.0 if wide else 0x8000
    parts["weight_scale"] = np.full(parts["weight_scale"].shape, scale, np.uint8)
    parts["weight"][...] = 0
    parts["weight"][2] = 0x88 if FORMATS[fmt].packed else 0x80
    chunk = RowChunk(parts, reference)
    assert _fast(chunk, FORMATS[fmt], 1.0) == Distance()
    parts["weight"][3, 5] = 1
    reached = decode(parts, fmt)[3].any()
    assert (distance([chunk], fmt, 1.0)[0].error > 0) == reached
    parts["weight"][3, 5] = 0
    chunk.reference[0, 0] = 1e-30 if wide else 0x0001
    assert distance([chunk], fmt, 1.0)[0].size > 0
