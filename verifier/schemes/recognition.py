# SPDX-License-Identifier: Apache-2.0
"""Which format the tensors of one module show: by leaves, dtypes and shapes.

What tensors do not determine (the width of integer codes, the block of a weight that is smaller
than one) is taken from the declared format. A scale that does not fit its weight does not hide the
format: rules compare it with what the format says.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from verifier.checkpoint import Tensor
from verifier.schemes.formats import E8M0, FORMATS, Block, Format

Dims = tuple[int, int]
FLOATS = frozenset({"BF16", "F16", "F32"})
WEIGHT_LEAVES = ("weight", "weight_packed", "qweight", "_weight_qdata", "", "blocks")
"""The names of a weight, in the order in which one is taken for it."""
WEIGHT_SCALES = (
    "weight_scale",
    "weight_scale_inv",
    "scales",
    "scale",
    "SCB",
    "weight.absmax",
    "_weight_scale",
)
"""The names of a weight's block, row or tensor scale."""
CODE_DTYPES = frozenset({"F8_E4M3", "U8", "I8", "I32", "U32"})
"""The dtypes of stored codes; whole numbers of other kinds are buffers."""
_TILES: tuple[Block, ...] = ((128, 128), (32, 32))
_WIDTHS = (4, 8, 2, 3, 5, 6, 7, 1)


class Shown(NamedTuple):
    """What tensors show: the format, None where they show none or contradict one another, and the
    logical (out, in) of the weight.
    """

    format: Format | None
    dims: Dims | None


def weight_leaf(parts: Mapping[str, Tensor]) -> str | None:
    """Return the leaf of a module's weight, None where it has none."""
    return next((leaf for leaf in WEIGHT_LEAVES if leaf in parts), None)


def scale_leaf(parts: Mapping[str, Tensor]) -> str | None:
    """Return the leaf of the weight's scale, None where it has none."""
    return next((leaf for leaf in WEIGHT_SCALES if leaf in parts), None)


def recognize(parts: Mapping[str, Tensor], declared: Format | None = None) -> Shown:
    """Return what the tensors of a quantized module show.

    Args:
        parts: its tensors by leaf.
        declared: the format that a config declares for it, where known.
    """
    leaf, found = weight_leaf(parts), scale_leaf(parts)
    if leaf is None:
        return Shown(None, None)
    weight, scale = parts[leaf], parts[found] if found is not None else None
    if "weight.quant_state" in parts or "weight.absmax" in parts:
        return Shown(FORMATS["bnb_4bit"], None)
    if leaf == "_weight_qdata":
        return Shown(FORMATS["torchao"], None)
    if leaf == "blocks":
        rank = len(weight.shape)
        dims = (weight.shape[0], weight.shape[1] * 32) if rank == 3 else None
        return Shown(FORMATS["mxfp4"] if dims else None, dims)
    if len(weight.shape) != 2:
        return Shown(None, None)
    if leaf == "qweight":
        return _words(parts, weight, scale, declared)
    if weight.dtype == "U8":
        return _shown(_bytes(parts, leaf, weight, scale, declared), weight)
    if weight.dtype == "I8":
        return _shown(_signed(parts, weight, scale, declared), weight)
    if weight.dtype == "I32" and leaf == "weight_packed":
        return _shown(_packed(parts, weight, scale, declared), weight)
    if weight.dtype == "I32" and leaf == "weight":
        return _shown(_by_inputs("int4_quark", weight, scale, declared), weight)
    if weight.dtype == "U32":
        return _shown(_mlx(parts, weight, scale, declared), weight)
    dims = weight.shape[0], weight.shape[1]
    return Shown(_fp8(scale, dims, declared) if weight.dtype == "F8_E4M3" else None, dims)


def _shown(found: Format | None, weight: Tensor) -> Shown:
    return Shown(found, found.dims(weight.shape) if found is not None else None)


def _fits(fmt: Format, weight: Tensor, scale: Tensor | None) -> bool:
    """Whether a scale has a dtype and a shape that the format gives it next to this weight."""
    dims = fmt.dims(weight.shape)
    sibling = fmt.siblings[0]
    return (
        dims is not None
        and scale is not None
        and scale.dtype in sibling.dtypes
        and scale.shape in sibling.shapes(*dims)
    )


def _first(candidates: Iterable[Format], weight: Tensor, scale: Tensor | None) -> Format | None:
    return next((f for f in candidates if _fits(f, weight, scale)), None)


def _is(declared: Format | None, *layouts: str) -> bool:
    return declared is not None and declared.layout in layouts


def _bytes(
    parts: Mapping[str, Tensor],
    leaf: str,
    weight: Tensor,
    scale: Tensor | None,
    declared: Format | None,
) -> Format:
    """Return the format of codes in bytes: four or six bits wide."""
    fitting = _first(_BYTE_FORMATS, weight, scale)
    layout = fitting.layout if fitting is not None else ""
    if layout == "mxfp6" and weight.shape[1] % 24:  # a block of 32 codes has 24 bytes
        layout = ""
    if not layout and scale is not None and scale.dtype in FLOATS:
        layout = "int4_awq" if scale.shape[:1] == (2 * weight.shape[0],) else ""
    if not layout and _is(declared, "nvfp4", "nvfp4_ct", "mxfp4", "mxfp6", "int4_awq"):
        layout = declared.layout if declared is not None else ""
    if not layout and scale is not None and scale.dtype in E8M0:
        layout = "" if "weight_scale_2" in parts or "weight_global_scale" in parts else "mxfp4"
    if layout == "mxfp4":
        return FORMATS["w4a8_mxfp4_fp8" if "input_scale" in parts else "mxfp4"]
    if layout == "mxfp6":
        return declared if declared and declared.layout == "mxfp6" else FORMATS["mxfp6_e2m3"]
    if layout == "int4_awq":
        return _int4_awq(parts, weight, scale, declared)
    if leaf == "weight_packed":
        return FORMATS["nvfp4_ct"]
    return _nvfp4(parts, weight, scale, declared)


def _nvfp4(
    parts: Mapping[str, Tensor], weight: Tensor, scale: Tensor | None, declared: Format | None
) -> Format:
    if "svdquant_lora_a" in parts:
        shape = parts["svdquant_lora_a"].shape
        return FORMATS["nvfp4_svd"].sized(rank=shape[0] if shape else 1)
    if "input_scale_2" in parts:
        return FORMATS["nvfp4_quark"]
    if "pre_quant_scale" in parts:
        return FORMATS["nvfp4_awq"]
    if "input_scale" in parts:
        return FORMATS["nvfp4"]
    if declared is not None and declared.name == "w4a16_nvfp4" and _fits(declared, weight, scale):
        return declared  # with groups of 32, which vLLM reads for weights alone
    return FORMATS["w4a16_nvfp4"]


def _int4_awq(
    parts: Mapping[str, Tensor], weight: Tensor, scale: Tensor | None, declared: Format | None
) -> Format:
    name = "w4a8_awq" if "weight_scale_2" in parts else "int4_awq"
    group = _group(weight.shape[1], scale.shape[1] if scale and len(scale.shape) == 2 else 0)
    return FORMATS[name].sized(block=_block(group, declared, (1, 128)))


def _signed(
    parts: Mapping[str, Tensor], weight: Tensor, scale: Tensor | None, declared: Format | None
) -> Format | None:
    """Return the format of I8: eight-bit integers, or two four-bit codes per byte."""
    if "SCB" in parts:
        return FORMATS["bnb_int8"]
    if scale is not None and scale.dtype in E8M0:
        return FORMATS["mxfp4"]
    known = [FORMATS["int8"], FORMATS["w4afp8"]]
    if declared is not None and declared.layout in ("int8", "w4afp8"):
        known.insert(0, declared)
    own = declared if declared is not None and "I8" in declared.weight.dtypes else known[0]
    return _first(known, weight, scale) or own


def _packed(
    parts: Mapping[str, Tensor], weight: Tensor, scale: Tensor | None, declared: Format | None
) -> Format | None:
    """Return compressed-tensors' integers; their width is declared, or follows from zero points."""
    base = FORMATS["int_packed"]
    bits = declared.bits if declared is not None and declared.name == base.name else 0
    zero, out = parts.get("weight_zero_point"), weight.shape[0]
    if not bits and zero is not None and len(zero.shape) == 2:
        bits = next((b for b in _WIDTHS if -(-out * b // 32) == zero.shape[0]), 0)
    if not bits:
        return None
    columns = scale.shape[1] if scale is not None and len(scale.shape) == 2 else 0
    width = weight.shape[1] * 32 // bits
    stated = declared.group_size if declared is not None and declared.name == base.name else None
    if columns == 1 and width > 1 and stated is None:
        return base.sized(bits=bits, block=None)
    return base.sized(bits=bits, block=_block(_group(width, columns), declared, (1, 128)))


def _words(
    parts: Mapping[str, Tensor], weight: Tensor, scale: Tensor | None, declared: Format | None
) -> Shown:
    """Return the format of ``qweight``: GPTQ packs inputs into words, AWQ outputs."""
    columns = weight.shape[1]
    zeros = parts.get("qzeros")
    out = scale.shape[1] if scale is not None and len(scale.shape) == 2 else 0
    packed = zeros.shape[1] if zeros is not None and len(zeros.shape) == 2 else 0
    awq = _is(declared, "awq")
    if out:
        awq = columns < out and columns != out
    elif packed:
        awq = columns == packed
    if awq:
        name, words = "awq", columns
    else:
        name = "gptq_v2" if declared is not None and declared.name == "gptq_v2" else "gptq"
        words = packed
    bits = declared.bits if _is(declared, "gptq", "awq") and declared else 4
    if out and words and words != -(-out * bits // 32):
        bits = words * 32 // out or bits
    fmt = FORMATS[name].sized(bits=bits)
    dims = fmt.dims(weight.shape)
    if dims is None:
        return Shown(None, None)
    groups = scale.shape[0] if scale is not None and len(scale.shape) == 2 else 0
    return Shown(fmt.sized(block=_block(_group(dims[1], groups), declared, (1, 128))), dims)


def _by_inputs(
    name: str, weight: Tensor, scale: Tensor | None, declared: Format | None
) -> Format | None:
    if scale is None or len(scale.shape) != 2:
        return declared if declared is not None and declared.name == name else None
    group = _group(weight.shape[0], scale.shape[0])
    return FORMATS[name].sized(block=_block(group, declared, (1, 128)))


def _mlx(
    parts: Mapping[str, Tensor], weight: Tensor, scale: Tensor | None, declared: Format | None
) -> Format | None:
    """Return MLX's format; the width of affine codes is declared."""
    named = declared if declared is not None and declared.name.startswith("mlx_") else None
    if scale is None or scale.dtype != "U8":
        return named
    modes = (FORMATS[n] for n in ("mlx_mxfp4", "mlx_nvfp4", "mlx_mxfp8"))
    return _first(modes, weight, scale) or named


def _fp8(scale: Tensor | None, dims: Dims, declared: Format | None) -> Format | None:
    if scale is None:
        return None
    if scale.dtype in E8M0:
        names: tuple[tuple[str, Block], ...] = (
            ("mxfp8", (1, 32)),
            ("fp8_block", (128, 128)),
            ("mxfp8_block", (32, 32)),
        )
    else:
        names = (
            ("fp8", None),
            ("fp8_per_channel", None),
            *(("fp8_block", t) for t in _TILES),
        )
    candidates = [FORMATS[n].sized(block=b) for n, b in names]
    if declared is not None and declared.layout == "fp8_block" and declared not in candidates:
        candidates.append(declared)
    fitting = [f for f in candidates if scale.shape in f.siblings[0].shapes(*dims)]
    if declared is not None and any(f.layout == declared.layout for f in fitting):
        fitting = [f for f in fitting if f.layout == declared.layout]
        return declared if declared in fitting else fitting[0]
    return fitting[0] if fitting else None


def _group(width: int, count: int) -> int:
    """Return the group size of ``count`` groups over a width, 0 where they do not divide it."""
    return width // count if count and width % count == 0 else 0


def _block(group: int, declared: Format | None, default: Block) -> Block:
    """Return the block of a group size, the declared one where scales do not determine it."""
    if group:
        return (1, group)
    return declared.block if declared is not None and declared.block else default


_BYTE_FORMATS = tuple(FORMATS[n] for n in ("w4a16_nvfp4", "mxfp4", "mxfp6_e2m3"))
