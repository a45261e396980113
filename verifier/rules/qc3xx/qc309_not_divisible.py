# SPDX-License-Identifier: Apache-2.0
"""QC309: dimension is not divisible."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from verifier.findings import Finding, Severity, Where
from verifier.quantized import config_value
from verifier.rules.alike import each_quantized
from verifier.rules.context import Context
from verifier.rules.registry import rule
from verifier.schemes import FORMATS, Format, Module, expert_key, role, split_tiles

TILE = 128
"""Rows of a tile of block scales in the kernels' layout; other shard heights are padded to it."""
COLUMN = frozenset(
    {
        "q_proj",
        "k_proj",
        "v_proj",
        "qkv_proj",
        "gate_proj",
        "up_proj",
        "gate_up_proj",
        "w1",
        "w3",
        "q_b_proj",
        "kv_b_proj",
    }
)
ROW = frozenset({"o_proj", "down_proj", "w2"})
"""Leaves that vLLM shards by rows (ColumnParallelLinear) and by columns (RowParallelLinear)."""
REPLICATED = frozenset({"q_a_proj", "kv_a_proj_with_mqa", "eh_proj", "gate", "shared_expert_gate"})
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_STOPS: tuple[Severity, str] = (
    "error",
    '"in features size is not multiple of 16" (NVFP4), or stops in validate_fp8_block_shape',
)


class Indivisible(NamedTuple):
    """One dimension that does not divide: the fields of its finding."""

    cause: str
    message: str
    severity: Severity
    observed: str
    expected: str


@dataclass(frozen=True, slots=True)
class Ranks:
    """The number of ranks that share a linear layer (``tp``), keys and values (``kv``; heads are
    replicated beyond their number), or an expert (``experts``).
    """

    tp: int
    kv: int | None
    experts: int


@rule(
    "QC309",
    "dimension is not divisible",
    severity="error",
    depth="header",
    unit="weights",
    consumers=("vLLM", "SGLang", "TensorRT-LLM"),
    sources=(
        "NVIDIA/Model-Optimizer#1552",
        "NVIDIA/Model-Optimizer#1557",
        "nvidia-cosmos/cosmos-reason1#85",
    ),
    engines={"vllm": _STOPS, "sglang": _STOPS},
)
def check(ctx: Context) -> Iterator[Finding]:
    """Quantized dimensions are divisible by the block size, with --tp and --ep also on each rank.

    **What it does.** Checks that the input width of each quantized weight is a multiple of the
    block size: 16 for NVFP4, 32 for MXFP8.

    With ``--tp N``, every linear layer is sharded as vLLM shards it: q, k, v, gate and up by rows,
    o and down by columns. A shard must consist of whole blocks (and so of whole packed bytes), with
    128x128 block FP8 also of whole tiles of 128 rows. The number of attention heads must be
    divisible, and the number of key/value heads must divide the ranks or be divisible by them.
    Shards that kernels pad to tiles of 128 rows are a warning. With ``--ep N``, experts are
    distributed whole, and the remaining ranks (tp / ep) shard each of them.

    **Why it happens.** Odd dimensions of a tower or adapter were quantized, or the model is served
    on more ranks than its dimensions allow.

    **Impact.** vLLM and SGLang raise ValueError when they build the layer.

    **Fix.** Leave such a layer unquantized; serve with fewer ranks, or with expert parallelism.
    """
    for group in ctx.candidate.module_groups:
        if _block_width(ctx, group.first):
            ctx.tally.see(len(group.modules))
    yield from each_quantized(ctx, _check_blocks)
    if ctx.inputs.tp is not None or ctx.inputs.ep is not None:
        yield from _check_tiles(ctx)
        yield from _check_ranks(ctx)


def _block_width(ctx: Context, module: Module) -> int | None:
    """Return the width of the blocks of a row, None where the format has none."""
    fmt = ctx.candidate.format_of(module)
    blocks = fmt is not None and module.dims is not None and fmt.rowwise
    return fmt.group_size if blocks and fmt is not None else None


def _check_blocks(ctx: Context, module: Module) -> Iterator[Finding]:
    """Yield a weight whose rows are not whole blocks."""
    fmt, width = ctx.candidate.format_of(module), _block_width(ctx, module)
    if fmt is None or not width or module.dims is None or module.weight is None:
        return
    if module.dims[1] % width:
        yield ctx.finding(
            f"{fmt.algo}: the input width is not a multiple of the block size",
            cause="block",
            tensor=module.weight.name,
            observed=module.dims[1],
            expected=f"a multiple of {width}",
        )


def _check_tiles(ctx: Context) -> Iterator[Finding]:
    """Yield the projections in whose last tile of scales the next one of a fused group begins."""
    tiled: dict[int, dict[str, int]] = {}
    tensors: dict[str, str] = {}
    for module, fmt in ctx.candidate.formatted:
        if fmt.block and fmt.block[0] > 1 and module.dims is not None and module.weight is not None:
            tiled.setdefault(fmt.block[0], {})[module.name] = module.dims[0]
            tensors[module.name] = module.weight.name
    for tile, rows in tiled.items():
        ctx.tally.see(len(rows))
        for name, fused in split_tiles(rows, tile, ctx.checkpoint.model_type):
            yield ctx.finding(
                f"a tile of scales reaches into the next projection of {fused.rpartition('.')[2]}",
                cause="fused tile",
                tensor=tensors[name],
                observed=f"{rows[name]} rows",
                expected=f"a multiple of {tile}",
            )


def _check_ranks(ctx: Context) -> Iterator[Finding]:
    """Yield the heads, experts and weights that do not divide over the ranks."""
    config, tp, ep = ctx.checkpoint.config, ctx.inputs.tp or 1, ctx.inputs.ep or 1
    heads = max(0, config_value(config, "num_attention_heads") or 0)
    kv = max(0, config_value(config, "num_key_value_heads") or 0) or heads
    yield from _check_heads(ctx, heads, kv, tp)
    if ctx.inputs.ep is not None:
        yield from _check_experts(ctx, ctx.inputs.ep)
    ranks = Ranks(tp, min(tp, kv) if kv else None, tp // ep if tp % ep == 0 else 1)
    unknown = 0
    for module in ctx.candidate.modules.values():
        weight = module.weight
        if weight is None or module.dims is None or "" in module.parts:
            continue
        kind, leaf = role(module.stem), module.name.rpartition(".")[2]
        indivisible = _indivisible(kind, leaf, module.dims, _format_name(ctx, module), ranks)
        if indivisible is None:
            unknown += 1
            continue
        ctx.tally.see()
        for cause, message, severity, observed, expected in indivisible:
            yield ctx.finding(
                message,
                cause=cause,
                tensor=weight.name,
                severity=severity,
                observed=observed,
                expected=expected,
            )
    ctx.tally.miss(unknown, "how engines shard linear layers of this name is not known")


def _check_heads(ctx: Context, heads: int, kv: int, tp: int) -> Iterator[Finding]:
    """Yield a number of heads that does not divide over the ranks; 0 stands for unknown."""
    where = Where(None, "config.json")
    if heads and heads % tp:
        yield ctx.finding(
            "num_attention_heads is not divisible by the TP size",
            cause="heads",
            where=where,
            observed=heads,
            expected=f"a multiple of {tp}",
        )
    elif kv and kv % tp and tp % kv:
        yield ctx.finding(
            "num_key_value_heads neither divides the TP size nor is divisible by it",
            cause="key/value heads",
            where=where,
            observed=kv,
            expected=f"a multiple or a divisor of {tp}",
        )


def _check_experts(ctx: Context, ep: int) -> Iterator[Finding]:
    """Yield a number of experts that cannot be distributed evenly."""
    if not any(map(expert_key, ctx.candidate.modules)):
        return
    count = config_value(ctx.checkpoint.config, *EXPERTS)
    if count is None:
        ctx.tally.miss(1, "config.json does not state the number of experts")
        return
    ctx.tally.see()
    where = Where(None, "config.json")
    if count < ep:
        yield ctx.finding(
            "fewer experts than EP ranks",
            cause="fewer experts than ranks",
            where=where,
            observed=count,
            expected=f"at least {ep}",
        )
    elif count % ep:
        yield ctx.finding(
            "the number of experts is not divisible by the EP size:"
            " vLLM gives some ranks one more, SGLang refuses",
            cause="experts",
            where=where,
            observed=count,
            expected=f"a multiple of {ep}",
            severity="warning",
        )


def _format_name(ctx: Context, module: Module) -> str:
    fmt = ctx.candidate.format_of(module) if module.quantized else None
    return fmt.name if fmt else ""


@lru_cache(maxsize=4096)
def _indivisible(
    kind: str, leaf: str, dims: tuple[int, int], format_name: str, ranks: Ranks
) -> tuple[Indivisible, ...] | None:
    """Return what does not divide in a linear layer, or None where its sharding is not known."""
    if kind in ("embedding", "lm_head", "norm", "router", "indexer") or leaf in REPLICATED:
        return ()  # vocabularies are padded, the rest is replicated
    if kind in ("vision", "projector") or leaf not in COLUMN | ROW:
        return None
    count: int | None = ranks.experts if kind == "routed_expert" else ranks.tp
    if leaf in ("k_proj", "v_proj"):
        count = ranks.kv
    if count is None:
        return None
    size, side = (dims[0], "rows") if leaf in COLUMN else (dims[1], "columns")
    if size % count:
        message = f"the number of {side} is not divisible by the number of ranks"
        return (
            Indivisible("ranks", message, "error", f"{size} / {count}", f"a multiple of {count}"),
        )
    if not format_name:
        return ()
    return tuple(_split_blocks(leaf, side, size // count, count, FORMATS[format_name]))


def _split_blocks(
    leaf: str, side: str, share: int, count: int, fmt: Format
) -> Iterator[Indivisible]:
    """Yield the blocks or tiles that the boundary of a shard of ``share`` rows or columns splits.

    ``count`` is the number of shards.
    """
    if fmt.block is None:
        return
    block_rows, block_columns = fmt.block
    observed = f"{share} {side} per shard"
    if side == "columns":
        if count > 1 and share % block_columns:
            what = "block and a packed byte" if fmt.packed and share % 2 else "block"
            message = f"{fmt.algo}: TP shard boundary splits a quantization {what}"
            yield Indivisible(
                "shard of a block", message, "error", observed, f"a multiple of {block_columns}"
            )
    elif block_rows > 1:
        if count > 1 and share % block_rows:
            message = f"{fmt.algo}: TP shard boundary splits a tile of {block_rows} rows"
            yield Indivisible(
                "shard of a tile", message, "error", observed, f"a multiple of {block_rows}"
            )
    elif count > 1 and share % TILE:
        message = f"{fmt.algo}: kernels pad a shard to tiles of {TILE} rows"
        yield Indivisible("padded", message, "warning", observed, f"a multiple of {TILE}")
