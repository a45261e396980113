# SPDX-License-Identifier: Apache-2.0
"""The format and the logical size that the tensors of a module show, and what stands next to a
weight.
"""

from __future__ import annotations

import pytest

from verifier.checkpoint import Tensor
from verifier.schemes import (
    FORMATS,
    Format,
    Scheme,
    canonical,
    fusable,
    gather,
    required_siblings,
    same_layout,
    split,
)

Parts = dict[str, tuple[str, tuple[int, ...]]]
OUT, IN = 256, 384


def module_of(parts: Parts, declared: Format | None = None):  # type: ignore[no-untyped-def]
    """Return the module that tensors named ``m.<leaf>`` make, its format declared or not."""
    tensors = [
        Tensor(f"m.{leaf}", *part, "model.safetensors", 0, 0) for leaf, part in parts.items()
    ]
    return gather(tensors, (lambda _: declared) if declared else None)["m"]


NVFP4: Parts = {
    "weight": ("U8", (OUT, IN // 2)),
    "weight_scale": ("F8_E4M3", (OUT, IN // 16)),
    "weight_scale_2": ("F32", ()),
}
INPUT: Parts = {"input_scale": ("F32", ())}
FP8: Parts = {"weight": ("F8_E4M3", (OUT, IN))}
E8M0_TILES = {"scale": ("F8_E8M0", (2, 3))}
GPTQ: Parts = {
    "qweight": ("I32", (IN // 8, OUT)),
    "qzeros": ("I32", (3, OUT // 8)),
    "scales": ("F16", (3, OUT)),
}
SHOWN: dict[str, tuple[Parts, str, tuple[int, int] | None]] = {
    "nvfp4": (NVFP4 | INPUT, "nvfp4", (OUT, IN)),
    "nvfp4 of weights": (NVFP4, "w4a16_nvfp4", (OUT, IN)),
    "nvfp4 with awq": (
        NVFP4 | INPUT | {"pre_quant_scale": ("BF16", (IN,))},
        "nvfp4_awq",
        (OUT, IN),
    ),
    "nvfp4 with svd": (
        NVFP4
        | INPUT
        | {"svdquant_lora_a": ("BF16", (32, IN)), "svdquant_lora_b": ("BF16", (OUT, 32))},
        "nvfp4_svd",
        (OUT, IN),
    ),
    "nvfp4 of quark": (NVFP4 | {"input_scale_2": ("F32", ())}, "nvfp4_quark", (OUT, IN)),
    "nvfp4 of compressed-tensors": (
        {
            "weight_packed": ("U8", (OUT, IN // 2)),
            "weight_scale": ("F8_E4M3", (OUT, IN // 16)),
            "weight_global_scale": ("F32", (1,)),
        },
        "nvfp4_ct",
        (OUT, IN),
    ),
    "mxfp4": (
        {"weight": ("U8", (OUT, IN // 2)), "weight_scale": ("U8", (OUT, IN // 32))},
        "mxfp4",
        (OUT, IN),
    ),
    "mxfp4 packed": (
        {"weight_packed": ("U8", (OUT, IN // 2)), "weight_scale": ("U8", (OUT, IN // 32))},
        "mxfp4",
        (OUT, IN),
    ),
    "mxfp4 with inputs in fp8": (
        {"weight": ("U8", (OUT, IN // 2)), "weight_scale": ("U8", (OUT, IN // 32))} | INPUT,
        "w4a8_mxfp4_fp8",
        (OUT, IN),
    ),
    "mxfp4 of deepseek": (
        {"weight": ("I8", (OUT, IN // 2)), "scale": ("F8_E8M0", (OUT, IN // 32))},
        "mxfp4",
        (OUT, IN),
    ),
    "mxfp6": (
        {"weight_packed": ("U8", (OUT, IN * 3 // 4)), "weight_scale": ("U8", (OUT, IN // 32))},
        "mxfp6_e2m3",
        (OUT, IN),
    ),
    "fp8 in bf16": (FP8 | {"weight_scale": ("BF16", (1,))}, "fp8", (OUT, IN)),
    "fp8 rows in bf16": (FP8 | {"weight_scale": ("BF16", (OUT, 1))}, "fp8_per_channel", (OUT, IN)),
    "fp8 tiles in bf16": (FP8 | {"weight_scale_inv": ("BF16", (2, 3))}, "fp8_block", (OUT, IN)),
    "fp8 tiles in e8m0": (FP8 | E8M0_TILES, "fp8_block", (OUT, IN)),
    "fp8 small tiles": (FP8 | {"scale": ("F8_E8M0", (8, 12))}, "mxfp8_block", (OUT, IN)),
    "fp8 small tiles in f32": (
        FP8 | {"weight_scale_inv": ("F32", (8, 12))},
        "fp8_block",
        (OUT, IN),
    ),
    "mxfp8": (FP8 | {"weight_scale": ("U8", (OUT, 12))}, "mxfp8", (OUT, IN)),
    "int8 rows": (
        {"weight": ("I8", (OUT, IN)), "weight_scale": ("BF16", (OUT, 1))},
        "int8",
        (OUT, IN),
    ),
    "int4 of sglang": (
        {"weight": ("I8", (OUT, IN // 2)), "weight_scale_inv": ("BF16", (OUT, 3))},
        "w4afp8",
        (OUT, IN),
    ),
    "int4 of modelopt": (
        {"weight": ("U8", (OUT // 2, IN)), "weight_scale": ("BF16", (OUT, 3))},
        "int4_awq",
        (OUT, IN),
    ),
    "int4 of modelopt over fp8": (
        {
            "weight": ("U8", (OUT // 2, IN)),
            "weight_scale": ("F32", (OUT, 3)),
            "weight_scale_2": ("F32", ()),
        },
        "w4a8_awq",
        (OUT, IN),
    ),
    "gptq": (GPTQ | {"g_idx": ("I32", (IN,))}, "gptq", (OUT, IN)),
    "gptq of three bits": (
        {
            "qweight": ("I32", (IN * 3 // 32, OUT)),
            "qzeros": ("I32", (3, OUT * 3 // 32)),
            "scales": ("F16", (3, OUT)),
        },
        "gptq",
        (OUT, IN),
    ),
    "gptq without scales": ({k: v for k, v in GPTQ.items() if k != "scales"}, "gptq", (OUT, IN)),
    "awq": (
        {
            "qweight": ("I32", (IN, OUT // 8)),
            "qzeros": ("I32", (3, OUT // 8)),
            "scales": ("F16", (3, OUT)),
        },
        "awq",
        (OUT, IN),
    ),
    "int4 of quark": (
        {"weight": ("I32", (IN, OUT // 8)), "weight_scale": ("F32", (3, OUT))},
        "int4_quark",
        (OUT, IN),
    ),
    "mlx mxfp4": (
        {"weight": ("U32", (OUT, IN // 8)), "scales": ("U8", (OUT, 12))},
        "mlx_mxfp4",
        (OUT, IN),
    ),
    "mlx nvfp4": (
        {"weight": ("U32", (OUT, IN // 8)), "scales": ("U8", (OUT, 24))},
        "mlx_nvfp4",
        (OUT, IN),
    ),
    "mlx mxfp8": (
        {"weight": ("U32", (OUT, IN // 4)), "scales": ("U8", (OUT, 12))},
        "mlx_mxfp8",
        (OUT, IN),
    ),
    "bitsandbytes 4": (
        {
            "weight": ("U8", (OUT * IN // 2, 1)),
            "weight.absmax": ("F32", (OUT * IN // 64,)),
            "weight.quant_map": ("F32", (16,)),
            "weight.quant_state.bitsandbytes__nf4": ("U8", (90,)),
        },
        "bnb_4bit",
        None,
    ),
    "bitsandbytes 8": (
        {"weight": ("I8", (OUT, IN)), "SCB": ("F32", (OUT,)), "weight_format": ("U8", ())},
        "bnb_int8",
        (OUT, IN),
    ),
    "torchao": (
        {"_weight_qdata": ("F8_E4M3", (OUT, IN)), "_weight_scale": ("F32", (OUT, 1))},
        "torchao",
        None,
    ),
}


@pytest.mark.parametrize("case", SHOWN)
def test_format_and_size(case: str) -> None:
    parts, name, dims = SHOWN[case]
    module = module_of(parts)
    assert module.quantized
    assert (module.inferred_format.name, module.dims) == (name, dims)
    if dims is None:
        return
    for leaf, (_, shape) in parts.items():
        sibling = module.inferred_format.sibling(leaf)
        if sibling is not None and sibling.formulas:
            assert shape in sibling.shapes(*dims), leaf


DECLARED: dict[str, tuple[Parts, Format, str, int, tuple[int, int]]] = {
    "packed integers": (
        {
            "weight_packed": ("I32", (OUT, IN // 8)),
            "weight_scale": ("BF16", (OUT, 3)),
            "weight_shape": ("I64", (2,)),
        },
        FORMATS["int_packed"],
        "int_packed",
        4,
        (1, 128),
    ),
    "packed integers of eight bits": (
        {"weight_packed": ("I32", (OUT, IN // 4)), "weight_scale": ("BF16", (OUT, 3))},
        FORMATS["int_packed"].sized(bits=8),
        "int_packed",
        8,
        (1, 128),
    ),
    "packed integers in other groups than declared": (
        {"weight_packed": ("I32", (OUT, IN // 8)), "weight_scale": ("BF16", (OUT, 12))},
        FORMATS["int_packed"],
        "int_packed",
        4,
        (1, 32),
    ),
    "mlx": (
        {
            "weight": ("U32", (OUT, IN // 8)),
            "scales": ("BF16", (OUT, 6)),
            "biases": ("BF16", (OUT, 6)),
        },
        FORMATS["mlx_affine"],
        "mlx_affine",
        4,
        (1, 64),
    ),
    "the second version of gptq": (GPTQ, FORMATS["gptq_v2"], "gptq_v2", 4, (1, 128)),
    "nvfp4 of weights in groups of 32": (
        NVFP4 | {"weight_scale": ("F8_E4M3", (OUT, IN // 32))},
        FORMATS["w4a16_nvfp4"].sized(block=(1, 32)),
        "w4a16_nvfp4",
        4,
        (1, 32),
    ),
}


@pytest.mark.parametrize("case", DECLARED)
def test_what_tensors_do_not_tell_is_declared(case: str) -> None:
    parts, declared, name, bits, block = DECLARED[case]
    module = module_of(parts, declared)
    shown = module.inferred_format
    assert (shown.name, shown.bits, shown.block, module.dims) == (name, bits, block, (OUT, IN))
    assert shown.sized() is shown


def test_packed_integers_without_a_declaration_have_no_size() -> None:
    parts: Parts = {"weight_packed": ("I32", (OUT, IN // 8)), "weight_scale": ("BF16", (OUT, 3))}
    module = module_of(parts)
    assert (module.quantized, module.inferred_format, module.dims) == (True, None, None)
    zeros: Parts = {"weight_zero_point": ("I32", (OUT // 8, 3))}
    assert module_of(parts | zeros).dims == (OUT, IN)


def test_one_group_for_a_whole_row_is_not_a_block() -> None:
    parts: Parts = {"weight_packed": ("I32", (OUT, IN // 8)), "weight_scale": ("BF16", (OUT, 1))}
    shown = module_of(parts, FORMATS["int_packed"].sized(block=None)).inferred_format
    assert shown.block is None
    assert shown.siblings[0].shapes(OUT, IN) == ((OUT, 1),)


@pytest.mark.parametrize(
    ("parts", "declared", "name"),
    [
        (NVFP4 | {"weight_scale": ("F8_E4M3", (OUT, IN // 32))}, None, "w4a16_nvfp4"),
        (NVFP4 | {"weight_scale": ("F32", (OUT, IN // 16))}, None, "w4a16_nvfp4"),
        ({"weight": ("U8", (OUT, IN // 2)), "weight_scale": ("U8", (OUT, 11))}, None, "mxfp4"),
        ({"weight": ("U8", (OUT, IN // 2))}, FORMATS["mxfp4"], "mxfp4"),
        ({"weight": ("U8", (OUT, IN // 2))}, None, "w4a16_nvfp4"),
        ({"weight_packed": ("U8", (OUT, IN // 2))}, None, "nvfp4_ct"),
        ({"weight": ("I8", (OUT, IN))}, FORMATS["int8"], "int8"),
    ],
)
def test_a_scale_that_does_not_fit_does_not_hide_the_format(
    parts: Parts, declared: Format | None, name: str
) -> None:
    assert module_of(parts, declared).inferred_format.name == name


@pytest.mark.parametrize("leaf", ["scale", "scales", "biases", "g_idx", "k_bias"])
def test_a_parameter_that_is_called_like_a_sibling_is_one_where_no_codes_are(leaf: str) -> None:
    alone = gather([Tensor(f"m.{leaf}", "BF16", (4,), "f", 0, 0)])
    assert list(alone) == [f"m.{leaf}"]
    assert not alone[f"m.{leaf}"].quantized
    beside = gather(
        [
            Tensor("m.weight", "BF16", (4, 4), "f", 0, 0),
            Tensor(f"m.{leaf}", "BF16", (4,), "f", 0, 0),
        ]
    )
    assert sorted(beside) == ["m", f"m.{leaf}"]
    assert not beside["m"].quantized


def test_a_scale_next_to_codes_is_a_sibling() -> None:
    module = module_of(FP8 | E8M0_TILES)
    assert module.scale is module.parts["scale"]
    assert module.scales == ("scale",)


@pytest.mark.parametrize("dtype", ["I8", "I32", "I64"])
def test_whole_numbers_alone_are_a_buffer(dtype: str) -> None:
    assert not module_of({"weight": (dtype, (4, 4))}).quantized


@pytest.mark.parametrize(
    ("name", "module", "leaf", "plain"),
    [
        ("a.qweight", "a", "qweight", "a.weight"),
        ("a.qzeros", "a", "qzeros", None),
        ("a.scales", "a", "scales", None),
        ("a.g_idx", "a", "g_idx", None),
        ("a.weight_zero_point", "a", "weight_zero_point", None),
        ("a.weight_shape", "a", "weight_shape", None),
        ("a._weight_qdata", "a", "_weight_qdata", "a.weight"),
        ("a.weight.absmax", "a", "weight.absmax", None),
        ("a.weight.quant_state.bitsandbytes__nf4", "a", "weight.quant_state", None),
        ("a.SCB", "a", "SCB", None),
        ("a.k_proj.output_scale", "a.k_proj", "output_scale", None),
        ("a.self_attn.q_scale", "a.self_attn", "q_scale", None),
        ("a.experts.gate_up_proj_scales", "a.experts.gate_up_proj", "scales", None),
        ("a.scale", "a.scale", "", "a.scale"),
        ("absmax", "absmax", "", "absmax"),
    ],
)
def test_names(name: str, module: str, leaf: str, plain: str | None) -> None:
    assert split(name) == (module, leaf)
    assert canonical(name) == plain


def test_names_and_shapes_that_tensors_stand_for() -> None:
    def names(parts: Parts) -> dict[str, tuple[int, ...] | None]:
        return dict(module_of(parts).unquantized())

    assert names(GPTQ | {"bias": ("F16", (OUT,))}) == {"m.weight": (OUT, IN), "m.bias": (OUT,)}
    assert names(NVFP4 | INPUT) == {"m.weight": (OUT, IN)}
    assert names(SHOWN["bitsandbytes 4"][0]) == {"m.weight": None}
    assert names({"weight_packed": ("I32", (4, 4)), "weight_scale": ("BF16", (4, 1))}) == {
        "m.weight": None
    }
    stack = gather([Tensor("a.mlp.switch_mlp.up_proj.weight", "U32", (2, 8, 4), "f", 0, 0)])
    (module,) = stack.values()
    assert dict(module.unquantized()) == {
        f"a.mlp.experts.{e}.up_proj.weight": None for e in range(2)
    }


@pytest.mark.parametrize(
    ("name", "scheme", "wanted"),
    [
        ("nvfp4", None, ["weight_scale", "weight_scale_2", "input_scale"]),
        ("nvfp4", Scheme("NVFP4", inputs="none"), ["weight_scale", "weight_scale_2"]),
        ("fp8", None, ["weight_scale"]),
        ("fp8", Scheme("FP8", inputs="static"), ["weight_scale", "input_scale"]),
        ("fp8", Scheme("FP8", inputs="dynamic"), ["weight_scale"]),
        ("nvfp4_ct", Scheme("x", inputs="none"), ["weight_scale", "weight_global_scale"]),
        (
            "nvfp4_ct",
            Scheme("x", inputs="local"),
            ["weight_scale", "weight_global_scale", "input_global_scale"],
        ),
        ("int_packed", Scheme("x"), ["weight_scale", "weight_shape"]),
        (
            "int_packed",
            Scheme("x", symmetric=False),
            ["weight_scale", "weight_zero_point", "weight_shape"],
        ),
        ("gptq", None, ["scales", "qzeros"]),
        ("nvfp4_awq", Scheme("x", inputs="none"), ["weight_scale", "weight_scale_2"]),
    ],
)
def test_siblings_that_have_to_be_there(
    name: str, scheme: Scheme | None, wanted: list[str]
) -> None:
    assert [s.leaves[0] for s in required_siblings(FORMATS[name], scheme)] == wanted


def test_formats_that_store_weights_alike() -> None:
    packed = FORMATS["int_packed"]
    assert same_layout(FORMATS["nvfp4"], FORMATS["w4a8_nvfp4_fp8"])
    assert same_layout(packed, packed.sized(bits=8))
    assert not fusable(packed, packed.sized(bits=8))
    assert not fusable(packed, packed.sized(block=(1, 32)))
    assert fusable(FORMATS["nvfp4"], FORMATS["w4a16_nvfp4"])
    assert not same_layout(FORMATS["gptq"], FORMATS["awq"])
