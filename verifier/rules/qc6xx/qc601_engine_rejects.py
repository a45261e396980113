# SPDX-License-Identifier: Apache-2.0
"""QC601: the engine's loader rejects the checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from verifier.findings import Finding, Where
from verifier.rules.context import Context
from verifier.rules.registry import rule

if TYPE_CHECKING:
    from verifier.rules.engine_loading import EngineLoads

PARAMETERS_OF_THE_MODEL = "The available parameters"
"""What follows in a message of vLLM are other parameters than the one it rejects."""


@rule(
    "QC601",
    "the engine's loader rejects the checkpoint",
    severity="error",
    depth="engine",
    unit="loads",
    consumers=("vLLM",),
    sources=("vLLM 0.32 model_loader, run on a CPU",),
)
def check(ctx: Context) -> Iterator[Finding]:
    """The engine's own loader accepts the checkpoint.

    **What it does.** Runs vLLM's own configuration parsing, name mapping, model construction,
    weight loading and post-processing on a CPU, in the interpreter of ``--engine-python``. vLLM's
    emulation kernels are selected where a CPU has no kernel; none of them is run. The base is
    loaded as well: if vLLM rejects the base, the candidate is not blamed. What cannot be built on a
    CPU, such as layers that need CUDA, is not checked, and the verdict is then inconclusive.

    **Why it happens.** The engine does not know the model's class, a field of config.json, the
    format of a module, or a tensor's name or shape.

    **Impact.** The server does not start.

    **Fix.** The message names the stage and what the engine did not accept; `docs/engines.md` lists
    the exports that load.
    """
    loads = ctx.engine_loads
    reason = why_not_checked(loads)
    if reason:
        ctx.tally.miss(1, reason)
        return
    ctx.tally.see()
    load = loads.candidate
    if load.rejected:
        about = load.error.partition(PARAMETERS_OF_THE_MODEL)[0]
        tensor = next((name for name in ctx.checkpoint.tensors if name in about), None)
        file = None if load.stage == "weight loading" else "config.json"
        yield ctx.finding(
            f"vLLM rejects the checkpoint during {load.stage}",
            where=Where(tensor, file if tensor is None else None),
            observed=f"{load.error} ({', '.join(filter(None, (load.engine, load.place)))})",
        )


def why_not_checked(loads: EngineLoads) -> str:
    """Return why nothing can be said about the candidate, '' where something can."""
    candidate, base = loads.candidate, loads.base
    if candidate.reason or not candidate.rejected or base is None:
        return candidate.reason
    if base.reason:
        return f"the base could not be loaded: {base.reason}"
    if base.rejected:
        return f"{base.engine} rejects the base as well, during {base.stage}: {base.error}"
    return ""
