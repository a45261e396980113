# SPDX-License-Identifier: Apache-2.0
"""What holds of the codecs for any weights: Hypothesis draws bytes or a seed, numpy makes the
arrays.

tests/properties/test_saboteurs.py proves that this file alone tells ten broken codecs from a right
one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from exporter.codecs import amax, decode, encode
from exporter.codecs.blocks import chunks_of
from exporter.codecs.constants import CHUNK
from tests import oracle
from tests.conftest import to_numpy, to_torch
from verifier import decoding
from verifier.errors import EncodeError
from verifier.reconstruction import yardstick

pytestmark = pytest.mark.usefixtures("back_end", "one_thread")
Array = np.ndarray
BF16 = ml_dtypes.bfloat16
F32_MAX = float(np.finfo(np.float32).max)
LARGEST = {np.float32: F32_MAX, BF16: float(ml_dtypes.finfo(BF16).max), np.float16: 65504.0}
FP8 = ["fp8", "fp8_per_channel", "fp8_block"]
EVERY = ["nvfp4", "w4a16_nvfp4", "mxfp8", *FP8]
MIDPOINTS = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], np.float32)
MAGNITUDES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)


# --- what is drawn

seeds = st.integers(0, 2**32 - 1)
dtypes = st.sampled_from(list(LARGEST))
GRID = np.concatenate([MIDPOINTS, MAGNITUDES])


def per_block(x: Array, one_each: Array) -> Array:
    """Return ``x`` times one number for each of its blocks of 16."""
    return x * np.repeat(one_each, 16, axis=1)


def blocks_of(x: Array) -> tuple[int, int]:
    return x.shape[0], x.shape[1] // 16


KINDS: dict[str, Callable[[np.random.Generator, Array], Array]] = {
    "normal": lambda _, x: x,
    "any_magnitude": lambda r, x: x * 10.0 ** r.integers(-45, 38),
    "decades_by_block": lambda r, x: per_block(x, 10.0 ** r.uniform(-10.5, 10.5, blocks_of(x))),
    "decades_by_value": lambda r, x: x * 10.0 ** r.uniform(-10.5, 10.5, x.shape),
    "subnormal": lambda r, x: np.ldexp(
        r.integers(-(1 << 22), 1 << 22, x.shape).astype(float), -149 - r.integers(0, 20)
    ),
    "one_hot": lambda r, x: x * (np.arange(x.shape[1]) % 16 == r.integers(16)),
    "zero_blocks": lambda r, x: per_block(x, r.integers(0, 2, blocks_of(x))),
    "zeros": lambda r, x: np.copysign(0.0, x),
    "ties": lambda r, x: np.copysign(r.choice(GRID, x.shape), x) * 2.0 ** r.integers(-30, 30),
    "boundaries": lambda r, x: (
        np.nextafter(np.float32(1.75), 1.75 + np.sign(x).astype("f4")) * 2.0 ** r.integers(-30, 30)
    ),
    "huge": lambda r, x: np.clip(x, -4, 4) * (F32_MAX / 4),
}


def finite(x: Array, dtype: type = np.float32) -> Array:
    """Return ``x`` in ``dtype``, with what that cannot hold at its ends."""
    return np.clip(x, -LARGEST[dtype], LARGEST[dtype]).astype(np.float32).astype(dtype)


@st.composite
def weights(
    draw: st.DrawFn, kinds: tuple[str, ...] = ("bits", *KINDS), dtype: type | None = None
) -> Array:
    """Draw [1..4, 32..128] finite values, in float32, bfloat16 or float16."""
    kind, to = draw(st.sampled_from(kinds)), dtype or draw(dtypes)
    if kind == "bits":
        raw = np.frombuffer(draw(st.binary(min_size=128, max_size=128)), np.float32)
        return finite(np.where(np.isfinite(raw), raw, np.float32(0)).reshape(1, 32), to)
    rng = np.random.default_rng(draw(seeds))
    x = rng.standard_normal((draw(st.integers(1, 4)), 32 * draw(st.integers(1, 4))))
    with np.errstate(under="ignore"):
        return finite(KINDS[kind](rng, x), to)


@st.composite
def scale_2s(draw: st.DrawFn, low: int = -149, high: int = 100) -> np.float32:
    """Draw a positive float32 of any mantissa."""
    mantissa = draw(st.integers(1 << 23, (1 << 24) - 1))
    value = np.float32(np.ldexp(float(mantissa), draw(st.integers(low, high)) - 23))
    return max(value, np.float32(2.0**-149))


@st.composite
def relative_scale_2(draw: st.DrawFn, x: Array) -> np.float32:
    """Draw a scale that leaves something of ``x``: near amax/2688, up to 2^12 to either side."""
    top = float(np.abs(x.astype(np.float32)).max(initial=0.0)) or 1.0
    value = np.float32(
        np.clip(top / 2688 * 2.0 ** draw(st.floats(-12, 12)), 2.0**-149, F32_MAX / 2)
    )
    return value


def scale_bytes(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Return legal E4M3 scales: 0x01 to 0x7E."""
    return rng.integers(1, 0x7F, shape).astype(np.uint8)


def as_scale(raw: Array) -> torch.Tensor:
    return to_torch(raw).view(torch.float8_e4m3fn)


def parts_equal(found: dict[str, Array], wanted: dict[str, Array]) -> None:
    assert found.keys() == wanted.keys()
    for leaf in wanted:
        assert oracle.same_bits(np.asarray(found[leaf]), np.asarray(wanted[leaf])), (
            leaf,
            found[leaf],
            wanted[leaf],
        )


def codes(x: Array, scale: Array, scale_2: np.float32) -> Array:
    """Return the exporter's E2M1 codes under given scales."""
    found = encode(
        to_torch(x), "nvfp4", weight_scale_2=torch.tensor(scale_2), weight_scale=as_scale(scale)
    )
    assert (found["weight_scale"].view(torch.uint8).numpy() == scale).all()
    return oracle.nvfp4_codes(to_numpy(found))


# --- NVFP4


@given(weights())
def test_nvfp4_is_the_oracle_s(x: Array) -> None:
    """With scales of its own: every byte, and 2688 in the global scale."""
    parts_equal(to_numpy(encode(to_torch(x), "nvfp4")), oracle.nvfp4_encode(x))


@given(st.data(), weights())
def test_nvfp4_under_a_given_global_scale(data: st.DataObject, x: Array) -> None:
    scale_2 = data.draw(relative_scale_2(x))
    found = to_numpy(encode(to_torch(x), "nvfp4", weight_scale_2=torch.tensor(scale_2)))
    parts_equal(found, oracle.nvfp4_encode(x, scale_2=scale_2))


@given(st.data(), weights())
def test_nvfp4_under_a_given_amax(data: st.DataObject, x: Array) -> None:
    """Shared by a fused group: at least the tensor's own, or below it (then codes saturate)."""
    top = min(float(data.draw(relative_scale_2(x))) * 2688.0, F32_MAX)
    wanted = oracle.nvfp4_encode(x, amax=top)
    parts_equal(to_numpy(encode(to_torch(x), "nvfp4", amax=top)), wanted)
    parts_equal(
        to_numpy(encode(to_torch(x), "nvfp4", amax=torch.tensor(top, dtype=torch.float32))), wanted
    )


@given(weights())
def test_w4a16_nvfp4_is_the_same_encoding(x: Array) -> None:
    parts_equal(
        to_numpy(encode(to_torch(x), "w4a16_nvfp4")), to_numpy(encode(to_torch(x), "nvfp4"))
    )


@given(seeds, weights(), scale_2s(-149, 60))
def test_nvfp4_codes_are_nearest_ties_to_even(seed: int, x: Array, scale_2: np.float32) -> None:
    """By the oracle, and by exact thresholds on the float32 quotient."""
    scale = scale_bytes(np.random.default_rng(seed), (x.shape[0], x.shape[1] // 16))
    found = codes(x, scale, scale_2)
    wanted = oracle.nvfp4_encode(x, scale_2=scale_2, scale=scale)
    assert (found == oracle.nvfp4_codes(wanted)).all()
    with np.errstate(all="ignore"):
        combined = np.repeat(oracle.e4m3_values(scale) * scale_2, 16, axis=1)
        quotient = x.astype(np.float32) / combined
    assume(not np.isnan(quotient).any())
    assert ((found & 7) == by_threshold(np.abs(quotient))).all()
    assert ((found >> 3) == (quotient < 0)).all()


def by_threshold(size: Array) -> Array:
    """Return the magnitude code of |quotient|: a midpoint goes to whichever neighbour is even."""
    return sum(
        (size > m if low % 2 == 0 else size >= m).astype(np.uint8)
        for low, m in enumerate(MIDPOINTS)
    )


@given(seeds, scale_2s(-100, 60))
def test_nvfp4_ties(seed: int, scale_2: np.float32) -> None:
    """Midpoints times the scale, exact or one float32 to either side: true division decides, not a
    reciprocal.
    """
    rng = np.random.default_rng(seed)
    scale = scale_bytes(rng, (8, 16))
    combined = np.repeat(oracle.e4m3_values(scale) * scale_2, 16, axis=1)
    x = rng.choice(MIDPOINTS, combined.shape) * combined
    x = np.where(
        rng.integers(0, 2, x.shape),
        x,
        np.nextafter(x, rng.choice([0, np.inf], x.shape).astype(np.float32)),
    )
    x = np.copysign(x, rng.standard_normal(x.shape)).astype(np.float32)
    found = codes(x, scale, scale_2)
    assert (found == oracle.nvfp4_codes(oracle.nvfp4_encode(x, scale_2=scale_2, scale=scale))).all()
    assert ((found & 7) == by_threshold(np.abs(x / combined))).all()


@given(seeds, weights())
def test_nvfp4_blocks_are_independent(seed: int, x: Array) -> None:
    """Under one global scale: shuffled blocks give the shuffled bytes, and a changed block changes
    its own bytes only.
    """
    rng = np.random.default_rng(seed)
    scale_2 = torch.tensor(oracle.nvfp4_scale_2(np.abs(x.astype(np.float32)).max()))
    blocks = x.reshape(-1, 16)
    order = rng.permutation(len(blocks))

    def by_block(values: Array) -> tuple[Array, Array]:
        found = to_numpy(encode(to_torch(values.reshape(x.shape)), "nvfp4", weight_scale_2=scale_2))
        return found["weight"].reshape(-1, 8), found["weight_scale"].reshape(-1)

    weight, scale = by_block(blocks)
    shuffled_weight, shuffled_scale = by_block(blocks[order])
    assert (shuffled_weight == weight[order]).all()
    assert (shuffled_scale == scale[order]).all()
    changed = blocks.copy()
    changed[order[0]] = finite(
        np.roll(changed[order[0]].astype(np.float32), 3) * -0.7, x.dtype.type
    )
    other_weight, other_scale = by_block(changed)
    assert (other_weight[order[1:]] == weight[order[1:]]).all()
    assert (other_scale[order[1:]] == scale[order[1:]]).all()


@given(st.data(), weights())
def test_nvfp4_is_monotone_within_a_block(data: st.DataObject, x: Array) -> None:
    """A larger value never decodes to a smaller one."""
    x = np.sort(x.astype(np.float32).reshape(-1, 16), axis=1).reshape(x.shape)
    found = to_numpy(
        encode(to_torch(x), "nvfp4", weight_scale_2=torch.tensor(data.draw(relative_scale_2(x))))
    )
    steps = np.concatenate([MAGNITUDES, -MAGNITUDES])[oracle.nvfp4_codes(found)].reshape(-1, 16)
    assert (np.diff(steps, axis=1) >= 0).all()


@given(weights())
def test_nvfp4_is_symmetric(x: Array) -> None:
    """Negation changes sign bits only, and none where the value is zero."""
    plus, minus = to_numpy(encode(to_torch(x), "nvfp4")), to_numpy(encode(to_torch(-x), "nvfp4"))
    assert (plus["weight_scale"] == minus["weight_scale"]).all()
    assert oracle.same_bits(plus["weight_scale_2"], minus["weight_scale_2"])
    a, b = oracle.nvfp4_codes(plus), oracle.nvfp4_codes(minus)
    assert ((a & 7) == (b & 7)).all()
    assert ((a ^ b)[(a & 7) != 0] == 8).all()
    assert ((a ^ b)[x == 0] == 0).all()


@given(seeds, weights())
def test_nvfp4_zero_has_no_sign(seed: int, x: Array) -> None:
    """Zeros of either sign give code 0: 0x8 never comes of a zero."""
    rng = np.random.default_rng(seed)
    zero = rng.random(x.shape) < 0.5
    x = np.where(zero, np.copysign(np.float32(0), rng.standard_normal(x.shape)).astype(x.dtype), x)
    for given_scale in (None, torch.tensor(1e-3)):
        found = oracle.nvfp4_codes(
            to_numpy(encode(to_torch(x), "nvfp4", weight_scale_2=given_scale))
        )
        assert (found[x == 0] == 0).all()


@given(weights())
def test_nvfp4_scales_are_legal(x: Array) -> None:
    """Block scales 0x01 to 0x7E, a finite positive global scale, a zero block's scale 1.0."""
    found = to_numpy(encode(to_torch(x), "nvfp4"))
    assert found["weight_scale"].min() >= 0x01 and found["weight_scale"].max() <= 0x7E
    assert np.isfinite(found["weight_scale_2"]) and found["weight_scale_2"] > 0
    zero = ~np.abs(x.astype(np.float32)).reshape(x.shape[0], -1, 16).any(axis=2)
    assert (found["weight_scale"][zero] == 0x38).all()
    assert (oracle.nvfp4_codes(found).reshape(x.shape[0], -1, 16)[zero] == 0).all()


@given(seeds)
def test_nvfp4_scales_are_clamped_to_the_smallest(seed: int) -> None:
    """Blocks of 10^0 to 10^-15 in one tensor: all the way below 2^-9."""
    rng = np.random.default_rng(seed)
    x = (
        rng.standard_normal((8, 16, 16))
        * 10.0 ** -rng.permuted(np.tile(np.arange(16.0), (8, 1)), axis=1)[:, :, None]
    )
    x = finite(x.reshape(8, 256))
    found = to_numpy(encode(to_torch(x), "nvfp4"))
    assert found["weight_scale"].min() == 0x01
    parts_equal(found, oracle.nvfp4_encode(x))


@given(weights(kinds=("zeros",)))
def test_nvfp4_of_a_zero_tensor_is_defined(x: Array) -> None:
    found = to_numpy(encode(to_torch(x), "nvfp4"))
    assert not found["weight"].any() and (found["weight_scale"] == 0x38).all()
    assert np.isfinite(found["weight_scale_2"]) and found["weight_scale_2"] > 0


@st.composite
def on_grid(draw: st.DrawFn) -> dict[str, Array]:
    """Draw an encoding that `encode` can write: +-6 in each block, one scale 0x7E, no code 0x8."""
    rng = np.random.default_rng(draw(seeds))
    rows, blocks = draw(st.integers(1, 4)), 2 * draw(st.integers(1, 4))
    code = rng.integers(0, 16, (rows * blocks, 16))
    code[code == 8] = 0
    code[np.arange(rows * blocks), rng.integers(0, 16, rows * blocks)] = rng.choice(
        [7, 15], rows * blocks
    )
    scale = scale_bytes(rng, (rows, blocks))
    scale[rng.integers(rows), rng.integers(blocks)] = 0x7E
    code = code.reshape(rows, blocks * 16).astype(np.uint8)
    weight = code[:, 0::2] | (code[:, 1::2] << 4)
    return {
        "weight": weight,
        "weight_scale": scale,
        "weight_scale_2": np.asarray(draw(scale_2s(-100, 100))),
    }


@given(on_grid())
def test_nvfp4_is_idempotent(parts: dict[str, Array]) -> None:
    """Decoding and encoding again gives the same bytes, under its own global scale and under a new
    one.
    """
    x = decode({k: to_torch(v) for k, v in parts.items()}, "nvfp4")
    again = to_numpy(encode(x, "nvfp4", weight_scale_2=torch.tensor(parts["weight_scale_2"])))
    parts_equal(again, parts)
    new = to_numpy(encode(x, "nvfp4"))
    assert abs(float(new["weight_scale_2"]) / float(parts["weight_scale_2"]) - 1) < 2.0**-22
    assert (new["weight"] == parts["weight"]).all() and (
        new["weight_scale"] == parts["weight_scale"]
    ).all()


@given(seeds, st.integers(0, 2**32 - 1))
def test_nvfp4_decoders_agree(seed: int, word: int) -> None:
    """On any bytes: NaN and negative block scales, a global scale of any bits, stacks."""
    rng = np.random.default_rng(seed)
    shape = [(3, 32), (1, 160), (2, 3, 32), (2, 2, 1, 16)][seed % 4]
    scale_2 = rng.integers(0, 2**32, shape[:-2], np.uint32)
    if scale_2.ndim == 0 or seed % 3 == 0:
        scale_2 = np.asarray(word, np.uint32)
    parts = {
        "weight": rng.integers(0, 256, (*shape[:-1], shape[-1] // 2), np.uint8),
        "weight_scale": rng.integers(0, 256, (*shape[:-1], shape[-1] // 16), np.uint8),
        "weight_scale_2": np.asarray(scale_2, np.uint32).view(np.float32),
    }
    parts["weight_scale"].reshape(-1)[0] = rng.choice([0x7F, 0xFF])
    decoders_agree(parts, "nvfp4", oracle.nvfp4_decode(parts))


def decoders_agree(parts: dict[str, Array], fmt: str, wanted: Array) -> None:
    """Check both decoders against ``wanted``, and the exporter's other dtypes against its
    float32.
    """
    mine = {k: to_torch(v) for k, v in parts.items()}
    assert oracle.same_bits(decoding.decode(parts, fmt), wanted)
    found = decode(mine, fmt)
    assert oracle.same_bits(found.numpy(), wanted)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(
            decode(mine, fmt, dtype=dtype).nan_to_num(), found.to(dtype).nan_to_num()
        )
    out = torch.full_like(found, 7.0)
    assert decode(mine, fmt, out=out) is out
    assert oracle.same_bits(out.numpy(), wanted)


# --- MXFP8


@given(weights())
def test_mxfp8_is_the_oracle_s(x: Array) -> None:
    parts_equal(to_numpy(encode(to_torch(x), "mxfp8")), oracle.mxfp8_encode(x))


@given(weights())
def test_mxfp8_exponent_is_the_smallest_that_fits(x: Array) -> None:
    """0 to 254, and 0 only where the block's maximum is at most 448 * 2^-127; no NaN code."""
    found = to_numpy(encode(to_torch(x), "mxfp8"))
    k = found["weight_scale"].astype(int)
    top = np.abs(x.astype(np.float64)).reshape(x.shape[0], -1, 32).max(axis=2)
    assert k.min() >= 0 and k.max() <= 254
    assert (top <= np.ldexp(448.0, k - 127)).all()
    assert ((k == 0) == (top <= 448 * 2.0**-127)).all()
    assert ((k == 0) | (top > np.ldexp(448.0, k - 128))).all()
    assert ((found["weight"] & 0x7F) != 0x7F).all()


@given(seeds, weights())
def test_mxfp8_under_given_scales(seed: int, x: Array) -> None:
    scale = (
        np.random.default_rng(seed)
        .integers(0, 255, (x.shape[0], x.shape[1] // 32))
        .astype(np.uint8)
    )
    found = to_numpy(encode(to_torch(x), "mxfp8", weight_scale=to_torch(scale)))
    parts_equal(found, oracle.mxfp8_encode(x, scale=scale))


@given(weights())
def test_mxfp8_codes_are_nearest(x: Array) -> None:
    """Of all 253 finite values none is nearer to the exact quotient; a tie goes to an even code."""
    found = to_numpy(encode(to_torch(x), "mxfp8"))
    k = np.repeat(found["weight_scale"].astype(int), 32, axis=1) - 127
    quotient = np.ldexp(x.astype(np.float64), -k)
    grid = np.unique(
        oracle.e4m3_values(np.delete(np.arange(256, dtype=np.uint8), [127, 255])).astype(np.float64)
    )
    distance = np.abs(oracle.e4m3_values(found["weight"]).astype(np.float64) - quotient)
    every = np.abs(quotient[..., None] - grid)
    least = every.min(axis=-1)
    assert (distance == least).all()
    tied = (every == least[..., None]).sum(axis=-1) > 1
    assert (found["weight"][tied] % 2 == 0).all()


@given(seeds, weights())
def test_mxfp8_blocks_are_independent_monotone_and_symmetric(seed: int, x: Array) -> None:
    blocks = np.sort(x.astype(np.float32).reshape(-1, 32), axis=1).astype(x.dtype)
    order = np.random.default_rng(seed).permutation(len(blocks))
    found = to_numpy(encode(to_torch(blocks), "mxfp8"))
    shuffled = to_numpy(encode(to_torch(blocks[order].reshape(x.shape)), "mxfp8"))
    assert (shuffled["weight"].reshape(-1, 32) == found["weight"][order]).all()
    assert (shuffled["weight_scale"].reshape(-1, 1) == found["weight_scale"][order]).all()
    assert (np.diff(oracle.e4m3_values(found["weight"]), axis=1) >= 0).all()
    minus = to_numpy(encode(to_torch(-blocks), "mxfp8"))
    assert ((minus["weight"] ^ found["weight"]) == 0x80).all()
    assert (minus["weight_scale"] == found["weight_scale"]).all()


@given(seeds)
def test_mxfp8_is_idempotent(seed: int) -> None:
    """With a code in each block's top binade, and a scale whose values float32 holds."""
    rng = np.random.default_rng(seed)
    code = rng.integers(0, 256, (8, 32)).astype(np.uint8)
    code[(code & 0x7F) == 0x7F] = 0
    code[np.arange(8), rng.integers(0, 32, 8)] = rng.integers(0x77, 0x7F, 8) | rng.choice(
        [0, 0x80], 8
    )
    parts = {
        "weight": code.reshape(2, 128),
        "weight_scale": rng.integers(0, 247, (2, 4)).astype(np.uint8),
    }
    parts["weight_scale"][0, 0] = 0
    x = decode({k: to_torch(v) for k, v in parts.items()}, "mxfp8")
    parts_equal(to_numpy(encode(x, "mxfp8")), parts)


@given(seeds)
def test_mxfp8_decoders_agree(seed: int) -> None:
    """On any bytes, NaN scales included, and on a ragged last block."""
    rng = np.random.default_rng(seed)
    shape = [(3, 64), (2, 40), (2, 3, 33), (1, 1)][seed % 4]
    scale = rng.integers(0, 256, (*shape[:-1], -(-shape[-1] // 32)), np.uint8)
    scale.reshape(-1)[-1] = rng.choice([0, 254, 255])
    parts = {"weight": rng.integers(0, 256, shape, np.uint8), "weight_scale": scale}
    decoders_agree(parts, "mxfp8", oracle.mxfp8_decode(parts))


# --- FP8


@st.composite
def matrices(draw: st.DrawFn) -> Array:
    """Draw a matrix or a stack whose sides 128 does not always divide, in any dtype."""
    shape = draw(
        st.sampled_from(
            [(1, 1), (3, 130), (130, 5), (128, 128), (129, 257), (2, 130, 131), (2, 1, 3, 5)]
        )
    )
    rng = np.random.default_rng(draw(seeds))
    x = (
        rng.standard_normal(shape)
        * 10.0 ** rng.uniform(-10.5, 10.5)
        * 10.0 ** (rng.uniform(-3, 3, shape[:-1])[..., None])
    )
    return finite(x * (rng.random((*shape[:-1], 1)) > 0.1), draw(dtypes))


@pytest.mark.parametrize("fmt", FP8)
@given(x=matrices())
def test_fp8_round_trip(fmt: str, x: Array) -> None:
    """Bytes by the oracle, decoders bit-equal, and the error at most half a step."""
    found = to_numpy(encode(to_torch(x), fmt))
    parts_equal(found, oracle.fp8_encode(x, fmt))
    values = oracle.fp8_decode(found, fmt)
    decoders_agree(found, fmt, values)
    scale = oracle._fp8_wide(found[oracle.FP8_LEAF[fmt]], fmt, x.shape)
    bound = np.maximum(np.abs(x.astype(np.float64)) / 16, scale * 2.0**-10) * (1 + 2.0**-18)
    assert (np.abs(values.astype(np.float64) - x.astype(np.float64)) <= bound).all()


@pytest.mark.parametrize("fmt", FP8)
@given(x=matrices(), factor=st.floats(0.25, 8))
def test_fp8_under_given_maxima_and_scales(fmt: str, x: Array, factor: float) -> None:
    """The scale's own shape; beyond it values saturate at 448."""
    top = (oracle.fp8_amax(x, fmt) * np.float32(factor)).astype(np.float32)
    wanted = oracle.fp8_encode(x, fmt, amax=top)
    parts_equal(to_numpy(encode(to_torch(x), fmt, amax=to_torch(top))), wanted)
    scale = wanted[oracle.FP8_LEAF[fmt]]
    parts_equal(to_numpy(encode(to_torch(x), fmt, weight_scale=to_torch(scale))), wanted)


@pytest.mark.parametrize("fmt", FP8)
@given(seed=seeds)
def test_fp8_decoders_agree(fmt: str, seed: int) -> None:
    """On any bytes and scales of any bits, ragged tiles and stacks."""
    rng = np.random.default_rng(seed)
    shape = [(1, 1), (130, 40), (3, 257), (2, 130, 129)][seed % 4]
    scale_shape = oracle.fp8_amax(np.zeros(shape, np.float32), fmt).shape
    scale = np.asarray(rng.integers(0, 2**32, scale_shape, np.uint32)).view(np.float32)
    parts = {"weight": rng.integers(0, 256, shape, np.uint8), oracle.FP8_LEAF[fmt]: scale}
    decoders_agree(parts, fmt, oracle.fp8_decode(parts, fmt))


# --- all formats: dtypes, layouts, stacks, out=, chunks


@given(weights(dtype=BF16), st.sampled_from(EVERY))
def test_bfloat16_is_encoded_as_its_float32(x: Array, fmt: str) -> None:
    parts_equal(
        to_numpy(encode(to_torch(x), fmt)), to_numpy(encode(to_torch(x.astype(np.float32)), fmt))
    )


@given(weights(dtype=np.float16), st.sampled_from(EVERY))
def test_float16_is_encoded_as_its_float32(x: Array, fmt: str) -> None:
    parts_equal(
        to_numpy(encode(to_torch(x), fmt)), to_numpy(encode(to_torch(x.astype(np.float32)), fmt))
    )


@given(seeds, dtypes, st.sampled_from(EVERY))
def test_strides_do_not_matter(seed: int, dtype: type, fmt: str) -> None:
    """Transposed, stepped, offset, permuted and expanded views equal their contiguous copies."""
    rng = np.random.default_rng(seed)
    base = to_torch(finite(rng.standard_normal((64, 3, 96)), dtype))
    views = [
        base[:, 0, :64].T,
        base[::2, 1, 32:],
        base[5, :, 3:67],
        base.transpose(0, 1)[..., :64],
        base.permute(1, 2, 0)[:, :32],
        base[:1, :, :32].expand(4, 3, 32),
        base[:2, ::2, ::3],
    ]
    for view in views:
        assert not view.is_contiguous()
        parts_equal(to_numpy(encode(view, fmt)), to_numpy(encode(view.contiguous(), fmt)))
        assert torch.equal(amax(view, fmt), amax(view.contiguous(), fmt))


@pytest.mark.parametrize("fmt", EVERY)
@given(seed=seeds, dtype=dtypes)
def test_a_stack_is_its_matrices(fmt: str, seed: int, dtype: type) -> None:
    """[E, out, in]: each expert has scales of its own, and is encoded as it would be alone."""
    rng = np.random.default_rng(seed)
    x = finite(rng.standard_normal((3, 2, 64)) * 10.0 ** rng.uniform(-4, 4, (3, 1, 1)), dtype)
    x[seed % 3] *= seed % 2  # now and then a zero expert
    whole = to_numpy(encode(to_torch(x), fmt))
    for e in range(3):
        alone = to_numpy(encode(to_torch(x[e]), fmt))
        parts_equal({k: v[e] for k, v in whole.items()}, alone)
    deeper = to_numpy(encode(to_torch(x[None]), fmt))
    parts_equal({k: v[0] for k, v in deeper.items()}, whole)
    assert oracle.same_bits(
        decode({k: to_torch(v) for k, v in whole.items()}, fmt).numpy(), decoding.decode(whole, fmt)
    )
    assert (amax(to_torch(x), fmt).numpy() == np.abs(x.astype(np.float32)).max(axis=(1, 2))).all()


@given(seeds)
def test_a_stack_under_given_global_scales(seed: int) -> None:
    """One global scale or amax for each matrix, or one for all."""
    rng = np.random.default_rng(seed)
    x = finite(rng.standard_normal((3, 2, 64)) * 10.0 ** rng.uniform(-2, 2, (3, 1, 1)))
    each = (rng.uniform(0.5, 2, 3) * np.abs(x).max(axis=(1, 2))).astype(np.float32)
    parts_equal(
        to_numpy(encode(to_torch(x), "nvfp4", amax=to_torch(each))),
        oracle.nvfp4_encode(x, amax=each),
    )
    scale_2 = oracle.nvfp4_scale_2(each)
    wanted = oracle.nvfp4_encode(x, scale_2=scale_2)
    found = encode(to_torch(x), "nvfp4", weight_scale_2=to_torch(scale_2))
    parts_equal(to_numpy(found), wanted)
    again = encode(
        to_torch(x), "nvfp4", weight_scale_2=to_torch(scale_2), weight_scale=found["weight_scale"]
    )
    parts_equal(to_numpy(again), wanted)
    shared = to_numpy(encode(to_torch(x), "nvfp4", amax=float(each.max())))
    alike = oracle.nvfp4_encode(x, amax=each.max())
    assert (shared["weight"] == alike["weight"]).all() and (
        shared["weight_scale"] == alike["weight_scale"]
    ).all()
    assert (shared["weight_scale_2"] == alike["weight_scale_2"]).all()
    decoders_agree(shared, "nvfp4", oracle.nvfp4_decode(alike))


def filled(parts: dict[str, torch.Tensor], byte: int = 0xAA) -> dict[str, torch.Tensor]:
    """Return tensors like ``parts``, all bytes ``byte``: nothing that was there before can pass for
    a result.
    """
    return {
        k: torch.full(
            (*v.shape, v.element_size()) if v.ndim else (v.element_size(),), byte, dtype=torch.uint8
        )
        .view(v.dtype)
        .reshape(v.shape)
        for k, v in parts.items()
    }


@pytest.mark.parametrize("fmt", ["nvfp4", "w4a16_nvfp4", "mxfp8"])
@given(seed=seeds, shape=st.sampled_from([(3, 64), (2, 3, 32), (1, 2, 2, 32)]))
def test_out_is_written_into(fmt: str, seed: int, shape: tuple[int, ...]) -> None:
    """The given tensors hold the result and are the ones returned; those not given are
    allocated.
    """
    x = to_torch(finite(np.random.default_rng(seed).standard_normal(shape)))
    wanted = encode(x, fmt)
    for leaves in (["weight"], ["weight_scale"], ["weight", "weight_scale"]):
        out = filled({k: wanted[k] for k in leaves})
        found = encode(x, fmt, out=out)
        parts_equal(to_numpy(found), to_numpy(wanted))
        for leaf in leaves:
            assert found[leaf] is out[leaf]


@pytest.mark.parametrize("fmt", ["nvfp4", "mxfp8"])
@pytest.mark.parametrize(
    "shape",
    [
        (3, 1 << 17),
        (1, CHUNK),
        (2, CHUNK),
        (1, CHUNK + 32),
        (2, CHUNK - 32),
        (CHUNK // 512 - 1, 512),
        (CHUNK // 512, 512),
        (CHUNK // 512 + 1, 512),
        (2, CHUNK // 64 + 1, 32),
        (2731, 96),
    ],
)
def test_chunks_cover_every_row(fmt: str, shape: tuple[int, ...]) -> None:
    """Around whole multiples of the chunk, rows wider than it, stacks whose matrices end inside
    it.
    """
    rng = np.random.default_rng(1)
    x = finite(rng.standard_normal(shape, np.float32) * rng.uniform(0.1, 10, (*shape[:-1], 1)))
    x[..., -1, -3] = 1000  # the largest, in each matrix's last row
    t = to_torch(x)
    wanted = oracle.nvfp4_encode(x) if fmt == "nvfp4" else oracle.mxfp8_encode(x)
    fresh = {k: to_torch(v) for k, v in wanted.items() if k != "weight_scale_2"}
    if fmt == "nvfp4":
        fresh["weight_scale"] = fresh["weight_scale"].view(torch.float8_e4m3fn)
    else:
        fresh["weight"] = fresh["weight"].view(torch.float8_e4m3fn)
    found = to_numpy(encode(t, fmt, out=filled(fresh)))
    parts_equal(found, wanted)
    values = decoding.decode(found, fmt)
    out = torch.full(shape, -1.0)
    decode({k: to_torch(v) for k, v in found.items()}, fmt, out=out)
    assert oracle.same_bits(out.numpy(), values)
    assert (amax(t, fmt).numpy() == 1000).all()


@pytest.mark.parametrize("fmt", EVERY)
@given(seed=seeds, shape=st.sampled_from([(3, 64), (2, 3, 32), (2, 2, 2, 32)]), dtype=dtypes)
def test_not_finite_is_refused_by_index(
    fmt: str, seed: int, shape: tuple[int, ...], dtype: type
) -> None:
    """The first NaN or infinity, where it is and which it is."""
    rng = np.random.default_rng(seed)
    x = finite(rng.standard_normal(shape), dtype)
    flat = np.sort(rng.choice(x.size, 2, replace=False))
    bad = rng.choice([np.nan, np.inf, -np.inf])
    x.reshape(-1)[flat[0]] = bad
    x.reshape(-1)[flat[1]] = bad
    where = [int(i) for i in np.unravel_index(flat[0], shape)]
    name = "NaN" if np.isnan(bad) else "infinity"
    with pytest.raises(EncodeError) as caught:
        encode(to_torch(x), fmt)
    assert str(caught.value) == f"{name} at index {where} of a weight of shape {list(shape)}"


@pytest.mark.parametrize("how", ["own", "amax", "weight_scale_2"])
def test_not_finite_in_a_later_chunk(how: str) -> None:
    x = torch.zeros(2, 3, 1 << 17)
    x[1, 2, 70000] = float("-inf")
    given_scale = {
        "own": {},
        "amax": {"amax": 1.0},
        "weight_scale_2": {"weight_scale_2": torch.tensor(1.0)},
    }[how]
    with pytest.raises(
        EncodeError,
        match=r"infinity at index \[1, 2, 70000\] of a weight of shape \[2, 3, 131072\]",
    ):
        encode(x, "nvfp4", **given_scale)


# --- how well, on ordinary data


@pytest.mark.parametrize(("fmt", "wanted"), [("nvfp4", 0.0951), ("mxfp8", 0.0264)])
def test_relative_error_on_normal_data(fmt: str, wanted: float) -> None:
    """Root mean square error over that of the values, within 1% of what the format gives N(0,
    1).
    """
    x = np.random.default_rng(0).standard_normal((1024, 1024)).astype(np.float32)
    values = decode(encode(to_torch(x), fmt), fmt).numpy().astype(np.float64)
    error = np.sqrt(np.square(values - x).sum() / np.square(x.astype(np.float64)).sum())
    assert error == pytest.approx(wanted, rel=0.01)


# --- the verifier's yardsticks


def stored(rng: np.random.Generator, shape: tuple[int, int], fmt: str) -> dict[str, Array]:
    """Return random legal codes and moderate scales."""
    code = rng.integers(0, 256, shape).astype(np.uint8)
    if fmt in ("nvfp4", "w4a16_nvfp4"):
        scale = {"weight_scale": scale_bytes(rng, (shape[0], shape[1] // 16))}
        scale["weight_scale_2"] = np.asarray(10.0 ** rng.uniform(-6, 2), np.float32)
        return {"weight": code[:, ::2], **scale}
    code[(code & 0x7F) == 0x7F] = 0
    if fmt == "mxfp8":
        return {
            "weight": code,
            "weight_scale": rng.integers(100, 140, (shape[0], -(-shape[1] // 32))).astype(np.uint8),
        }
    scales = oracle.fp8_amax(np.ones(shape, np.float32), fmt)
    return {
        "weight": code,
        oracle.FP8_LEAF[fmt]: np.asarray(10.0 ** rng.uniform(-6, 2, scales.shape), np.float32),
    }


@pytest.mark.parametrize("fmt", EVERY)
@given(seed=seeds)
def test_nearest_is_never_worse_than_what_is_stored(fmt: str, seed: int) -> None:
    """Place by place, under the same scales, for any codes; the allowance is for a float32 quotient
    at a tie.
    """
    rng = np.random.default_rng(seed)
    parts = stored(rng, (3, 64), fmt)
    values = decoding.decode(parts, fmt)
    x = np.where(rng.random(values.shape) < 0.5, values, values[:, ::-1]) * rng.uniform(
        0.5, 1.5, values.shape
    )
    x = x.astype(np.float32)
    best = np.abs(yardstick.nearest(x, parts, fmt).astype(np.float64) - x)
    have = np.abs(values.astype(np.float64) - x)
    assert (best <= have * (1 + 2.0**-16) + np.abs(x) * 2.0**-22).all()
    assert (yardstick.nearest(values, parts, fmt) == values).all()


@pytest.mark.parametrize("fmt", EVERY)
@given(x=weights(kinds=("normal", "one_hot", "zero_blocks", "ties"), dtype=np.float32))
def test_nearest_of_the_exporter_s_scales_is_the_exporter_s_codes(fmt: str, x: Array) -> None:
    parts = to_numpy(encode(to_torch(x), fmt))
    assert (yardstick.nearest(x, parts, fmt) == decoding.decode(parts, fmt)).all()


@pytest.mark.parametrize("fmt", EVERY)
@given(
    seed=seeds,
    shape=st.sampled_from([(3, 64), (130, 160)]),
    sigma=st.sampled_from([1e-3, 0.02, 1.0, 30.0]),
)
def test_max_scales_are_the_exporter_s(
    fmt: str, seed: int, shape: tuple[int, int], sigma: float
) -> None:
    """On ordinary data, with an amax of its own and with a shared one."""
    x = finite(np.random.default_rng(seed).standard_normal(shape) * sigma)
    for top in (None, float(np.abs(x).max()) * 1.7):
        found = yardstick.max_scales(x, fmt, top)
        assert found is not None
        wanted = to_numpy(
            encode(to_torch(x), fmt, amax=top if fmt in ("nvfp4", "w4a16_nvfp4", "fp8") else None)
        )
        del wanted["weight"]
        found = {
            k: np.asarray(v).view(np.uint8) if v.dtype.itemsize == 1 else np.asarray(v)
            for k, v in found.items()
        }
        parts_equal(found, wanted)


def test_max_scales_of_nothing() -> None:
    """No scale for a zero tensor, nor for one that is not finite."""
    for fmt in EVERY:
        for value in (0.0, np.nan, np.inf):
            assert yardstick.max_scales(np.full((2, 32), value, np.float32), fmt) is None


@pytest.mark.parametrize("fmt", EVERY)
@pytest.mark.parametrize("value", [2.0**-149, 2.0**-140, F32_MAX])
def test_the_yardsticks_bear_the_ends_of_float32(fmt: str, value: float) -> None:
    """No warning, and scales that decode to no NaN."""
    x = np.zeros((1, 32), np.float32)
    x[0, :3] = value, -value / 2, value / 4
    scales = yardstick.max_scales(x, fmt)
    assert scales is None or not np.isnan(yardstick.nearest(x, scales, fmt)).any()


# --- what is refused, and what is empty


@pytest.mark.parametrize("fmt", EVERY)
@pytest.mark.parametrize("shape", [(0, 32), (4, 0), (0, 4, 32), (2, 0, 32), (2, 4, 0)])
def test_empty_tensors(fmt: str, shape: tuple[int, ...]) -> None:
    """Nothing in, nothing out: shapes as for any tensor, decoded to an empty tensor by both."""
    empty = np.zeros(shape, np.float32)
    if fmt == "mxfp8":  # numpy has no maximum of an axis of length 0
        blocks = np.zeros((*shape[:-1], shape[-1] // 32), np.uint8)
        wanted = {"weight": empty.astype(np.uint8), "weight_scale": blocks}
    else:
        wanted = oracle.fp8_encode(empty, fmt) if fmt in FP8 else oracle.nvfp4_encode(empty)
    found = encode(torch.zeros(shape), fmt)
    parts_equal(to_numpy(found), wanted)
    assert decode(found, fmt).shape == shape
    assert decoding.decode(to_numpy(found), fmt).shape == shape
    assert (amax(torch.zeros(shape), fmt) == torch.zeros(shape[:-2])).all()


@pytest.mark.parametrize(
    ("fmt", "width", "block"),
    [("nvfp4", 24, 16), ("w4a16_nvfp4", 17, 16), ("mxfp8", 48, 32), ("nvfp4", 1, 16)],
)
def test_a_width_that_the_block_does_not_divide(fmt: str, width: int, block: int) -> None:
    with pytest.raises(EncodeError, match=rf"\b{width}\b.*\b{block}\b"):
        encode(torch.zeros(2, width), fmt)
    with pytest.raises(EncodeError, match=rf"\b{width}\b.*\b{block}\b"):
        amax(torch.zeros(2, width), fmt)


X = torch.ones(4, 32)
ONE = torch.tensor(1.0)
SCALE = torch.ones(4, 2).to(torch.float8_e4m3fn)
E8M0 = torch.full((4, 1), 127, dtype=torch.uint8)
REFUSED = {
    "amax and weight_scale_2": lambda: encode(X, "nvfp4", amax=1.0, weight_scale_2=ONE),
    "weight_scale without weight_scale_2": lambda: encode(X, "nvfp4", weight_scale=SCALE),
    "weight_scale with amax": lambda: encode(X, "nvfp4", weight_scale=SCALE, amax=1.0),
    "mxfp8 with amax": lambda: encode(X, "mxfp8", amax=1.0),
    "mxfp8 with weight_scale_2": lambda: encode(X, "mxfp8", weight_scale_2=ONE),
    "fp8 with weight_scale_2": lambda: encode(X, "fp8", weight_scale_2=ONE),
    "fp8_per_channel with weight_scale_2": lambda: encode(X, "fp8_per_channel", weight_scale_2=ONE),
    "fp8 amax and weight_scale": lambda: encode(X, "fp8", amax=1.0, weight_scale=ONE),
    "fp8 with out": lambda: encode(
        X, "fp8", out={"weight": torch.zeros(4, 32, dtype=torch.float8_e4m3fn)}
    ),
    "amax NaN": lambda: encode(X, "nvfp4", amax=float("nan")),
    "amax infinite": lambda: encode(X, "nvfp4", amax=float("inf")),
    "amax negative": lambda: encode(X, "nvfp4", amax=-1.0),
    "no such format": lambda: encode(X, "nvfp5"),
    "no such format to decode": lambda: decode({}, "nvfp5"),
    "no such format for amax": lambda: amax(X, "nvfp5"),
    "integers": lambda: encode(X.int(), "nvfp4"),
    "float64": lambda: encode(X.double(), "mxfp8"),
    "one dimension": lambda: encode(X[0], "nvfp4"),
    "one dimension fp8": lambda: encode(X[0], "fp8"),
    "no dimension": lambda: encode(torch.tensor(1.0), "nvfp4"),
    "nvfp4 decode, scales that do not fit": lambda: decode(
        {
            "weight": torch.zeros(4, 16, dtype=torch.uint8),
            "weight_scale": SCALE[:, :1],
            "weight_scale_2": ONE,
        },
        "nvfp4",
    ),
    "mxfp8 decode, scales that do not fit": lambda: decode(
        {"weight": torch.zeros(4, 64, dtype=torch.uint8), "weight_scale": E8M0}, "mxfp8"
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    with pytest.raises(EncodeError):
        REFUSED[case]()


def test_infinity_before_a_nan_is_called_infinity() -> None:
    x = torch.ones(2, 32)
    x[0, 3], x[1, 0] = float("inf"), float("nan")
    for fmt, how in itertools.product(EVERY, (x, torch.stack([torch.ones(2, 32), x]))):
        with pytest.raises(EncodeError, match=r"^infinity at index \[(1, )?0, 3\]"):
            encode(how, fmt)


GIVEN_MISFITS = {
    "weight_scale_2 of two for three": lambda: encode(
        torch.ones(3, 4, 32), "nvfp4", weight_scale_2=torch.ones(2)
    ),
    "weight_scale_2 of four for one": lambda: encode(X, "nvfp4", weight_scale_2=torch.ones(4)),
    "amax of two for three": lambda: encode(torch.ones(3, 4, 32), "nvfp4", amax=torch.ones(2)),
    "nvfp4 weight_scale of one block": lambda: encode(
        X, "nvfp4", weight_scale_2=ONE, weight_scale=SCALE[:, :1]
    ),
    "nvfp4 weight_scale transposed": lambda: encode(
        X, "nvfp4", weight_scale_2=ONE, weight_scale=SCALE.T
    ),
    "nvfp4 weight_scale of another dtype": lambda: encode(
        X, "nvfp4", weight_scale_2=ONE, weight_scale=torch.ones(4, 2)
    ),
    "mxfp8 weight_scale of too many": lambda: encode(X, "mxfp8", weight_scale=E8M0.expand(4, 2)),
    "mxfp8 weight_scale transposed": lambda: encode(X, "mxfp8", weight_scale=E8M0.T),
    "mxfp8 weight_scale of another dtype": lambda: encode(
        X, "mxfp8", weight_scale=torch.ones(4, 1)
    ),
    "fp8 amax of two": lambda: encode(X, "fp8", amax=torch.ones(2)),
    "fp8_per_channel amax of three": lambda: encode(X, "fp8_per_channel", amax=torch.ones(3)),
    "fp8_block weight_scale of two": lambda: encode(X, "fp8_block", weight_scale=torch.ones(2, 1)),
}
BAD_BYTES = {"zero": 0x00, "NaN": 0x7F, "negative": 0xB8}
GIVEN_NONSENSE = {
    **{
        f"nvfp4 weight_scale_2 {value}": lambda value=value: encode(
            X, "nvfp4", weight_scale_2=torch.tensor(value)
        )
        for value in (0.0, -1.0, float("nan"), float("inf"))
    },
    **{
        f"nvfp4 weight_scale {name}": lambda byte=byte: encode(
            X, "nvfp4", weight_scale_2=ONE, weight_scale=as_scale(np.full((4, 2), byte, np.uint8))
        )
        for name, byte in BAD_BYTES.items()
    },
    "mxfp8 weight_scale NaN": lambda: encode(
        X, "mxfp8", weight_scale=torch.full((4, 1), 255, dtype=torch.uint8)
    ),
    **{
        f"{fmt} {what} {value}": lambda fmt=fmt, shape=shape, what=what, value=value: encode(
            X, fmt, **{what: torch.full(shape, value)}
        )
        for fmt, shape in (("fp8", ()), ("fp8_per_channel", (4,)), ("fp8_block", (1, 1)))
        for what, value in (
            ("amax", -1.0),
            ("amax", float("nan")),
            ("weight_scale", 0.0),
            ("weight_scale", float("nan")),
        )
    },
}
PACKED = torch.zeros(4, 16, dtype=torch.uint8)
BYTES = torch.zeros(4, 32, dtype=torch.uint8)
OUT_MISFITS = {
    "out of another shape": lambda: encode(X, "nvfp4", out={"weight": PACKED[:3].clone()}),
    "out transposed": lambda: encode(
        X, "nvfp4", out={"weight": torch.zeros(16, 4, dtype=torch.uint8)}
    ),
    "out of another dtype": lambda: encode(X, "nvfp4", out={"weight": torch.zeros(4, 16)}),
    "scales out of another dtype": lambda: encode(
        X, "nvfp4", out={"weight_scale": torch.zeros(4, 2, dtype=torch.uint8)}
    ),
    "mxfp8 out transposed": lambda: encode(
        X, "mxfp8", out={"weight": torch.zeros(32, 4, dtype=torch.float8_e4m3fn)}
    ),
    "decode out of another shape": lambda: decode(
        encode(X, "mxfp8"), "mxfp8", out=torch.zeros(32, 4)
    ),
}
PART_MISFITS = {
    "nvfp4 without weight_scale_2": lambda: decode(
        {"weight": PACKED, "weight_scale": SCALE}, "nvfp4"
    ),
    "nvfp4 without weight_scale": lambda: decode(
        {"weight": PACKED, "weight_scale_2": ONE}, "nvfp4"
    ),
    "mxfp8 without weight_scale": lambda: decode({"weight": BYTES}, "mxfp8"),
    "fp8 without weight_scale": lambda: decode({"weight": BYTES}, "fp8"),
    "nvfp4 global scales of two for three": lambda: decode(
        {**encode(torch.ones(3, 4, 32), "nvfp4"), "weight_scale_2": torch.ones(2)}, "nvfp4"
    ),
    "fp8 scale of three": lambda: decode({"weight": BYTES, "weight_scale": torch.ones(3)}, "fp8"),
    "fp8_per_channel scale of three": lambda: decode(
        {"weight": BYTES, "weight_scale": torch.ones(3)}, "fp8_per_channel"
    ),
    "fp8_block scale of three": lambda: decode(
        {"weight": BYTES, "weight_scale_inv": torch.ones(3, 1)}, "fp8_block"
    ),
}


@pytest.mark.parametrize("case", GIVEN_MISFITS)
def test_given_tensors_that_do_not_fit_are_refused(case: str) -> None:
    with pytest.raises(EncodeError):
        GIVEN_MISFITS[case]()


@pytest.mark.parametrize("case", GIVEN_NONSENSE)
def test_given_scales_that_no_reader_accepts_are_refused(case: str) -> None:
    with pytest.raises(EncodeError):
        GIVEN_NONSENSE[case]()


@pytest.mark.parametrize("case", OUT_MISFITS)
def test_out_that_does_not_fit_is_refused(case: str) -> None:
    with pytest.raises(EncodeError):
        OUT_MISFITS[case]()


@pytest.mark.parametrize("case", PART_MISFITS)
def test_parts_that_do_not_fit_are_refused(case: str) -> None:
    with pytest.raises(EncodeError):
        PART_MISFITS[case]()


@pytest.mark.parametrize("leaf", ["amax", "weight_scale_2"])
def test_a_global_scale_of_shape_one_is_a_scalar(leaf: str) -> None:
    """On disk it may be [] or [1] (`verifier.schemes.FORMATS`), and `decode` takes both."""
    given_scale, as_one = {leaf: torch.tensor(0.25)}, {leaf: torch.tensor([0.25])}
    wanted, found = (
        to_numpy(encode(X, "nvfp4", **given_scale)),
        to_numpy(encode(X, "nvfp4", **as_one)),
    )
    assert (found["weight"] == wanted["weight"]).all() and (
        found["weight_scale"] == wanted["weight_scale"]
    ).all()
    assert found["weight_scale_2"].reshape(-1) == wanted["weight_scale_2"]


@pytest.mark.parametrize("fmt", FP8)
def test_fp8_takes_a_scalar_amax(fmt: str) -> None:
    """Documented: in the scale's shape or a scalar."""
    x = np.random.default_rng(0).standard_normal((130, 140)).astype(np.float32)
    parts_equal(to_numpy(encode(to_torch(x), fmt, amax=3.0)), oracle.fp8_encode(x, fmt, amax=3.0))


def test_out_takes_the_global_scale_too() -> None:
    """By leaf, as documented: written, not passed over in silence."""
    x = to_torch(np.random.default_rng(0).standard_normal((4, 32)).astype(np.float32))
    wanted = encode(x, "nvfp4")
    out = filled(wanted)
    found = encode(x, "nvfp4", out=out)
    parts_equal(to_numpy(out), to_numpy(wanted))
    assert found["weight_scale_2"] is out["weight_scale_2"]


# --- back ends, threads, memory


def test_a_scale_whose_product_underflows_gives_code_zero_for_zero() -> None:
    """2^-9 * 2^-149 is 0 in float32: 0/0 is code 0, anything else over 0 saturates."""
    x = np.zeros((2, 32), np.float32)
    x[0, 3], x[1, 20], x[1, 21] = 1.0, -(2.0**-149), -0.0
    found = codes(x, np.full((2, 2), 1, np.uint8), np.float32(2.0**-149))
    wanted = np.where(x > 0, 7, np.where(x < 0, 15, 0))
    assert (found == wanted).all()


@pytest.mark.parametrize("top", [2.0**-149, 2.0**-140, 1343 * 2.0**-149, 1345 * 2.0**-149])
def test_the_global_scale_of_a_tiny_tensor_is_not_zero(top: float) -> None:
    """Where amax / 2688 underflows, the smallest subnormal takes its place."""
    x = np.zeros((2, 32), np.float32)
    x[1, 4] = -top
    found = to_numpy(encode(to_torch(x), "nvfp4"))
    assert found["weight_scale_2"] == np.float32(2.0**-149)
    parts_equal(found, oracle.nvfp4_encode(x))


@pytest.mark.parametrize("fmt", EVERY)
def test_a_part_may_end_one_row_into_the_next_matrix(fmt: str) -> None:
    x = torch.full((2, CHUNK // 32 - 1, 32), 0.5)
    x[0, 3, 1], x[1, 0, 5] = -3.0, 7.0
    assert amax(x, fmt).tolist() == [3.0, 7.0]


@pytest.mark.parametrize("fmt", EVERY)
@pytest.mark.parametrize("shape", [(64, 4096), (3, 200, 1024), (2, CHUNK + 64), (7, 96)])
def test_threads_give_the_same_bytes(fmt: str, shape: tuple[int, ...]) -> None:
    """And leave the number of intra-op threads as it was."""
    x = to_torch(finite(np.random.default_rng(4).standard_normal(shape) * 3))
    before = torch.get_num_threads()
    one, three = encode(x, fmt, threads=1), encode(x, fmt, threads=3)
    parts_equal(to_numpy(three), to_numpy(one))
    assert torch.equal(decode(one, fmt, threads=3), decode(one, fmt, threads=1))
    assert torch.equal(amax(x, fmt, threads=3), x.abs().amax((-2, -1)))
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("threads", [1, 3])
def test_of_two_bad_values_the_first_is_named_whatever_the_threads(threads: int) -> None:
    x = torch.zeros(64, 1 << 14)
    x[17, 5] = float("nan")
    x[63, 0] = float("inf")
    for given_scale in ({}, {"amax": 1.0}):
        with pytest.raises(EncodeError, match=r"^NaN at index \[17, 5\]"):
            encode(x, "nvfp4", threads=threads, **given_scale)
    with pytest.raises(EncodeError, match=r"^NaN at index \[17, 5\]"):
        encode(x, "mxfp8", threads=threads)


def test_no_thread_is_refused() -> None:
    with pytest.raises(EncodeError, match="threads is 0"):
        encode(X, "nvfp4", threads=0)


def test_a_parameter_is_encoded_and_no_graph_is_kept() -> None:
    x = torch.nn.Parameter(to_torch(finite(np.random.default_rng(5).standard_normal((3, 64)))))
    for fmt in EVERY:
        found = encode(x, fmt)
        parts_equal(to_numpy(found), to_numpy(encode(x.detach(), fmt)))
        assert not any(part.requires_grad for part in found.values())
        assert not decode(found, fmt).requires_grad


def test_a_stack_of_transposed_matrices_is_read_where_it_lies() -> None:
    """[E, in, out] transposed has no view as rows; parts that end within a matrix, and parts that
    hold several.
    """
    for shape in ((3, 640, 1030), (5, 64, 32), (2, 3, 64, 48)):
        base = to_torch(finite(np.random.default_rng(6).standard_normal(shape)))
        view = base.transpose(-1, -2)
        if view.shape[-1] % 32:
            view = view[..., : view.shape[-1] // 32 * 32]
        for fmt in ("nvfp4", "mxfp8"):
            parts_equal(to_numpy(encode(view, fmt)), to_numpy(encode(view.contiguous(), fmt)))


@given(
    st.integers(0, 3000),
    st.sampled_from([0, 1, 32, 96, 4096, CHUNK - 32, CHUNK, CHUNK + 32, 3 * CHUNK]),
)
def test_chunks_tile_the_rows(rows: int, width: int) -> None:
    """In order, without a gap, none empty, and none of more than `CHUNK` elements: the bound on all
    temporaries.
    """
    rows = min(rows, 8 * CHUNK // max(width, 1))
    chunks = list(chunks_of(rows, width))
    sizes = [(c.stop - c.start) * (c.right - c.left) for c in chunks]
    assert sum(sizes) == rows * width
    assert all(0 < size <= CHUNK for size in sizes)
    flat = 0
    for chunk, size in zip(chunks, sizes, strict=True):
        assert chunk.start * width + chunk.left == flat
        assert (chunk.left, chunk.right) == (0, width) or chunk.stop == chunk.start + 1
        flat += size


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the most bytes that a single torch operation returned in new memory."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        found = func(*args, **(kwargs or {}))
        known = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        for value in found if isinstance(found, tuple) else (found,):
            if isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() not in known:
                self.bytes = max(self.bytes, value.untyped_storage().nbytes())
        return found


@pytest.mark.parametrize("fmt", EVERY)
@pytest.mark.parametrize("layout", ["rows", "one row", "transposed stack"])
def test_temporaries_do_not_grow_with_the_tensor(fmt: str, layout: str, back_end: str) -> None:
    """With ``out=``, nothing of more than a part's elements as float32 is allocated, whatever the
    layout.
    """
    x = torch.linspace(-1, 1, 8 * CHUNK)
    x = {
        "rows": lambda: x.view(512, -1),
        "one row": lambda: x.view(1, -1),
        "transposed stack": lambda: x.view(4, 1024, -1).transpose(1, 2),
    }[layout]()
    out = encode(x, fmt, threads=1)
    values = torch.empty(x.shape)
    with Largest() as noted:
        if fmt not in FP8:
            encode(x, fmt, out=dict(out), threads=1)
        else:
            amax(x, fmt, threads=1)
        decode(out, fmt, out=values, threads=1)
    assert noted.bytes <= 4 * CHUNK
    assert noted.bytes or back_end == "numba"
