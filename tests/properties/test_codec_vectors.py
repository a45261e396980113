# SPDX-License-Identifier: Apache-2.0
"""The vectors of tests/data/vectors: oracle and exporter reproduce them byte for byte, the decoders
agree on them.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from exporter.codecs import decode, encode
from tests import oracle
from tests.conftest import to_numpy, to_torch
from tests.paths import TESTS
from verifier import decoding
from verifier.errors import EncodeError

pytestmark = pytest.mark.usefixtures("back_end")
HERE = TESTS / "data" / "vectors"
FINITE = [
    "denormal_bf16",
    "denormal_f32",
    "experts3d_bf16",
    "experts3d_f32",
    "heavy_tail_bf16",
    "heavy_tail_f32",
    "huge_bf16",
    "huge_f32",
    "mx_bounds_f32",
    "mx_full_range_f32",
    "neg_zero_f32",
    "normal_bf16",
    "normal_f32",
    "scale_ties_f32",
    "ties_bf16",
    "ties_f32",
    "tiny_f32",
    "underflow_blocks_f32",
    "zero_blocks_f32",
    "zeros_bf16",
    "zeros_f32",
]
ZERO = {"zeros_bf16", "zeros_f32"}
NOT_FINITE = {"one_nan_f32": "NaN", "one_inf_f32": "infinity", "one_ninf_f32": "infinity"}
MODELOPT_LOG2 = {"mx_bounds_f32": 24}
"""Blocks whose exponent ModelOpt's float32 log2 puts one too low."""
Store = dict[str, dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def vectors(request: pytest.FixtureRequest) -> Store:
    """Return the three files; from the shared data where this tree has none (an sdist)."""
    place = HERE if HERE.is_dir() else request.getfixturevalue("shared_data") / "vectors"
    return {name: load_file(place / f"{name}.safetensors") for name in ("inputs", "nvfp4", "mxfp8")}


def values(vectors: Store, case: str) -> np.ndarray:
    return vectors["inputs"][case].float().numpy()  # bfloat16 widens exactly


def reference(vectors: Store, case: str, fmt: str, peer: str) -> dict[str, np.ndarray]:
    """Return what ``peer`` wrote, by leaf on disk."""
    weight, scale = ("packed", "scale") if fmt == "nvfp4" else ("data", "scale")
    found = {
        "weight": vectors[fmt][f"{case}|{peer}|{weight}"].view(torch.uint8).numpy(),
        "weight_scale": vectors[fmt][f"{case}|{peer}|{scale}"].view(torch.uint8).numpy(),
    }
    if fmt == "nvfp4":
        found["weight_scale_2"] = vectors[fmt][f"{case}|{peer}|scale2"].numpy().reshape(())
    return found


def check(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert found.keys() == wanted.keys()
    for leaf, value in wanted.items():
        assert oracle.same_bits(np.asarray(found[leaf]), value), leaf


def check_zero(parts: dict[str, np.ndarray]) -> None:
    """Check what an all-zero tensor gives: the vectors hold NaN scales there, no reference."""
    assert not parts["weight"].any()
    assert (parts["weight_scale"] == 0x38).all()
    assert np.isfinite(parts["weight_scale_2"]) and parts["weight_scale_2"] > 0


def test_every_case_is_named_here(vectors: Store) -> None:
    assert set(vectors["inputs"]) == {*FINITE, *NOT_FINITE}
    assert len(FINITE) == 21


@pytest.mark.parametrize("case", FINITE)
def test_oracle_nvfp4(vectors: Store, case: str) -> None:
    x = values(vectors, case)
    found = oracle.nvfp4_encode(x, amax=np.abs(x).max())
    if case in ZERO:
        check_zero(found)
    else:
        check(found, reference(vectors, case, "nvfp4", "oracle_ml_dtypes"))


@pytest.mark.parametrize("case", FINITE)
def test_oracle_mxfp8(vectors: Store, case: str) -> None:
    check(
        oracle.mxfp8_encode(values(vectors, case)),
        reference(vectors, case, "mxfp8", "oracle_rceil"),
    )


@pytest.mark.parametrize("case", FINITE)
@pytest.mark.parametrize("fmt", ["nvfp4", "w4a16_nvfp4"])
def test_exporter_nvfp4(vectors: Store, case: str, fmt: str) -> None:
    x = vectors["inputs"][case]
    found = to_numpy(encode(x, fmt, amax=x.float().abs().max()))
    if case in ZERO:
        check_zero(found)
    else:
        check(found, reference(vectors, case, "nvfp4", "oracle_ml_dtypes"))
        check(found, reference(vectors, case, "nvfp4", "modelopt"))


@pytest.mark.parametrize("case", FINITE)
def test_exporter_mxfp8(vectors: Store, case: str) -> None:
    found = to_numpy(encode(vectors["inputs"][case], "mxfp8"))
    check(found, reference(vectors, case, "mxfp8", "oracle_rceil"))
    modelopt = reference(vectors, case, "mxfp8", "modelopt")
    differ = found["weight_scale"] != modelopt["weight_scale"]
    assert differ.sum() == MODELOPT_LOG2.get(case, 0)
    assert (found["weight_scale"][differ] - modelopt["weight_scale"][differ] == 1).all()


@pytest.mark.parametrize("case", FINITE)
@pytest.mark.parametrize("fmt", ["nvfp4", "mxfp8"])
def test_decoders_agree(vectors: Store, case: str, fmt: str) -> None:
    """On the references themselves, the NaN scales of the all-zero tensors included."""
    parts = reference(vectors, case, fmt, "oracle_ml_dtypes" if fmt == "nvfp4" else "oracle_rceil")
    mine = decode({k: to_torch(v) for k, v in parts.items()}, fmt).numpy()
    theirs = decoding.decode(parts, fmt)
    third = oracle.nvfp4_decode(parts) if fmt == "nvfp4" else oracle.mxfp8_decode(parts)
    assert oracle.same_bits(mine, theirs)
    assert oracle.same_bits(mine, third)
    assert mine.shape == vectors["inputs"][case].shape


@pytest.mark.parametrize("case", NOT_FINITE)
@pytest.mark.parametrize(
    "fmt", ["nvfp4", "w4a16_nvfp4", "mxfp8", "fp8", "fp8_per_channel", "fp8_block"]
)
def test_nan_and_infinity_are_refused_by_index(vectors: Store, case: str, fmt: str) -> None:
    x = vectors["inputs"][case]
    where = [int(i) for i in np.argwhere(~np.isfinite(x.numpy()))[0]]
    with pytest.raises(EncodeError) as caught:
        encode(x, fmt)
    assert (
        str(caught.value)
        == f"{NOT_FINITE[case]} at index {where} of a weight of shape {list(x.shape)}"
    )
