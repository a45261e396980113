# SPDX-License-Identifier: Apache-2.0
"""Every code, every scale byte, every pair of them, in both decoders; every bfloat16 value in the
encoders.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

from exporter.codecs import decode, encode
from tests import oracle
from tests.conftest import to_numpy, to_torch
from verifier import decoding

pytestmark = pytest.mark.usefixtures("back_end")
BYTES = np.arange(256, dtype=np.uint8)
E2M1 = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
E4M3 = BYTES.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
E8M0 = BYTES.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
FP8_SCALES = {"fp8": (), "fp8_per_channel": (256,), "fp8_block": (2, 2)}


def both(parts: dict[str, np.ndarray], fmt: str, wanted: np.ndarray) -> None:
    """Both decoders give ``wanted``, to the bit."""
    assert oracle.same_bits(decode({k: to_torch(v) for k, v in parts.items()}, fmt).numpy(), wanted)
    assert oracle.same_bits(decoding.decode(parts, fmt), wanted)


def nvfp4(packed: np.ndarray, scale: np.ndarray, scale_2: float = 1.0) -> dict[str, np.ndarray]:
    return {
        "weight": packed,
        "weight_scale": scale,
        "weight_scale_2": np.asarray(scale_2, np.float32),
    }


def test_the_tables_are_the_standard_s() -> None:
    """OCP MX v1.0 section 5.3, so that ml_dtypes itself is held to something."""
    assert E2M1[:8].tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert oracle.same_bits(E2M1[8:], -E2M1[:8])
    for code in range(127):
        exponent, mantissa = code >> 3, code & 7
        assert E4M3[code] == (
            mantissa * 2.0**-9 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
        )
        assert E4M3[code + 128] == -E4M3[code]
    assert np.isnan(E4M3[[127, 255]]).all()
    assert [float(v) for v in E8M0[:255]] == [2.0 ** (b - 127) for b in range(255)]
    assert np.isnan(E8M0[255])


def test_the_verifier_s_tables() -> None:
    assert oracle.same_bits(decoding.e2m1_table(), E2M1)
    assert oracle.same_bits(decoding.e4m3_table(), E4M3)
    assert oracle.same_bits(decoding.e8m0_table(), E8M0)


def test_torch_dtypes_agree_with_ml_dtypes() -> None:
    """Torch 2.13 converts E4M3 and E8M0; for float4_e2m1fn_x2 it has no conversion to compare
    with.
    """
    every = torch.from_numpy(BYTES.copy())
    assert oracle.same_bits(every.view(torch.float8_e4m3fn).float().numpy(), E4M3)
    assert oracle.same_bits(every.view(torch.float8_e8m0fnu).float().numpy(), E8M0)


def test_every_packed_byte() -> None:
    """All 256 bytes under scale one: 16 codes in each nibble, the low nibble first."""
    packed = BYTES.reshape(4, 64)
    wanted = np.stack([E2M1[packed & 15], E2M1[packed >> 4]], axis=-1).reshape(4, 128)
    both(nvfp4(packed, np.full((4, 8), 0x38, np.uint8)), "nvfp4", wanted)


@pytest.mark.parametrize(
    "scale_2", [1.0, 0.1, -0.3, 2.0**-140, 1e38, 0.0, float("inf"), float("nan")]
)
@pytest.mark.parametrize("fmt", ["nvfp4", "w4a16_nvfp4"])
def test_every_scale_byte_with_every_e2m1_code(fmt: str, scale_2: float) -> None:
    row = np.arange(0, 16, 2, dtype=np.uint8)
    packed = np.broadcast_to(row | ((row + 1) << 4), (256, 8)).copy()
    with np.errstate(all="ignore"):
        wanted = (E4M3 * np.float32(scale_2))[:, None] * E2M1[None, :]
    both(nvfp4(packed, BYTES.reshape(256, 1), scale_2), fmt, wanted)


def test_every_e4m3_code_under_every_e8m0_scale() -> None:
    codes = np.broadcast_to(BYTES, (256, 256)).copy()
    scale = np.broadcast_to(BYTES[:, None], (256, 8)).copy()
    with np.errstate(all="ignore"):
        wanted = E4M3[None, :] * E8M0[:, None]
    both({"weight": codes, "weight_scale": scale}, "mxfp8", wanted)
    both({"weight": codes, "weight_scale_inv": scale}, "mxfp8", wanted)


def test_on_disk_dtypes_are_read_as_their_bytes_are() -> None:
    """E8M0 and E4M3 in their own dtypes instead of raw bytes."""
    codes, scale = BYTES.reshape(2, 128), np.arange(120, 128, dtype=np.uint8).reshape(2, 4)
    typed = {
        "weight": codes.view(ml_dtypes.float8_e4m3fn),
        "weight_scale": scale.view(ml_dtypes.float8_e8m0fnu),
    }
    mine = {
        "weight": to_torch(codes).view(torch.float8_e4m3fn),
        "weight_scale": to_torch(scale).view(torch.float8_e8m0fnu),
    }
    wanted = E4M3[codes] * np.repeat(E8M0[scale], 32, axis=-1)
    assert oracle.same_bits(decoding.decode(typed, "mxfp8"), wanted)
    assert oracle.same_bits(decode(mine, "mxfp8").numpy(), wanted)


@pytest.mark.parametrize("fmt", FP8_SCALES)
@pytest.mark.parametrize("scale", [1.0, 0.1, 2.0**-140, 1e38])
def test_every_e4m3_code_under_a_float32_scale(fmt: str, scale: float) -> None:
    codes = np.broadcast_to(BYTES, (256, 256)).copy()
    parts = {"weight": codes, oracle.FP8_LEAF[fmt]: np.full(FP8_SCALES[fmt], scale, np.float32)}
    with np.errstate(all="ignore"):
        both(parts, fmt, E4M3[codes] * np.float32(scale))


@pytest.fixture(scope="module")
def every_bfloat16() -> np.ndarray:
    """Every finite bfloat16, float32 [n, 32]."""
    values = np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.bfloat16).astype(np.float32)
    values = values[np.isfinite(values)]
    assert values.size == 65280
    return values.reshape(-1, 32)


def test_every_bfloat16_to_e2m1(every_bfloat16: np.ndarray) -> None:
    """Under scale one: the code is the nearest, ties to the even code, decided here by exact
    thresholds.
    """
    scale = torch.ones(every_bfloat16.shape[0], 2).to(torch.float8_e4m3fn)
    parts = encode(
        to_torch(every_bfloat16), "nvfp4", weight_scale_2=torch.tensor(1.0), weight_scale=scale
    )
    codes = oracle.nvfp4_codes(to_numpy(parts))
    size = np.abs(every_bfloat16)
    wanted = sum(
        (size > t if low % 2 == 0 else size >= t).astype(np.uint8)
        for low, t in enumerate((0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0))
    ) | np.where(every_bfloat16 < 0, np.uint8(8), np.uint8(0))
    assert (codes == wanted).all()
    assert (codes == oracle.e2m1(every_bfloat16)).all()


@pytest.mark.parametrize("exponent", [-127, -126, -8, 0, 5, 120])
def test_every_bfloat16_to_e4m3(every_bfloat16: np.ndarray, exponent: int) -> None:
    scale = np.full((every_bfloat16.shape[0], 1), 127 + exponent, np.uint8)
    parts = to_numpy(encode(to_torch(every_bfloat16), "mxfp8", weight_scale=to_torch(scale)))
    assert (parts["weight"] == oracle.mxfp8_encode(every_bfloat16, scale=scale)["weight"]).all()
    assert (parts["weight_scale"] == scale).all()


def test_every_e4m3_code_is_reached_and_kept() -> None:
    """Each finite code is the encoding of its own value."""
    codes = np.delete(BYTES, [127, 255])
    codes = np.concatenate([codes, [0x7E, 0xFE]]).astype(np.uint8).reshape(8, 32)
    scale = np.full((8, 1), 127, np.uint8)
    parts = to_numpy(encode(to_torch(E4M3[codes]), "mxfp8", weight_scale=to_torch(scale)))
    assert (parts["weight"] == codes).all()


def test_every_block_maximum_near_a_boundary() -> None:
    """448 * 2^k and its float32 neighbours for every k: where a float32 log2 goes wrong."""
    powers = (1.75 * 2.0 ** np.arange(-149, 128)).astype(np.float32)
    near = [powers]
    for _ in range(3):
        near.append(np.nextafter(near[-1], np.float32(np.inf)))
    near.append(np.nextafter(powers, np.float32(0)))
    top = np.concatenate(near)
    x = np.zeros((top.size, 32), np.float32)
    x[:, 7] = -top
    found = to_numpy(encode(to_torch(x), "mxfp8"))
    wanted = oracle.mxfp8_encode(x)
    assert (found["weight_scale"] == wanted["weight_scale"]).all()
    assert (found["weight"] == wanted["weight"]).all()
    scale = found["weight_scale"][:, 0].astype(int)
    with np.errstate(over="ignore"):
        assert all(
            float(t) <= 448 * 2.0 ** (k - 127) for t, k in zip(top.tolist(), scale, strict=True)
        )
        assert all(
            k == 0 or float(t) > 448 * 2.0 ** (k - 128)
            for t, k in zip(top.tolist(), scale, strict=True)
        )
