# SPDX-License-Identifier: Apache-2.0
"""What each quantization format puts on disk: one entry a format, as data.

An entry says how the weight's codes are stored, which siblings stand next to it (names, dtypes,
shapes, meaning) and how configs declare it. ``docs/add-a-format.md`` says how to add one.
Which engine reads which format is in `verifier.schemes.engines`; what a zero or NaN scale looks
like in `verifier.schemes.scale_values`.

Sources: NVIDIA ModelOpt 0.47 ``export/quant_utils.py`` and ``unified_export_hf.py``;
compressed-tensors 0.20 ``compressors/*/base.py``; OCP Microscaling Formats 1.0 section 5.3;
GPTQModel and vLLM 0.32 ``auto_gptq.py``, ``auto_awq.py``; vLLM 0.32 ``quark/schemes``, ``fp8.py``,
``models/deepseek_v4``; SGLang 0.5.23 ``w4afp8.py``; mlx-lm 0.32; transformers 5.23
``integrations/finegrained_fp8.py``, ``bitsandbytes.py``. ``out`` and ``in`` are the logical
dimensions of the linear layer, in elements.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from verifier.schemes.shapes import Shape, shape_of, solve

Codes = Literal["e2m1", "e4m3", "e2m3", "e3m2", "int", "nf4", "opaque"]
"""What a weight's code is: a value of a small float, a whole number, or what is not decoded."""
Role = Literal[
    "scale",
    "tensor_scale",
    "input",
    "pre_quant",
    "zero_point",
    "group_index",
    "shape",
    "lora",
    "bias",
    "state",
]
"""What a sibling is: the weight's block, row or tensor scale; a second scale over it; the scale of
the activations; the factor of each input; zero points; the group of each input; the logical shape;
a low-rank correction; an additive term of each group; a tool's own state."""
When = Literal["always", "never", "static inputs", "asymmetric"]
"""When a sibling has to be there: ``never`` is optional."""

Block = tuple[int, int] | None
FLOAT32 = ("F32",)
MODEL = ("F32", "BF16", "F16")
"""A scale in the model's dtype; readers widen it to float32."""
E4M3 = ("F8_E4M3",)
E8M0 = ("U8", "F8_E8M0")
SCALAR = ("", "1")
ROWS = ("out", "out, 1")
TILES = ("out/rows, in/group", "out/rows, 1, in/group, 1")
BY_GROUP = ("out, in/group",)


@dataclass(frozen=True, slots=True)
class Sibling:
    """One tensor next to a weight.

    Attributes:
        leaves: the names that it has on disk.
        dtypes: those that readers accept, as safetensors spells them.
        formulas: the shapes that it may have (`verifier.schemes.shapes`), the usual one first.
        role: what it is.
        when: whether it has to be there.
        divisor: whether values are divided by it, not multiplied.
        signed: whether a sound one has values of either sign.
        holds: the dtype of the values in its U8 bytes, where that is not E8M0; ``opaque`` where
            they are not scales.
        largest: the largest value that a sound one has; 0 where its dtype is the bound.
        params: the format's parameters, by which formulas are worked out.
    """

    leaves: tuple[str, ...]
    dtypes: tuple[str, ...]
    formulas: tuple[str, ...]
    role: Role = "scale"
    when: When = "always"
    divisor: bool = False
    signed: bool = False
    holds: str = ""
    largest: float = 0.0
    params: tuple[tuple[str, int], ...] = ()

    def shapes(self, out: int, in_: int) -> tuple[Shape, ...]:
        """Return the shapes that it may have next to a weight of ``out`` by ``in_`` elements."""
        return _shapes(self.formulas, self.params, out, in_)

    def values_in(self, dtype: str) -> str:
        """Return the dtype of the values that a tensor stored as ``dtype`` holds; ``opaque`` where
        they are not scales.
        """
        return self.holds if self.holds and dtype == "U8" else dtype

    @property
    def required(self) -> bool:
        """Whether every module of the format has it, whatever its config says."""
        return self.when == "always"

    @property
    def scalar(self) -> bool:
        """Whether the format gives it one value for the whole tensor."""
        return self.formulas == SCALAR


@lru_cache(maxsize=1 << 14)
def _shapes(
    formulas: tuple[str, ...], params: tuple[tuple[str, int], ...], out: int, in_: int
) -> tuple[Shape, ...]:
    values = {**dict(params), "out": out, "in": in_}
    return tuple(dict.fromkeys(shape_of(f, values) for f in formulas))


@dataclass(frozen=True, slots=True)
class Weight:
    """How the codes of a weight are stored.

    Attributes:
        leaves: the names that the tensor has on disk.
        dtypes: of the stored tensor; the usual one first.
        formula: its shape.
        codes: what a code is.
        order: how codes that share a byte or a word are ordered, in words.
    """

    leaves: tuple[str, ...]
    dtypes: tuple[str, ...]
    formula: str
    codes: Codes
    order: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Format:
    """A quantization format, with the parameters of one module; equal ones are one object.

    Attributes:
        name: the key in `FORMATS`.
        algo: what findings and reports call it.
        weight: how its codes are stored.
        block: (rows, columns) that share a scale; None for a whole row or tensor.
        siblings: the tensors next to the weight.
        bits: the width of a code.
        layout: the same for formats whose weight and weight scales are stored alike.
        declared: how configs declare it: ``method: what it says``.
        decodes: whether `verifier.decoding` gives its values; otherwise only names, dtypes and
            shapes are checked.
        rank: of a low-rank correction.
    """

    name: str
    algo: str
    weight: Weight
    block: Block
    siblings: tuple[Sibling, ...]
    bits: int = 4
    layout: str = ""
    declared: tuple[str, ...] = ()
    decodes: bool = True
    rank: int = 0

    @property
    def weight_dtype(self) -> str:
        """The usual dtype of the stored weight."""
        return self.weight.dtypes[0]

    @property
    def packed(self) -> bool:
        """Whether two E2M1 codes share a byte (``weight`` is U8 of half the width)."""
        return self.weight.codes == "e2m1" and self.weight.dtypes[0] == "U8"

    @property
    def group_size(self) -> int | None:
        """The block width along the input dimension, in elements."""
        return self.block[1] if self.block else None

    @property
    def transposed(self) -> bool:
        """Whether the stored weight has inputs as rows, outputs as columns."""
        return self.weight.formula.startswith("in")

    @property
    def rowwise(self) -> bool:
        """Whether a block is a run of columns in one row, and scales have the weight's rows."""
        return self.block is not None and self.block[0] == 1 and not self.transposed

    @property
    def params(self) -> dict[str, int]:
        """The values of the names in its formulas, ``out`` and ``in`` aside."""
        return _params(self.bits, self.block, self.rank)

    def sibling(self, leaf: str) -> Sibling | None:
        """Return the sibling that ``leaf`` names."""
        return next((s for s in self.siblings if leaf in s.leaves), None)

    def of_role(self, role: Role) -> Sibling | None:
        """Return the first sibling of a role."""
        return next((s for s in self.siblings if s.role == role), None)

    def dims(self, shape: Shape) -> tuple[int, int] | None:
        """Return the logical (out, in) of a stored weight of two dimensions, None for any other."""
        found = solve(self.weight.formula, shape, self.params)
        return (found["out"], found["in"]) if found else None

    def sized(
        self, *, bits: int | None = None, block: Block | Literal["same"] = "same", rank: int = 0
    ) -> Format:
        """Return the format with other parameters; equal parameters give the same object."""
        chosen = self.block if block == "same" else block
        return _sized(self.name, bits or self.bits, chosen, rank or self.rank)


def _params(bits: int, block: Block, rank: int) -> dict[str, int]:
    rows, group = block or (0, 0)
    return {"bits": bits, "rows": rows, "group": group, "rank": rank}


@lru_cache(maxsize=4096)
def _sized(name: str, bits: int, block: Block, rank: int) -> Format:
    base = FORMATS[name]
    if (bits, block, rank) == (base.bits, base.block, base.rank):
        return base
    params = tuple(_params(bits, block, rank).items())
    siblings = tuple(replace(s, params=params) for s in base.siblings)
    return replace(base, bits=bits, block=block, rank=rank, siblings=siblings)


def _entry(entry: Format) -> Format:
    """Return a table entry with its parameters bound and its layout named."""
    params = tuple(_params(entry.bits, entry.block, entry.rank).items())
    siblings = tuple(replace(s, params=params) for s in entry.siblings)
    return replace(entry, siblings=siblings, layout=entry.layout or entry.name)


_LOW_FIRST = "even column in the low nibble"
_STREAM = "a little-endian bit stream along the row"
_E2M1 = Weight(("weight",), ("U8",), "out, in/2", "e2m1", _LOW_FIRST)
_FP8 = Weight(("weight",), ("F8_E4M3",), "out, in", "e4m3")
_INT8 = Weight(("weight",), ("I8",), "out, in", "int")

_SCALE = ("weight_scale",)
_NVFP4_SCALES = (
    Sibling(_SCALE, E4M3, BY_GROUP),
    Sibling(("weight_scale_2",), FLOAT32, SCALAR, "tensor_scale"),
)
_INPUT = Sibling(("input_scale",), FLOAT32, SCALAR, "input")
_STATIC_INPUT = Sibling(
    ("input_scale", "activation_scale"), MODEL, SCALAR, "input", "static inputs"
)
_PRE = Sibling(("pre_quant_scale",), ("BF16", "F16", "F32"), ("in",), "pre_quant", "never")
_GIVEN_PRE = replace(_PRE, when="always")
_LORA = (
    Sibling(("svdquant_lora_a",), ("BF16", "F16", "F32"), ("rank, in",), "lora"),
    Sibling(("svdquant_lora_b",), ("BF16", "F16", "F32"), ("out, rank",), "lora"),
)

_MODELOPT = (
    Format(
        "nvfp4",
        "NVFP4",
        _E2M1,
        (1, 16),
        (*_NVFP4_SCALES, _INPUT),
        layout="nvfp4",
        declared=("modelopt: quant_algo NVFP4",),
    ),
    Format(
        "w4a16_nvfp4",
        "W4A16_NVFP4",
        _E2M1,
        (1, 16),
        _NVFP4_SCALES,
        layout="nvfp4",
        declared=("modelopt: quant_algo W4A16_NVFP4, group_size 16 or 32",),
    ),
    # The value is e2m1 * weight_scale * weight_scale_2 * pre_quant_scale: ModelOpt multiplies a
    # layer's inputs by pre_quant_scale, and divided the weight's columns by it before encoding.
    Format(
        "nvfp4_awq",
        "NVFP4_AWQ",
        _E2M1,
        (1, 16),
        (*_NVFP4_SCALES, replace(_INPUT, when="static inputs"), _PRE),
        layout="nvfp4",
        declared=("modelopt: quant_algo NVFP4_AWQ",),
    ),
    # (codes + lora_b @ lora_a) * pre_quant_scale: the correction sees the scaled inputs.
    Format(
        "nvfp4_svd",
        "NVFP4_SVD",
        _E2M1,
        (1, 16),
        (*_NVFP4_SCALES, replace(_INPUT, when="static inputs"), _PRE, *_LORA),
        layout="nvfp4",
        declared=("modelopt: quant_algo NVFP4_SVD, lora_rank",),
        rank=1,
    ),
    # weight_scale_2 is amax / 448, so block scales are at most 448 / 6.
    Format(
        "w4a8_nvfp4_fp8",
        "W4A8_NVFP4_FP8",
        _E2M1,
        (1, 16),
        (replace(_NVFP4_SCALES[0], largest=448 / 6), _NVFP4_SCALES[1], _INPUT),
        layout="nvfp4",
        declared=("modelopt: quant_algo W4A8_NVFP4_FP8",),
    ),
    Format(
        "w4a8_mxfp4_fp8",
        "W4A8_MXFP4_FP8",
        _E2M1,
        (1, 32),
        (Sibling(_SCALE, E8M0, BY_GROUP), _INPUT),
        layout="mxfp4",
        declared=("modelopt: quant_algo W4A8_MXFP4_FP8", "quark: fp4 weights with fp8 inputs"),
    ),
    Format(
        "mxfp8",
        "MXFP8",
        _FP8,
        (1, 32),
        (Sibling(("weight_scale", "weight_scale_inv"), E8M0, BY_GROUP),),
        bits=8,
        declared=(
            "modelopt: quant_algo MXFP8",
            "mxfp8: weight_block_size [1, 32]",
            "compressed-tensors: mxfp8-quantized",
            "quark: fp8_e4m3 per_group 32",
            "auto-round: data_type mx_fp, bits 8",
        ),
    ),
    Format(
        "fp8",
        "FP8",
        _FP8,
        None,
        (Sibling(("weight_scale", "weight_scale_inv"), MODEL, SCALAR), _STATIC_INPUT),
        bits=8,
        declared=(
            "modelopt: quant_algo FP8",
            "fp8: no weight_block_size",
            "compressed-tensors: float-quantized, strategy tensor",
            "quark: fp8_e4m3 per_tensor",
        ),
    ),
    Format(
        "fp8_per_channel",
        "FP8_PER_CHANNEL_PER_TOKEN",
        _FP8,
        None,
        (Sibling(("weight_scale", "weight_scale_inv"), MODEL, ROWS), _STATIC_INPUT),
        bits=8,
        declared=(
            "modelopt: quant_algo FP8_PER_CHANNEL_PER_TOKEN",
            "fbgemm_fp8",
            "compressed-tensors: float-quantized, strategy channel",
            "quark: fp8_e4m3 per_channel",
        ),
    ),
    Format(
        "fp8_block",
        "FP8_PB_WO",
        _FP8,
        (128, 128),
        (
            Sibling(("weight_scale_inv", "weight_scale", "scale"), (*MODEL, "F8_E8M0"), TILES),
            replace(_STATIC_INPUT, when="never"),
        ),
        bits=8,
        declared=(
            "modelopt: quant_algo FP8_PB_WO, FP8_PB_REAL, FP8_BLOCK_SCALES",
            "fp8: weight_block_size",
            "compressed-tensors: float-quantized, strategy block",
            "quark: fp8_e4m3 per_block",
            "auto-round: packing_format auto_round:fp8, group_size [128, 128]",
        ),
    ),
    # DeepSeek-V4.1 calls the scale ``scale``, Quark ``weight_scale``.
    Format(
        "mxfp8_block",
        "MXFP8_BLOCK",
        _FP8,
        (32, 32),
        (Sibling(("scale", "weight_scale", "weight_scale_inv"), ("F8_E8M0", "U8"), TILES),),
        bits=8,
        layout="fp8_block",
        declared=("fp8: weight_block_size [32, 32]", "quark: fp8_e4m3 per_block [32, 32]"),
    ),
    # Rows 2k and 2k+1 of a column share a byte, as two's complement.
    Format(
        "int4_awq",
        "W4A16_AWQ",
        Weight(("weight",), ("U8",), "out/2, in", "int", "even row in the low nibble"),
        (1, 128),
        (Sibling(_SCALE, MODEL, BY_GROUP), _PRE),
        layout="int4_awq",
        declared=("modelopt: quant_algo W4A16_AWQ, INT4_AWQ",),
    ),
    Format(
        "w4a8_awq",
        "W4A8_AWQ",
        Weight(("weight",), ("U8",), "out/2, in", "int", "even row in the low nibble"),
        (1, 128),
        (
            Sibling(_SCALE, (*MODEL, "F8_E4M3"), BY_GROUP),
            Sibling(("weight_scale_2",), FLOAT32, SCALAR, "tensor_scale"),
            _INPUT,
            _PRE,
        ),
        layout="int4_awq",
        declared=("modelopt: quant_algo W4A8_AWQ",),
    ),
    Format(
        "int8",
        "INT8",
        _INT8,
        None,
        (
            Sibling(_SCALE, MODEL, ("out, in/group", "out", "", "1")),
            Sibling(("input_scale",), MODEL, SCALAR, "input", "static inputs"),
            Sibling(("input_zero_point",), ("I8", "I32"), SCALAR, "zero_point", "never"),
            Sibling(
                ("weight_zero_point",),
                ("I8", "I32"),
                ("out, in/group", "out", "", "1"),
                "zero_point",
                "asymmetric",
            ),
            _PRE,
        ),
        bits=8,
        declared=(
            "modelopt: quant_algo W8A16, W8A8_SQ_PER_CHANNEL, INT8_SQ",
            "compressed-tensors: int-quantized",
            "quark: int8",
        ),
    ),
)

_COMPRESSED = (
    # compressed-tensors' global scales are divisors, 2688 / amax.
    Format(
        "nvfp4_ct",
        "NVFP4_PACK_QUANTIZED",
        replace(_E2M1, leaves=("weight_packed",)),
        (1, 16),
        (
            Sibling(_SCALE, E4M3, BY_GROUP),
            Sibling(("weight_global_scale",), FLOAT32, SCALAR, "tensor_scale", divisor=True),
            Sibling(
                ("input_global_scale",), FLOAT32, SCALAR, "input", "static inputs", divisor=True
            ),
        ),
        declared=(
            "compressed-tensors: nvfp4-pack-quantized",
            "auto-round: data_type nv_fp, bits 4",
        ),
    ),
    # gpt-oss spells weight and scale `<parameter>_blocks` [out, in/32, 16] and
    # `<parameter>_scales`; DeepSeek-V4 stores I8 and `scale`.
    Format(
        "mxfp4",
        "MXFP4",
        Weight(
            ("weight", "weight_packed", "blocks"), ("U8", "I8"), "out, in/2", "e2m1", _LOW_FIRST
        ),
        (1, 32),
        (Sibling(("weight_scale", "scales", "scale"), E8M0, BY_GROUP),),
        layout="mxfp4",
        declared=(
            "modelopt: quant_algo MXFP4",
            "compressed-tensors: mxfp4-pack-quantized",
            "quark: fp4 per_group 32, scale_format e8m0",
            "mxfp4 (gpt-oss)",
            "fp8: expert_dtype fp4 (DeepSeek-V4), store_dtype mxfp4",
            "auto-round: data_type mx_fp, bits 4",
        ),
    ),
    Format(
        "mxfp6_e2m3",
        "MXFP6_E2M3",
        Weight(("weight_packed", "weight"), ("U8",), "out, in*3/4", "e2m3", _STREAM),
        (1, 32),
        (Sibling(_SCALE, E8M0, BY_GROUP),),
        bits=6,
        layout="mxfp6",
        declared=("compressed-tensors: mxfp6-pack-quantized", "quark: fp6_e2m3"),
    ),
    Format(
        "mxfp6_e3m2",
        "MXFP6_E3M2",
        Weight(("weight_packed", "weight"), ("U8",), "out, in*3/4", "e3m2", _STREAM),
        (1, 32),
        (Sibling(_SCALE, E8M0, BY_GROUP),),
        bits=6,
        layout="mxfp6",
        declared=("quark: fp6_e3m2",),
    ),
    # A stored code is q + 2^(bits-1), also of a zero point.
    Format(
        "int_packed",
        "PACK_QUANTIZED",
        Weight(("weight_packed",), ("I32",), "out, in*bits/32", "int", _STREAM),
        (1, 128),
        (
            Sibling(_SCALE, MODEL, BY_GROUP),
            Sibling(
                ("weight_zero_point",),
                ("I32",),
                ("out*bits/32, in/group",),
                "zero_point",
                "asymmetric",
            ),
            Sibling(("weight_g_idx",), ("I32",), ("in",), "group_index", "never"),
            Sibling(("weight_shape",), ("I64", "I32"), ("2",), "shape"),
        ),
        declared=("compressed-tensors: pack-quantized, 1 to 8 bits, group or channel",),
    ),
)

_GPTQ_SIBLINGS = (
    Sibling(("scales",), ("F16", "BF16", "F32"), ("in/group, out",)),
    Sibling(("qzeros",), ("I32",), ("in/group, out*bits/32",), "zero_point"),
    Sibling(("g_idx",), ("I32",), ("in",), "group_index", "never"),
)
_GPTQ = Weight(
    ("qweight",), ("I32",), "in*bits/32, out", "int", "a little-endian bit stream along the inputs"
)


def _quark_int4(name: str, order: str) -> Format:
    """Return Quark's four-bit integers: two's complement, or unsigned with zero points."""
    signed = name == "int4"
    words = "columns 0, 2, 4, 6, 1, 3, 5, 7 of eight" if not order else "columns in order"
    zeros = Sibling(
        ("weight_zero_point",),
        ("I32",),
        ("in/group, out/8",),
        "zero_point",
        "never" if signed else "always",
    )
    return Format(
        f"{name}_quark{order}",
        f"QUARK_{name.upper()}",
        Weight(("weight",), ("I32",), "in, out/8", "int", f"{words}, low nibble first"),
        (1, 128),
        (Sibling(_SCALE, MODEL, ("in/group, out",)), zeros),
        layout="int4_quark",
        declared=(f"quark: {name}, per_group, pack_method {'order' if order else 'reorder'}",),
    )


_INTEGERS = (
    # The stored zero point is z - 1.
    Format(
        "gptq",
        "GPTQ",
        _GPTQ,
        (1, 128),
        _GPTQ_SIBLINGS,
        layout="gptq",
        declared=(
            "gptq: checkpoint_format gptq, or none",
            "auto-round: packing_format auto_round:auto_gptq",
        ),
    ),
    Format(
        "gptq_v2",
        "GPTQ_V2",
        _GPTQ,
        (1, 128),
        _GPTQ_SIBLINGS,
        layout="gptq",
        declared=("gptq: checkpoint_format gptq_v2",),
    ),
    Format(
        "awq",
        "AWQ",
        Weight(
            ("qweight",),
            ("I32",),
            "in, out*bits/32",
            "int",
            "columns 0, 2, 4, 6, 1, 3, 5, 7 of eight, low nibble first",
        ),
        (1, 128),
        (
            Sibling(("scales",), ("F16", "BF16", "F32"), ("in/group, out",)),
            Sibling(("qzeros",), ("I32",), ("in/group, out*bits/32",), "zero_point"),
        ),
        declared=("awq: version gemm", "auto-round: packing_format auto_round:auto_awq"),
    ),
    *(_quark_int4(name, order) for name in ("int4", "uint4") for order in ("", "_order")),
    Format(
        "nvfp4_quark",
        "NVFP4_QUARK",
        _E2M1,
        (1, 16),
        (*_NVFP4_SCALES, Sibling(("input_scale_2",), FLOAT32, SCALAR, "input")),
        layout="nvfp4",
        declared=("quark: [fp4 per_group 16, fp8_e4m3 per_tensor]",),
    ),
    Format(
        "w4afp8",
        "W4AFP8",
        Weight(("weight",), ("I8",), "out, in/2", "int", _LOW_FIRST),
        (1, 128),
        (
            Sibling(("weight_scale_inv", "weight_scale"), MODEL, BY_GROUP),
            Sibling(("input_scale",), MODEL, SCALAR, "input", "never"),
        ),
        declared=("w4afp8 (SGLang)",),
        decodes=False,
    ),
)

_MLX_SCALES = ("scales",)
_OTHERS = (
    # The value is q * scale + bias.
    Format(
        "mlx_affine",
        "MLX_AFFINE",
        Weight(("weight",), ("U32",), "out, in*bits/32", "int", _STREAM),
        (1, 64),
        (
            Sibling(_MLX_SCALES, ("F16", "BF16", "F32"), BY_GROUP, signed=True),
            Sibling(("biases",), ("F16", "BF16", "F32"), BY_GROUP, "bias"),
        ),
        declared=("mlx: mode affine, or none",),
    ),
    Format(
        "mlx_mxfp4",
        "MLX_MXFP4",
        Weight(("weight",), ("U32",), "out, in/8", "e2m1", _LOW_FIRST),
        (1, 32),
        (Sibling(_MLX_SCALES, ("U8",), BY_GROUP),),
        declared=("mlx: mode mxfp4",),
    ),
    Format(
        "mlx_nvfp4",
        "MLX_NVFP4",
        Weight(("weight",), ("U32",), "out, in/8", "e2m1", _LOW_FIRST),
        (1, 16),
        (Sibling(_MLX_SCALES, ("U8",), BY_GROUP, holds="F8_E4M3"),),
        declared=("mlx: mode nvfp4",),
    ),
    Format(
        "mlx_mxfp8",
        "MLX_MXFP8",
        Weight(("weight",), ("U32",), "out, in/4", "e4m3", "low byte first"),
        (1, 32),
        (Sibling(_MLX_SCALES, ("U8",), BY_GROUP),),
        bits=8,
        declared=("mlx: mode mxfp8",),
    ),
    # The logical shape is in the JSON bytes of quant_state.
    Format(
        "bnb_4bit",
        "BITSANDBYTES_4BIT",
        Weight(
            ("weight",),
            ("U8", "BF16", "F16", "F32"),
            "out*in/2, 1",
            "nf4",
            "even element in the high nibble",
        ),
        (1, 64),
        (
            Sibling(("weight.absmax",), ("F32", "U8"), (), holds="opaque"),
            Sibling(("weight.quant_map",), FLOAT32, ("16",), "state"),
            Sibling(("weight.nested_absmax",), FLOAT32, (), "tensor_scale", "never"),
            Sibling(("weight.nested_quant_map",), FLOAT32, ("256",), "state", "never"),
            Sibling(("weight.quant_state",), ("U8",), (), "state"),
        ),
        declared=("bitsandbytes: load_in_4bit",),
        decodes=False,
    ),
    Format(
        "bnb_int8",
        "BITSANDBYTES_INT8",
        _INT8,
        None,
        (
            Sibling(("SCB",), FLOAT32, ("out",)),
            Sibling(("weight_format",), ("U8",), SCALAR, "state", "never"),
        ),
        bits=8,
        declared=("bitsandbytes: load_in_8bit",),
        decodes=False,
    ),
    # What the tensors are is recorded in the shard's __metadata__.
    Format(
        "torchao",
        "TORCHAO",
        Weight(("_weight_qdata",), ("U8", "I8", "I32", "F8_E4M3"), "out, in", "opaque"),
        None,
        (
            Sibling(("_weight_scale",), (*MODEL, *E4M3, *E8M0), (), holds="opaque"),
            Sibling(("_weight_zero_point",), ("I8", "I32", *MODEL), (), "zero_point", "never"),
            Sibling(("_weight_per_tensor_scale",), FLOAT32, SCALAR, "tensor_scale", "never"),
            Sibling(("_weight_act_pre_scale",), MODEL, ("in",), "pre_quant", "never"),
        ),
        bits=8,
        declared=("torchao: quant_type",),
        decodes=False,
    ),
)

FORMATS: dict[str, Format] = {
    f.name: _entry(f) for f in (*_MODELOPT, *_COMPRESSED, *_INTEGERS, *_OTHERS)
}


def same_layout(a: Format, b: Format) -> bool:
    """Whether two formats store weights and weight scales alike, whatever their group sizes (NVFP4
    with and without an input scale).
    """
    return a is b or a.layout == b.layout


def symmetric_zero(fmt: Format) -> int | None:
    """Return the code that every zero point of symmetric codes is stored as; None where formats
    store none, or more than one.
    """
    middle = 1 << (fmt.bits - 1)
    return {
        "gptq": middle - 1,
        "gptq_v2": middle,
        "int4_quark": 0,
        "int4_quark_order": 0,
    }.get(fmt.name)


def fusable(a: Format, b: Format) -> bool:
    """Whether an engine can hold two weights in one parameter: alike, with the same parameters."""
    return same_layout(a, b) and (a.bits, a.block) == (b.bits, b.block)


def runtime_layout(shape: Shape, rows: int, columns: int) -> str:
    """Return how a block scale's shape differs from [rows, columns] as kernels want it, or ''.

    Kernels read scales in tiles of 128 rows by 4 columns, so both are padded up (``padded``); in
    memory a tile is 32 x 16 values (``swizzled``), and the tiles are often flattened. Source:
    cuBLAS 12.9, "1D block scaling factors layout".
    """
    tall, wide = -(-rows // 128) * 128, -(-columns // 4) * 4
    if shape == (rows, columns):
        return ""
    if shape in ((tall, wide), (tall, columns), (rows, wide)):
        return "padded"
    tiled = len(shape) != 2 or shape == (tall // 4, wide * 4)
    return "swizzled" if shape and tiled and math.prod(shape) == tall * wide > 0 else ""


MODELOPT_ALGOS: dict[str, str] = {
    "NVFP4": "nvfp4",
    "W4A16_NVFP4": "w4a16_nvfp4",
    "NVFP4_AWQ": "nvfp4_awq",
    "NVFP4_SVD": "nvfp4_svd",
    "W4A8_NVFP4_FP8": "w4a8_nvfp4_fp8",
    "W4A8_MXFP4_FP8": "w4a8_mxfp4_fp8",
    "MXFP4": "mxfp4",
    "MXFP8": "mxfp8",
    "FP8": "fp8",
    "FP8_PER_CHANNEL_PER_TOKEN": "fp8_per_channel",
    "FP8_PB_WO": "fp8_block",
    "FP8_PB_REAL": "fp8_block",
    "FP8_BLOCK_SCALES": "fp8_block",
    "W4A16_AWQ": "int4_awq",
    "INT4_AWQ": "int4_awq",
    "W4A8_AWQ": "w4a8_awq",
    "W8A16": "int8",
    "W8A8_SQ_PER_CHANNEL": "int8",
    "INT8_SQ": "int8",
}
"""What ModelOpt and its readers write as ``quant_algo``, in upper case, to the format's name."""
FORMAT_OF_ALGO: dict[str, str] = {
    f.algo: f.name for f in reversed(FORMATS.values())
} | MODELOPT_ALGOS
"""`Format.algo`, and ModelOpt's other spellings, to the name of the format."""
KNOWN_ALGOS = frozenset(MODELOPT_ALGOS) | {"MIXED_PRECISION"}
"""What a ``quant_algo`` may be."""
