# SPDX-License-Identifier: Apache-2.0
"""QC514: one activation scale in most places: calibration never ran."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from verifier.checkpoint import Tensor
from verifier.checkpoint.header import read_json
from verifier.findings import Finding, Where
from verifier.rules.context import Context
from verifier.rules.registry import rule
from verifier.schemes import expert_key, layer_of, packed_name, role

FEWEST_SITES = 3
SHARE = 0.5
MANIFEST = "ckptgate_manifest.json"


@rule(
    "QC514",
    "activations were never calibrated",
    severity="warning",
    depth="payload",
    unit="input scales",
    consumers=("vLLM", "SGLang", "TensorRT-LLM"),
    sources=("NVIDIA/Model-Optimizer#1382", "NVIDIA/Model-Optimizer#1877"),
)
def check(ctx: Context) -> Iterator[Finding]:
    """Activation scales of different layers and inputs differ, or are 1.0 throughout.

    Experts of one layer share an input and often a scale: only different inputs (layer, and what is
    read there) count, and fewer than three of them say nothing. A fallback in a few dead experts is
    no sign of anything.
    **Why.** No text was run, or its tokens reached no quantizer: every scale is the fallback.
    **Hurts.** Activations clip, or lose their small values, in all layers alike.
    **Mend.** Calibrate, or state the policy: ``--input-scale one``. Scales of 1.0 throughout are
    that policy where the manifest (ckptgate_manifest.json, options.input_scale) says so; without
    one it is information only, as in the published MiniMax-M3 mix, whose script writes 1.0 and
    records it nowhere.
    """
    kinds: dict[tuple[str, str], list[tuple[str, Tensor, float]]] = {}
    for module, _, tensor in ctx.candidate.scale_tensors(("input_scale", "input_global_scale")):
        if tensor.elements == 1:
            ctx.tally.see()
            kind = (
                "expert" if expert_key(module.name) else role(module.name),
                tensor.name.rpartition(".")[2],
            )
            kinds.setdefault(kind, []).append(
                (_site(module.name), tensor, float(ctx.payload.array(tensor).reshape(-1)[0]))
            )
    for scales in kinds.values():
        value, count = Counter(v for _, _, v in scales).most_common(1)[0]
        sites = {site for site, _, v in scales if v == value}
        if (
            count < SHARE * len(scales)
            or len(sites) < FEWEST_SITES
            or len({layer_of(s) for s in sites}) < 2
        ):
            continue
        policy = value == 1.0 and count == len(scales)
        if value == 1.0 and _declared(ctx):
            continue
        tensor = next(t for _, t, v in scales if v == value)
        leaf = tensor.name.rpartition(".")[2]
        yield ctx.finding(
            f"{leaf} is 1.0 throughout, and nothing says that this is meant"
            if policy
            else f"one {leaf} in most layers and inputs: it looks like a fallback, not like calibration",
            where=Where(tensor.name, tensor.file, byte=tensor.offset),
            observed=f"{value:.6g} in {count:,} of {len(scales):,}, {len(sites)} inputs",
            expected="one a layer and input",
            count=count,
            severity="info" if policy else None,
        )


def _site(module: str) -> str:
    """Return what a projection reads, named by its layer and its fused parameter: one for all
    experts of a layer.
    """
    key = expert_key(module)
    name = packed_name(module) or module
    return f"{key.container}.*.{name.rpartition('.')[2]}" if key else name


def _declared(ctx: Context) -> bool:
    """Whether the exporter recorded that 1.0 is meant."""
    size = ctx.checkpoint.files.get(MANIFEST)
    if size is None:
        return False
    value, _ = read_json(ctx.checkpoint.source, MANIFEST, size)
    options = value.get("options") if isinstance(value, dict) else None
    return isinstance(options, dict) and options.get("input_scale") == "one"
