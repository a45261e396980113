# SPDX-License-Identifier: Apache-2.0
"""QC518: zero points, group index or stored shape contradict the weight."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from verifier.checkpoint import Tensor
from verifier.findings import Finding
from verifier.rules.context import Context
from verifier.rules.registry import rule
from verifier.schemes import Format, Module, symmetric_zero

_WHOLE = frozenset({"I32", "I64", "U32"})


@rule(
    "QC518",
    "zero points, group index or stored shape contradict the weight",
    severity="error",
    depth="payload",
    split=True,
    unit="integer tensors",
    consumers=("vLLM", "SGLang", "transformers"),
    sources=("vllm-project/vllm#38966", "vLLM 0.32 auto_gptq.py", "compressed-tensors 0.20"),
    engines={
        "vllm": (
            "error",
            "ignores the zero points of a symmetric checkpoint, and takes the middle",
        ),
    },
)
def check(ctx: Context) -> Iterator[Finding]:
    """Zero points, group indices and stored shapes of integer formats fit their weight.

    **What it does.** Reads ``qzeros`` and ``weight_zero_point`` where the config declares symmetric
    codes of GPTQ or Quark: every zero point is 2^(bits-1) less one in GPTQ's first format, and
    2^(bits-1) in ``gptq_v2``; Quark's two's complement has 0. Reads ``g_idx`` and
    ``weight_g_idx``: each group exists and has as many inputs as the group size. Reads
    ``weight_shape``. Zero points of asymmetric codes may be anything; with a base their values
    are compared (QC515, QC517).

    **Why it happens.** ``checkpoint_format`` was kept from the other version of the format, or
    tensors were edited or merged.

    **Impact.** All weights are off by one step, which some engines ignore and others apply; an
    index out of range reads foreign memory.

    **Fix.** Declare the version that is stored, or write the tensors again.
    """
    for module, fmt, sibling, tensor in ctx.candidate.scales_of(
        "zero_point", "group_index", "shape"
    ):
        if tensor.dtype not in _WHOLE or module.dims is None:
            continue
        out, in_ = module.dims
        if sibling.role != "shape" and tensor.shape not in sibling.shapes(out, in_):
            continue  # QC306
        ctx.tally.see()
        if sibling.role == "zero_point":
            yield from _zero_points(ctx, module, fmt, tensor)
        elif sibling.role == "group_index":
            yield from _group_index(ctx, fmt, in_, tensor)
        else:
            yield from _shape(ctx, fmt, module.dims, tensor)


def _zero_points(ctx: Context, module: Module, fmt: Format, tensor: Tensor) -> Iterator[Finding]:
    declared = ctx.candidate.declared_for(module)
    scheme = declared.scheme if declared is not None else None
    middle = symmetric_zero(fmt)
    if middle is None or scheme is None or not scheme.symmetric or fmt.bits not in (2, 4, 8):
        return
    words = ctx.payload.array(tensor).reshape(-1).view(np.uint32)
    right = _repeated(middle, fmt.bits)
    wrong = np.flatnonzero(words != right)
    if not wrong.size:
        return
    stored = int(words[wrong[0]])
    neighbours = {_repeated(code, fmt.bits) for code in (middle - 1, middle + 1) if code >= 0}
    other = wrong.size == words.size and stored in neighbours
    yield ctx.finding(
        "zero points of another version of the format than the one declared"
        if other
        else "zero points differ from the one zero point of symmetric codes",
        cause="zero points",
        where=ctx.at_byte(tensor, 4 * int(wrong[0])),
        observed=f"0x{stored:08X}",
        expected=f"0x{right:08X} ({fmt.algo}, symmetric)",
        count=int(wrong.size),
    )


def _repeated(code: int, bits: int) -> int:
    """Return a word of one code."""
    return sum(code << (bits * place) for place in range(32 // bits))


def _group_index(ctx: Context, fmt: Format, in_: int, tensor: Tensor) -> Iterator[Finding]:
    size = fmt.group_size or in_
    groups = max(1, -(-in_ // size))
    index: npt.NDArray[np.int64] = ctx.payload.array(tensor).reshape(-1).astype(np.int64)
    beyond = np.flatnonzero((index < 0) | (index >= groups))
    if beyond.size:
        yield ctx.finding(
            "inputs belong to groups that do not exist",
            cause="group out of range",
            where=ctx.at_byte(tensor, 4 * int(beyond[0])),
            observed=int(index[beyond[0]]),
            expected=f"0..{groups - 1}",
            count=int(beyond.size),
        )
        return
    counts = np.bincount(index, minlength=groups)
    odd = np.flatnonzero(counts > size)
    if odd.size:
        yield ctx.finding(
            "groups have more inputs than the group size",
            cause="group too large",
            tensor=tensor.name,
            observed=f"{int(counts[odd[0]])} inputs in group {int(odd[0])}",
            expected=f"{size}",
            count=int(odd.size),
        )


def _shape(ctx: Context, fmt: Format, dims: tuple[int, int], tensor: Tensor) -> Iterator[Finding]:
    out, held = dims
    stated = [int(n) for n in ctx.payload.array(tensor).reshape(-1)]
    padding = 32 // fmt.bits
    fits = len(stated) == 2 and stated[0] == out and held - padding < stated[1] <= held
    if not fits:
        yield ctx.finding(
            "the stored shape is not that of the weight as declared",
            cause="stored shape",
            tensor=tensor.name,
            observed=stated,
            expected=[out, held],
        )
