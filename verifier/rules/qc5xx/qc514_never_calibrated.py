# SPDX-License-Identifier: Apache-2.0
"""QC514: activation scales look uncalibrated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from verifier.checkpoint import Tensor
from verifier.checkpoint.header import read_json
from verifier.findings import Finding, Where
from verifier.rules.context import Context
from verifier.rules.registry import rule
from verifier.schemes import expert_key, layer_of, packed_name, role

FEWEST_INPUTS = 3
SHARE = 0.5
MANIFEST = "ckptgate_manifest.json"


@rule(
    "QC514",
    "activation scales look uncalibrated",
    severity="warning",
    depth="payload",
    unit="input scales",
    consumers=("vLLM", "SGLang", "TensorRT-LLM"),
    sources=("NVIDIA/Model-Optimizer#1382", "NVIDIA/Model-Optimizer#1877"),
)
def check(ctx: Context) -> Iterator[Finding]:
    """Activation scales differ between layers and inputs, or are all 1.0 by policy.

    **What it does.** Looks for one value in at least half of the activation scales. Only different
    inputs (of a layer and a fused projection) count, since the experts of a layer share an input
    and often a scale; a value at fewer than three inputs, such as a fallback in a few dead experts,
    is not reported. Scales that are all 1.0 are a policy if the manifest (ckptgate_manifest.json,
    options.input_scale) says so, else only a note: the published MiniMax-M3 mix writes 1.0 and
    records it nowhere.

    **Why it happens.** No text was run, or its tokens reached no quantizer: every scale is the
    fallback.

    **Impact.** Activations clip, or lose their small values, in all layers alike.

    **Fix.** Calibrate, or declare the policy: ``--input-scale one``.
    """
    for scales in _scales_by_kind(ctx):
        value, count = Counter(s.value for s in scales).most_common(1)[0]
        equal = [s for s in scales if s.value == value]
        inputs = {s.input for s in equal}
        if count < SHARE * len(scales) or len(inputs) < FEWEST_INPUTS:
            continue
        if len({layer_of(name) for name in inputs}) < 2 or (value == 1.0 and _declared(ctx)):
            continue
        all_one = value == 1.0 and count == len(scales)
        tensor = equal[0].tensor
        leaf = tensor.name.rpartition(".")[2]
        if all_one:
            message = f"every {leaf} is 1.0, and the manifest does not declare that as a policy"
        else:
            message = f"most layers and inputs have the same {leaf}: a fallback, not calibration"
        yield ctx.finding(
            message,
            where=Where(tensor.name, tensor.file, byte=tensor.offset),
            observed=f"{value:.6g} in {count:,} of {len(scales):,}, {len(inputs)} inputs",
            expected="one per layer and input",
            count=count,
            severity="info" if all_one else None,
        )


class ActivationScale(NamedTuple):
    """A scalar activation scale, and the name of the input that it scales."""

    input: str
    tensor: Tensor
    value: float


def _scales_by_kind(ctx: Context) -> list[list[ActivationScale]]:
    """Return the scalar activation scales: those of experts, and those of each other role."""
    kinds: dict[tuple[str, str], list[ActivationScale]] = {}
    for module, _, _, tensor in ctx.candidate.scales_of("input"):
        if tensor.elements != 1:
            continue
        ctx.tally.see()
        kind = "expert" if expert_key(module.name) else role(module.name)
        value = float(ctx.payload.array(tensor).reshape(-1)[0])
        scale = ActivationScale(_input_name(module.name), tensor, value)
        kinds.setdefault((kind, tensor.name.rpartition(".")[2]), []).append(scale)
    return list(kinds.values())


def _input_name(module: str) -> str:
    """Return a name for what a projection reads: equal within a fused group, and for all experts of
    a layer.
    """
    key = expert_key(module)
    name = packed_name(module) or module
    return f"{key.container}.*.{name.rpartition('.')[2]}" if key else name


def _declared(ctx: Context) -> bool:
    """Whether the exporter recorded 1.0 as its policy."""
    size = ctx.checkpoint.files.get(MANIFEST)
    if size is None:
        return False
    value, _ = read_json(ctx.checkpoint.source, MANIFEST, size)
    options = value.get("options") if isinstance(value, dict) else None
    return isinstance(options, dict) and options.get("input_scale") == "one"
