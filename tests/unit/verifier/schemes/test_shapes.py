# SPDX-License-Identifier: Apache-2.0
"""Shape formulas, the bit patterns of scales, and the data of formats and engines."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from verifier.schemes import FORMATS, READS, SCALE_BITS, parse, reading, refusal, scale_flaws
from verifier.schemes.shapes import shape_of, solve

VALUES = {"out": 100, "in": 256, "group": 128, "rows": 32, "bits": 3}


@pytest.mark.parametrize(
    ("formula", "shape"),
    [
        ("", ()),
        ("1", (1,)),
        ("out, in/group", (100, 2)),
        ("out/rows, 1, in/group, 1", (4, 1, 2, 1)),
        ("in*bits/32, out", (24, 100)),
        ("out*bits/32, in/group", (10, 2)),
        ("out, in*3/4", (100, 192)),
    ],
)
def test_shape_of_a_formula(formula: str, shape: tuple[int, ...]) -> None:
    assert shape_of(formula, VALUES) == shape


@pytest.mark.parametrize(
    ("formula", "shape", "wanted"),
    [
        ("out, in/2", (100, 128), {"out": 100, "in": 256}),
        ("in*bits/32, out", (24, 100), {"out": 100, "in": 256}),
        ("out/2, in", (50, 256), {"out": 100, "in": 256}),
        ("out, in", (1, 2, 3), None),
        ("out*in/2, 1", (50, 1), None),
        ("out, 1", (50, 2), None),
    ],
)
def test_solving_a_formula(
    formula: str, shape: tuple[int, ...], wanted: dict[str, int] | None
) -> None:
    assert solve(formula, shape, VALUES) == wanted


def test_a_group_of_nothing_is_the_whole_row() -> None:
    assert shape_of("out, in/group", VALUES | {"group": 0}) == (100, 1)


@pytest.mark.parametrize("formula", ["out in", "out,", "out*", "/2", "out, in+1"])
def test_what_is_no_formula(formula: str) -> None:
    with pytest.raises(ValueError, match="not a shape formula"):
        shape_of(formula, VALUES)


@pytest.mark.parametrize("name", FORMATS)
def test_every_entry_is_whole(name: str) -> None:
    """Formulas are sound, weights have a size, and a config declares the format."""
    fmt = FORMATS[name]
    assert fmt.declared
    assert fmt.siblings[0].role == "scale"
    for sibling in fmt.siblings:
        assert sibling.leaves
        assert sibling.dtypes
        assert sibling.dtypes[0] in SCALE_BITS or sibling.role not in ("scale", "tensor_scale")
        assert all(len(s) <= 4 for s in sibling.shapes(256, 512))
    stored = shape_of(fmt.weight.formula, fmt.params | {"out": 256, "in": 512})
    if name != "bnb_4bit":
        assert fmt.dims(stored) == (256, 512)
    if fmt.weight.formula != "out, in" or fmt.bits < 8:
        assert fmt.weight.order or not fmt.decodes


FLOATS = [
    ("F8_E4M3", ml_dtypes.float8_e4m3fn),
    ("BF16", ml_dtypes.bfloat16),
    ("F16", np.float16),
    ("F32", np.float32),
]


@pytest.mark.parametrize(("dtype", "numpy"), FLOATS)
def test_flaws_of_every_scale_dtype(dtype: str, numpy: Any) -> None:
    """All patterns of one byte, and of the others what numpy says of them."""
    bits = SCALE_BITS[dtype]
    if bits.width == 1:
        values = np.arange(256, dtype=np.uint8).view(numpy)
    else:
        values = np.array([0.0, -0.0, 1.0, -1.0, np.nan, np.inf, -np.inf, 1e-7]).astype(numpy)
    wide = values.astype(np.float64)
    flaws = scale_flaws(values, dtype)
    assert np.array_equal(flaws.zero, wide == 0)
    assert np.array_equal(flaws.nan, np.isnan(wide))
    assert np.array_equal(flaws.infinite, np.isinf(wide))
    assert np.array_equal(flaws.negative, wide < 0)
    assert flaws.any
    assert not scale_flaws(np.ones(3).astype(numpy), dtype).any
    raw = np.ascontiguousarray(values).view(np.uint8)
    assert np.array_equal(scale_flaws(raw, dtype).nan, flaws.nan)


@pytest.mark.parametrize("dtype", ["U8", "F8_E8M0"])
def test_exponents_have_neither_zero_nor_sign(dtype: str) -> None:
    flaws = scale_flaws(np.arange(256, dtype=np.uint8), dtype)
    assert np.flatnonzero(flaws.nan).tolist() == [255]
    assert not flaws.zero.any()
    assert not flaws.negative.any()
    assert not flaws.infinite.any()


def test_what_engines_read_is_named_by_formats_and_algorithms() -> None:
    for reads in READS:
        assert reads.source
        known = {f.algo for f in FORMATS.values()} | set(FORMATS)
        known |= {"FP8_BLOCK_SCALES", "MIXED_PRECISION", "W8A16", "W8A8_SQ_PER_CHANNEL"}
        assert set(reads.names) <= known, reads
    assert len({(r.engine, r.method) for r in READS}) == len(READS)


MODELOPT = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}


@pytest.mark.parametrize(
    ("engine", "config", "words"),
    [
        ("vllm", MODELOPT, ""),
        ("vllm", MODELOPT | {"quant_algo": "NVFP4_AWQ"}, "does not read NVFP4_AWQ"),
        ("sglang", MODELOPT | {"quant_algo": "NVFP4_AWQ"}, ""),
        ("trtllm", MODELOPT | {"quant_algo": "NVFP4_AWQ"}, ""),
        ("transformers", MODELOPT, "quant_method 'modelopt'"),
        ("vllm", GPTQ, ""),
        ("vllm", GPTQ | {"bits": 3}, "4 or 8 bits, not 3"),
        ("sglang", GPTQ | {"bits": 3}, ""),
        ("vllm", GPTQ | {"sym": False}, "symmetric"),
        ("vllm", {"quant_method": "bitsandbytes", "load_in_4bit": True}, "quant_method"),
        ("mlx", {"bits": 4, "group_size": 64}, ""),
    ],
)
def test_refusals(engine: Any, config: dict[str, Any], words: str) -> None:
    declaration = parse(config, "config.json")
    assert declaration.scheme is not None
    text = refusal(engine, declaration, declaration.scheme)
    assert (words in text) if words else text == ""
    assert (reading(engine, declaration) is None) == ("quant_method" in words)
