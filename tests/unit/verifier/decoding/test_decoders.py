# SPDX-License-Identifier: Apache-2.0
"""Decoders of every format against values that are packed here code by code, in plain Python."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from verifier.decoding import DECODERS, decode
from verifier.errors import ContentError
from verifier.schemes import FORMATS

BF16, E4M3, E8M0 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e8m0fnu
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]
Array = np.ndarray[Any, Any]


def codes_of(shape: tuple[int, ...], bits: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed + bits).integers(0, 1 << bits, shape)


def scales_of(shape: tuple[int, ...], seed: int = 1) -> Array:
    return (2.0 ** np.random.default_rng(seed).integers(-6, 3, shape) * 1.5).astype(np.float32)


def stream(codes: Array, bits: int, width: int = 32) -> Array:
    """Pack each row into little-endian words: code k at bit k * bits of a long number."""
    rows = []
    for row in codes:
        number = sum(int(code) << (k * bits) for k, code in enumerate(row))
        count = -(-len(row) * bits // width)
        rows.append([(number >> (width * i)) & ((1 << width) - 1) for i in range(count)])
    dtype = {8: np.uint8, 32: np.uint32}[width]
    return np.array(rows, np.uint64).astype(dtype)


def e6(code: int, mantissa: int) -> float:
    """Return the value of a six-bit float: sign, exponent, mantissa of so many bits."""
    exponent, fraction = (code & 31) >> mantissa, (code & ((1 << mantissa) - 1)) / (1 << mantissa)
    bias = {3: 1, 2: 3}[mantissa]
    size = (
        fraction * 2.0 ** (1 - bias) if exponent == 0 else (1 + fraction) * 2.0 ** (exponent - bias)
    )
    return -size if code & 32 else size


def test_every_format_is_decoded_or_says_that_it_is_not() -> None:
    assert set(DECODERS) == {f.name for f in FORMATS.values() if f.decodes}
    for name in set(FORMATS) - set(DECODERS):
        with pytest.raises(ContentError, match="not decoded"):
            decode({"weight": np.zeros((2, 2), np.uint8)}, name)


@pytest.mark.parametrize("name", ["nvfp4", "w4a16_nvfp4", "w4a8_nvfp4_fp8", "nvfp4_quark"])
def test_nvfp4_and_its_kin(name: str) -> None:
    codes, blocks = codes_of((3, 32), 4), scales_of((3, 2)).astype(E4M3)
    parts = {
        "weight": (codes[:, 0::2] | codes[:, 1::2] << 4).astype(np.uint8),
        "weight_scale": blocks,
        "weight_scale_2": np.float32(0.25),
    }
    wanted = np.array(
        [
            [E2M1[c] * float(blocks[r, k // 16]) * 0.25 for k, c in enumerate(row)]
            for r, row in enumerate(codes)
        ]
    )
    assert np.array_equal(decode(parts, name), wanted.astype(np.float32))


def test_nvfp4_weights_alone_in_groups_of_32() -> None:
    codes, blocks = codes_of((3, 64), 4), scales_of((3, 2)).astype(E4M3)
    parts = {
        "weight": (codes[:, 0::2] | codes[:, 1::2] << 4).astype(np.uint8),
        "weight_scale": blocks,
        "weight_scale_2": np.float32(0.5),
    }
    wanted = np.array(E2M1)[codes] * np.repeat(blocks.astype(np.float32), 32, axis=1) * 0.5
    assert np.array_equal(decode(parts, FORMATS["w4a16_nvfp4"].sized(block=(1, 32))), wanted)
    with pytest.raises(ContentError, match="does not fit"):
        decode(parts, "w4a16_nvfp4")


def nvfp4_parts(rows: int, width: int) -> tuple[dict[str, Array], Array]:
    codes, blocks = codes_of((rows, width), 4), scales_of((rows, width // 16)).astype(E4M3)
    parts = {
        "weight": (codes[:, 0::2] | codes[:, 1::2] << 4).astype(np.uint8),
        "weight_scale": blocks,
        "weight_scale_2": np.asarray(0.25, np.float32),
    }
    return parts, np.array(E2M1)[codes] * np.repeat(blocks.astype(np.float64), 16, axis=1) * 0.25


@pytest.mark.parametrize("dtype", [BF16, np.float32, np.float16])
def test_awq_weights_are_multiplied_by_the_scale_of_their_inputs(dtype: Any) -> None:
    parts, plain = nvfp4_parts(3, 32)
    pre = scales_of((32,), 5).astype(dtype)
    wanted = plain * pre.astype(np.float64)[None, :]
    assert np.array_equal(decode(parts | {"pre_quant_scale": pre}, "nvfp4_awq"), wanted)
    assert np.array_equal(decode(parts, "nvfp4_awq"), plain)
    with pytest.raises(ContentError, match="pre_quant_scale of"):
        decode(parts | {"pre_quant_scale": pre[:3]}, "nvfp4_awq")


def test_a_low_rank_correction_sees_the_scaled_inputs() -> None:
    """With x' = pre * x, the layer gives W x' + B A x': its weight is (W + B A) diag(pre)."""
    parts, plain = nvfp4_parts(3, 32)
    a = np.arange(64, dtype=np.float32).reshape(2, 32).astype(BF16)
    b = np.array([[1, -1], [0.5, 2], [0, 1]], BF16)
    pre = scales_of((32,), 5).astype(BF16)
    parts |= {"svdquant_lora_a": a, "svdquant_lora_b": b, "pre_quant_scale": pre}
    whole = plain + b.astype(np.float64) @ a.astype(np.float64)
    assert np.allclose(decode(parts, "nvfp4_svd"), whole * pre.astype(np.float64), rtol=1e-6)
    with pytest.raises(ContentError, match="correction"):
        decode(parts | {"svdquant_lora_b": b[:2]}, "nvfp4_svd")


def test_global_scales_of_compressed_tensors_are_divisors() -> None:
    codes, blocks = codes_of((2, 16), 4), scales_of((2, 1)).astype(E4M3)
    parts = {
        "weight_packed": (codes[:, 0::2] | codes[:, 1::2] << 4).astype(np.uint8),
        "weight_scale": blocks,
        "weight_global_scale": np.array([4.0], np.float32),
    }
    wanted = np.array(E2M1)[codes] * blocks.astype(np.float64) / 4.0
    assert np.array_equal(decode(parts, "nvfp4_ct"), wanted)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
@pytest.mark.parametrize(
    ("weight", "scale"),
    [("weight", "weight_scale"), ("weight_packed", "weight_scale"), ("weight", "scale")],
)
@pytest.mark.parametrize("name", ["mxfp4", "w4a8_mxfp4_fp8"])
def test_mxfp4_under_all_its_names(name: str, weight: str, scale: str, dtype: Any) -> None:
    codes = codes_of((2, 64), 4)
    exponents = np.array([[127, 120], [130, 127]], np.uint8)
    packed = (codes[:, 0::2] | codes[:, 1::2] << 4).astype(np.uint8).view(dtype)
    stored = exponents.view(E8M0) if scale == "scale" else exponents
    wanted = np.array(E2M1)[codes] * 2.0 ** np.repeat(exponents.astype(float) - 127, 32, axis=1)
    assert np.array_equal(decode({weight: packed, scale: stored}, name), wanted)


@pytest.mark.parametrize(("name", "mantissa"), [("mxfp6_e2m3", 3), ("mxfp6_e3m2", 2)])
@pytest.mark.parametrize("leaf", ["weight", "weight_packed"])
def test_mxfp6(name: str, mantissa: int, leaf: str) -> None:
    codes = codes_of((2, 64), 6)
    exponents = np.array([[127, 120], [130, 127]], np.uint8)
    parts = {leaf: stream(codes, 6, 8), "weight_scale": exponents}
    values = np.array([[e6(int(c), mantissa) for c in row] for row in codes])
    wanted = values * 2.0 ** np.repeat(exponents.astype(float) - 127, 32, axis=1)
    assert np.array_equal(decode(parts, name), wanted)


@pytest.mark.parametrize("dtype", [np.float32, BF16, np.float16])
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("fp8", (1,)),
        ("fp8_per_channel", (160,)),
        ("fp8_per_channel", (160, 1)),
        ("fp8_block", (2, 3)),
    ],
)
def test_fp8_scales_in_the_models_dtype(name: str, shape: tuple[int, ...], dtype: Any) -> None:
    codes = codes_of((160, 320), 8) & 0x77
    scale = scales_of(shape).astype(dtype)
    leaf = "weight_scale_inv" if name == "fp8_block" else "weight_scale"
    values = codes.astype(np.uint8).view(E4M3).astype(np.float64)
    grid = scale.astype(np.float64)
    if name == "fp8_block":
        grid = np.array([[grid[i // 128, j // 128] for j in range(320)] for i in range(160)])
    elif name == "fp8_per_channel":
        grid = grid.reshape(160, 1)
    parts = {"weight": codes.astype(np.uint8).view(E4M3), leaf: scale}
    assert np.array_equal(decode(parts, name), values * grid)


@pytest.mark.parametrize(
    ("name", "size", "stored"),
    [("fp8_block", 128, E8M0), ("mxfp8_block", 32, E8M0), ("mxfp8_block", 32, np.uint8)],
)
def test_tiles_with_scales_that_are_powers_of_two(name: str, size: int, stored: Any) -> None:
    codes = (codes_of((160, 320), 8) & 0x77).astype(np.uint8)
    exponents = np.random.default_rng(3).integers(120, 134, (-(-160 // size), -(-320 // size)))
    factors = [
        [2.0 ** (exponents[i // size, j // size] - 127) for j in range(320)] for i in range(160)
    ]
    parts = {"weight": codes.view(E4M3), "scale": exponents.astype(np.uint8).view(stored)}
    wanted = codes.view(E4M3).astype(np.float64) * np.array(factors)
    assert np.array_equal(decode(parts, name), wanted)


@pytest.mark.parametrize("shape", [(), (1,), (4,), (4, 1), (4, 2)])
@pytest.mark.parametrize("zero", [False, True])
def test_int8(shape: tuple[int, ...], zero: bool) -> None:
    codes = codes_of((4, 16), 8).astype(np.uint8).view(np.int8)
    scale = scales_of(shape).astype(BF16)
    parts: dict[str, Array] = {"weight": codes, "weight_scale": scale}
    shift = np.zeros(shape)
    if zero:
        shift = np.random.default_rng(2).integers(-9, 9, shape)
        parts["weight_zero_point"] = np.asarray(shift, np.int8)

    def spread(values: Any) -> Array:
        values = np.asarray(values, np.float64)
        if values.size == 1:
            return values.reshape(1, 1)
        return np.repeat(values.reshape(4, -1), 16 // (values.size // 4), axis=1)

    wanted = (codes - spread(shift)) * spread(scale)
    assert np.array_equal(decode(parts, "int8"), wanted)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("kind", ["group", "channel", "asymmetric", "g_idx"])
def test_packed_integers_of_compressed_tensors(bits: int, kind: str) -> None:
    out, in_, groups = 5, 48, 1 if kind == "channel" else 3
    half = 1 << (bits - 1)
    codes = codes_of((out, in_), bits)
    scale = scales_of((out, groups)).astype(BF16)
    of_input = np.arange(in_) // (in_ // groups)
    parts: dict[str, Array] = {
        "weight_packed": stream(codes, bits).view(np.int32),
        "weight_scale": scale,
        "weight_shape": np.array([out, in_], np.int64),
    }
    shift = np.zeros((out, groups))
    if kind == "asymmetric":
        zeros = codes_of((out, groups), bits, 7)
        shift = zeros - half
        parts["weight_zero_point"] = np.ascontiguousarray(stream(zeros.T, bits).view(np.int32).T)
    if kind == "g_idx":
        of_input = np.random.default_rng(4).permutation(of_input)
        parts["weight_g_idx"] = of_input.astype(np.int32)
    block = None if kind == "channel" else (1, in_ // groups)
    fmt = FORMATS["int_packed"].sized(bits=bits, block=block)
    wanted = (codes - half - shift[:, of_input]) * scale.astype(np.float64)[:, of_input]
    assert np.array_equal(decode(parts, fmt), wanted)


def test_packed_integers_without_their_shape_hold_what_the_words_hold() -> None:
    codes = codes_of((2, 16), 4)
    parts = {
        "weight_packed": stream(codes, 4).view(np.int32),
        "weight_scale": np.ones((2, 2), BF16),
    }
    assert np.array_equal(decode(parts, FORMATS["int_packed"].sized(block=(1, 8))), codes - 8)
    with pytest.raises(ContentError, match="weight_shape"):
        decode(parts | {"weight_shape": np.array([2, 40])}, "int_packed")


@pytest.mark.parametrize("name", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("permuted", [None, False, True])
def test_gptq(name: str, bits: int, permuted: bool | None) -> None:
    out, in_, groups = 32, 64, 2
    codes = codes_of((in_, out), bits)
    zeros = codes_of((groups, out), bits, 9) // 2
    scale = scales_of((groups, out)).astype(np.float16)
    of_input = np.arange(in_) // (in_ // groups)
    parts: dict[str, Array] = {
        "qweight": np.ascontiguousarray(stream(codes.T, bits).view(np.int32).T),
        "qzeros": stream(zeros, bits).view(np.int32),
        "scales": scale,
    }
    if permuted is not None:
        of_input = np.random.default_rng(5).permutation(of_input) if permuted else of_input
        parts["g_idx"] = of_input.astype(np.int32)
    meant = zeros + (1 if name == "gptq" else 0)
    fmt = FORMATS[name].sized(bits=bits, block=(1, in_ // groups))
    wanted = ((codes - meant[of_input]) * scale.astype(np.float64)[of_input]).T
    assert np.array_equal(decode(parts, fmt), wanted)


def in_awq_order(codes: Array) -> Array:
    """Pack eight columns a word: nibble k holds column (0, 2, 4, 6, 1, 3, 5, 7)[k]."""
    words = np.zeros((codes.shape[0], codes.shape[1] // 8), np.uint32)
    for k, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
        words |= (codes[:, column::8].astype(np.uint32)) << np.uint32(4 * k)
    return words.view(np.int32)


def test_awq() -> None:
    codes, zeros = codes_of((64, 16), 4), codes_of((2, 16), 4, 3)
    scale = scales_of((2, 16)).astype(np.float16)
    parts = {"qweight": in_awq_order(codes), "qzeros": in_awq_order(zeros), "scales": scale}
    of_input = np.arange(64) // 32
    wanted = ((codes - zeros[of_input]) * scale.astype(np.float64)[of_input]).T
    assert np.array_equal(decode(parts, FORMATS["awq"].sized(block=(1, 32))), wanted)
    with pytest.raises(ContentError, match="8 bits"):
        decode(parts, FORMATS["awq"].sized(bits=8))


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("order", ["", "_order"])
def test_four_bits_of_quark(signed: bool, order: str) -> None:
    codes, zeros = codes_of((64, 16), 4), codes_of((2, 16), 4, 3)
    scale = scales_of((2, 16))
    pack = in_awq_order if not order else (lambda c: stream(c, 4).view(np.int32))
    parts = {"weight": pack(codes), "weight_scale": scale}
    of_input = np.arange(64) // 32
    if signed:
        q: Array = np.where(codes > 7, codes - 16, codes)
    else:
        parts["weight_zero_point"] = pack(zeros)
        q = codes - zeros[of_input]
    wanted = (q * scale.astype(np.float64)[of_input]).T
    assert np.array_equal(decode(parts, f"{'int4' if signed else 'uint4'}_quark{order}"), wanted)


@pytest.mark.parametrize("name", ["int4_awq", "w4a8_awq"])
def test_four_bits_of_modelopt_pack_two_rows(name: str) -> None:
    codes = codes_of((6, 32), 4)
    scale = scales_of((6, 2)).astype(BF16)
    parts = {
        "weight": (codes[0::2] | codes[1::2] << 4).astype(np.uint8),
        "weight_scale": scale,
        "weight_scale_2": np.asarray(3.0, np.float32),
        "pre_quant_scale": scales_of((32,), 8).astype(BF16),
    }
    q = np.where(codes > 7, codes - 16, codes)
    wanted = q * np.repeat(scale.astype(np.float64), 16, axis=1)
    wanted = wanted * parts["pre_quant_scale"].astype(np.float64)
    assert np.array_equal(decode(parts, name), wanted)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_affine_of_mlx(bits: int) -> None:
    codes = codes_of((3, 64), bits)
    scale, bias = scales_of((3, 2)).astype(BF16), scales_of((3, 2), 4).astype(BF16)
    parts = {"weight": stream(codes, bits), "scales": scale, "biases": bias}
    spread = [np.repeat(x.astype(np.float64), 32, axis=1) for x in (scale, bias)]
    fmt = FORMATS["mlx_affine"].sized(bits=bits, block=(1, 32))
    assert np.array_equal(decode(parts, fmt), codes * spread[0] + spread[1])


@pytest.mark.parametrize(
    ("name", "size"), [("mlx_mxfp4", 32), ("mlx_nvfp4", 16), ("mlx_mxfp8", 32)]
)
def test_small_floats_of_mlx(name: str, size: int) -> None:
    bits = 8 if name == "mlx_mxfp8" else 4
    codes = codes_of((2, 64), bits) & (0x77 if bits == 8 else 0xF)
    values = (
        codes.astype(np.uint8).view(E4M3).astype(np.float64) if bits == 8 else np.array(E2M1)[codes]
    )
    stored = np.random.default_rng(1).integers(40, 60, (2, 64 // size)).astype(np.uint8)
    factor = (
        stored.view(E4M3).astype(np.float64) if name == "mlx_nvfp4" else 2.0 ** (stored - 127.0)
    )
    parts = {"weight": stream(codes, bits), "scales": stored}
    assert np.array_equal(decode(parts, name), values * np.repeat(factor, size, axis=1))


MISFITS: dict[str, tuple[str, dict[str, Array]]] = {
    "no scale": ("int_packed", {"weight_packed": np.zeros((2, 4), np.int32)}),
    "scale of three groups": (
        "int_packed",
        {"weight_packed": np.zeros((2, 4), np.int32), "weight_scale": np.ones((2, 3), np.float32)},
    ),
    "words of one byte": (
        "gptq",
        {
            "qweight": np.zeros((2, 8), np.uint8),
            "qzeros": np.zeros((1, 1), np.int32),
            "scales": np.ones((1, 8), np.float16),
        },
    ),
    "no zero points": (
        "gptq",
        {"qweight": np.zeros((2, 8), np.int32), "scales": np.ones((1, 8), np.float16)},
    ),
    "zero points of other groups": (
        "gptq",
        {
            "qweight": np.zeros((2, 8), np.int32),
            "qzeros": np.zeros((2, 1), np.int32),
            "scales": np.ones((1, 8), np.float16),
        },
    ),
    "a group that is not there": (
        "gptq",
        {
            "qweight": np.zeros((2, 8), np.int32),
            "qzeros": np.zeros((1, 1), np.int32),
            "scales": np.ones((1, 8), np.float16),
            "g_idx": np.full(16, 1, np.int32),
        },
    ),
    "an index of another width": (
        "gptq",
        {
            "qweight": np.zeros((2, 8), np.int32),
            "qzeros": np.zeros((1, 1), np.int32),
            "scales": np.ones((1, 8), np.float16),
            "g_idx": np.zeros(8, np.int32),
        },
    ),
    "three bytes": (
        "mxfp6_e2m3",
        {"weight": np.zeros((2, 4), np.uint8), "weight_scale": np.zeros((2, 1), np.uint8)},
    ),
    "scales of halves": (
        "int8",
        {"weight": np.zeros((4, 4), np.int8), "weight_scale": np.ones((3,), np.float32)},
    ),
    "a vector": ("int8", {"weight": np.zeros(4, np.int8), "weight_scale": np.ones((), np.float32)}),
    "no biases": (
        "mlx_affine",
        {"weight": np.zeros((2, 8), np.uint32), "scales": np.ones((2, 1), np.float16)},
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_parts_that_do_not_fit_are_named(case: str) -> None:
    fmt, parts = MISFITS[case]
    with pytest.raises(ContentError):
        decode(parts, fmt)
