# SPDX-License-Identifier: Apache-2.0
"""QC309: a dimension that does not divide into blocks, or into the shards of --tp and --ep."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from verifier.findings import Finding, Severity, Where
from verifier.quantized import config_value
from verifier.rules.context import Context
from verifier.rules.registry import rule
from verifier.schemes import FORMATS, Format, Module, expert_key, role

TILE = 128
"""Rows of a tile of block scales in the kernels' layout; a shard of another height is padded."""
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
"""Leaves whose rows, and whose columns, vLLM spreads over the ranks (ColumnParallelLinear,
RowParallelLinear)."""
REPLICATED = frozenset({"q_a_proj", "kv_a_proj_with_mqa", "eh_proj", "gate", "shared_expert_gate"})
NOT_LAST = frozenset({"q_proj", "k_proj", "gate_proj", "w1"})
"""Leaves that another projection follows in the engine's fused parameter."""
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
Said = tuple[str, Severity, str, str]


@dataclass(frozen=True, slots=True)
class Ranks:
    """Over how many ranks a linear is spread: rows of k and v, which are repeated for want of
    heads; the rest; experts.
    """

    tp: int
    kv: int | None
    experts: int


@rule(
    "QC309",
    "dimension does not divide",
    severity="error",
    depth="header",
    unit="weights",
    consumers=("vLLM", "SGLang", "TensorRT-LLM"),
    sources=(
        "NVIDIA/Model-Optimizer#1552",
        "NVIDIA/Model-Optimizer#1557",
        "nvidia-cosmos/cosmos-reason1#85",
    ),
    engines={
        "vllm": (
            "error",
            '"in features size is not multiple of 16" (NVFP4); validate_fp8_block_shape (block FP8)',
        ),
        "sglang": (
            "error",
            '"in features size is not multiple of 16" (NVFP4); validate_fp8_block_shape (block FP8)',
        ),
    },
)
def check(ctx: Context) -> Iterator[Finding]:
    """Each quantized width is a multiple of its block: 16 for NVFP4, 32 for MXFP8; with --tp and
    --ep each shard's is, too.

    With ``--tp N`` every linear is divided as vLLM divides it: the rows of q, k, v, gate and up,
    the columns of o and down. A shard must hold whole blocks (and with them whole packed bytes),
    with 128x128 block FP8 whole tiles of 128 rows too; attention heads must divide, k and v heads
    or ranks by one another. Shards that kernels pad to their 128-row tile are a warning. With
    ``--ep N`` experts are spread whole, and what ranks are left over (tp / ep) divide each.

    **Why.** Odd dimensions of a tower or adapter were quantized; or the model is served on more
    ranks than it divides into.
    **Hurts.** vLLM and SGLang raise ValueError when they build the layer.
    **Mend.** Leave such a layer unquantized; serve with fewer ranks, or with expert parallelism.
    """
    for module, found in ctx.candidate.formatted:
        if module.dims is None or not found.rowwise or not found.group_size:
            continue
        ctx.tally.see()
        if module.dims[1] % found.group_size and module.weight is not None:
            yield ctx.finding(
                f"{found.algo}: the input width is no multiple of the block",
                tensor=module.weight.name,
                observed=module.dims[1],
                expected=f"a multiple of {found.group_size}",
            )
    if ctx.inputs.tp is not None or ctx.inputs.ep is not None:
        yield from _served(ctx)


def _served(ctx: Context) -> Iterator[Finding]:
    """Yield what does not divide over the ranks."""
    config, tp = ctx.checkpoint.config, ctx.inputs.tp or 1
    heads, kv = (
        config_value(config, "num_attention_heads"),
        config_value(config, "num_key_value_heads"),
    )
    heads = heads if heads and heads > 0 else None
    kv = kv if kv and kv > 0 else heads
    where = Where(None, "config.json")
    if heads and heads % tp:
        yield ctx.finding(
            "attention heads do not divide over the ranks",
            where=where,
            observed=heads,
            expected=f"k x {tp}",
        )
    elif kv and kv % tp and tp % kv:
        yield ctx.finding(
            "key and value heads do not divide over the ranks",
            where=where,
            observed=kv,
            expected=f"k x {tp}",
        )
    if ctx.inputs.ep is not None:
        yield from _spread(ctx, ctx.inputs.ep)
    spread = ctx.inputs.ep or 1
    ranks = Ranks(tp, min(tp, kv) if kv else None, tp // spread if tp % spread == 0 else 1)
    unknown = 0
    for module in ctx.candidate.modules.values():
        weight = module.weight
        if weight is None or module.dims is None or "" in module.parts:
            continue
        said = _divide(
            role(module.name),
            module.name.rpartition(".")[2],
            module.dims,
            _name(ctx, module),
            ranks,
        )
        if said is None:
            unknown += 1
            continue
        ctx.tally.see()
        for message, severity, observed, expected in said:
            yield ctx.finding(
                message, tensor=weight.name, severity=severity, observed=observed, expected=expected
            )
    ctx.tally.miss(unknown, "how engines spread linears of this name is not known")


def _spread(ctx: Context, ep: int) -> Iterator[Finding]:
    """Yield what keeps the experts from being spread evenly."""
    if not any(map(expert_key, ctx.candidate.modules)):
        return
    count = config_value(ctx.checkpoint.config, *EXPERTS)
    if count is None:
        ctx.tally.miss(1, "config.json states no number of experts")
        return
    ctx.tally.see()
    where = Where(None, "config.json")
    if count < ep:
        yield ctx.finding(
            "fewer experts than ranks", where=where, observed=count, expected=f"at least {ep}"
        )
    elif count % ep:
        yield ctx.finding(
            "experts do not divide over the ranks: vLLM gives some ranks one more, SGLang refuses",
            where=where,
            observed=count,
            expected=f"k x {ep}",
            severity="warning",
        )


def _name(ctx: Context, module: Module) -> str:
    found = ctx.candidate.format_of(module) if module.quantized else None
    return found.name if found else ""


@lru_cache(maxsize=4096)
def _divide(
    what: str, leaf: str, dims: tuple[int, int], name: str, ranks: Ranks
) -> tuple[Said, ...] | None:
    """Return what does not divide in one linear, or None where its spread is not known."""
    if what in ("embedding", "lm_head", "norm", "router", "indexer") or leaf in REPLICATED:
        return ()  # vocabularies are padded, the rest stands whole on each rank
    if what in ("vision", "projector") or leaf not in COLUMN | ROW:
        return None
    count: int | None = ranks.experts if what == "routed_expert" else ranks.tp
    if leaf in ("k_proj", "v_proj"):
        count = ranks.kv
    if count is None:
        return None
    found = FORMATS[name] if name else None
    size, side = (dims[0], "rows") if leaf in COLUMN else (dims[1], "columns")
    if size % count:
        return (
            (
                f"{side} do not divide over the ranks",
                "error",
                f"{size} over {count}",
                f"a multiple of {count}",
            ),
        )
    return tuple(_blocks(leaf, side, size // count, count, found)) if found else ()


def _blocks(leaf: str, side: str, share: int, count: int, found: Format) -> Iterator[Said]:
    """Yield how a shard of ``share`` rows or columns cuts blocks or tiles."""
    if found.block is None:
        return
    high, wide = found.block
    if side == "columns":
        if count > 1 and share % wide:
            byte = ", and a packed byte" if found.packed and share % 2 else ""
            yield (
                f"{found.algo}: a shard cuts a block{byte}",
                "error",
                f"{share} columns",
                f"a multiple of {wide}",
            )
    elif high > 1:
        if share % high and (count > 1 or leaf in NOT_LAST):
            yield (
                f"{found.algo}: a shard cuts a tile of {high} rows",
                "error",
                f"{share} rows",
                f"a multiple of {high}",
            )
    elif count > 1 and share % TILE:
        yield (
            f"{found.algo}: kernels pad a shard to tiles of {TILE} rows",
            "warning",
            f"{share} rows",
            f"a multiple of {TILE}",
        )
