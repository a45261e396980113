# SPDX-License-Identifier: Apache-2.0
"""How the names of a checkpoint differ from those expected, each difference with exactly one
explanation.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field

from verifier.checkpoint import Tensor
from verifier.layouts.family import Family
from verifier.schemes import PACKED, ExpertKey, expert_key, packed_name, split

_FUSED = re.compile(r"\.(gate_up_proj|qkv_proj|w13|fc1|gate_up)(\.weight)?$")
_STACKED = re.compile(
    r"\.experts\.(gate_up_proj|gate_proj|up_proj|down_proj|w1|w2|w3|w13|w2_weight|w13_weight)(\.weight)?$"
)
MAX_PARTS = 64
"""The longest tail of a name that is compared, in dot parts; names have some ten."""
_ALIASES = (
    (".block_sparse_moe.", ".mlp."),
    (".feed_forward.", ".mlp."),
    (".ffn.", ".mlp."),
    (".moe.", ".mlp."),
    (".w1.", ".gate_proj."),
    (".w3.", ".up_proj."),
    (".w2.", ".down_proj."),
    (".indexer.", ".index_"),
)

WRAPPERS = frozenset(
    {
        "linear",
        "module",
        "base_layer",
        "orig_module",
        "_orig_mod",
        "_fsdp_wrapped_module",
        "_checkpoint_wrapped_module",
    }
)
"""Attributes under which wrapper modules of calibration and training hold the module that they
wrap."""
_LEAKED = re.compile(
    r"(?:^|[._])(?:weight|input|output|[qkvp]_bmm|bmm2_output|softmax)_quantizers?(?:\.\d+)?\.[^.]+$|_amax$"
)
_PARTS = re.compile(
    r"(?:^|\.)(?:(?P<language>language_model|text_model)|(?P<vision>vision_tower|vision_model|vision_encoder|visual)"
    r"|(?P<audio>audio_tower|audio_model|audio_encoder|speech_encoder)|(?P<mtp>mtp)"
    r"|(?P<projector>multi_modal_projector|mm_projector|patch_merge_mlp))\."
)


@dataclass(slots=True)
class Naming:
    """Differences by explanation; pairs are (name here, name expected).

    ``prefix``: under another prefix, or the in-memory name. ``leaf``: another spelling of the last
    parts. ``fused``: one tensor where the layout has several. ``experts``: missing expert tensors.
    ``lost``: missing, not an expert's. ``unknown``: here and nowhere in the layout. ``leaked``: a
    quantizer's buffer. ``submodel``: under the prefix of another part of the model. ``wrapped``:
    with the part of a wrapper module in it. ``mtp``: missing, an MTP module's. ``biases``: a
    missing bias of a linear whose weight is here.
    """

    prefix: list[tuple[str, str]] = field(default_factory=list)
    leaf: list[tuple[str, str]] = field(default_factory=list)
    fused: list[tuple[str, int]] = field(default_factory=list)
    experts: list[tuple[ExpertKey, str]] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    leaked: list[str] = field(default_factory=list)
    submodel: list[tuple[str, str]] = field(default_factory=list)
    wrapped: list[tuple[str, str]] = field(default_factory=list)
    mtp: list[str] = field(default_factory=list)
    biases: list[str] = field(default_factory=list)


def classify(
    have: Iterable[str],
    expected: set[str],
    allowed: set[str],
    tensors: Mapping[str, Tensor],
    family: Family | None,
    is_mtp: Callable[[str], bool] = lambda name: False,
) -> Naming:
    """Explain every name that is missing or surplus.

    Args:
        have: canonical names of the checkpoint.
        expected: canonical names that belong here.
        allowed: unexpected names that are not reported as surplus.
        tensors: the checkpoint's tensors, for the rank of surplus ones.
        family: to recognise in-memory and optional names.
        is_mtp: whether a name is of an MTP module.
    """
    here = set(have)
    naming = Naming()
    if not expected:
        return naming
    missing = expected - here
    surplus = sorted(n for n in here - expected - allowed if not (family and family.optional(n)))
    naming.leaked = [n for n in surplus if leaked(n)]
    surplus = _take_wrapped([n for n in surplus if not leaked(n)], missing, naming)
    surplus = _take_fused(surplus, missing, tensors, naming)
    by_form: dict[str, str] = {_form(m): m for m in missing}
    by_tail: dict[tuple[str, ...], str] = {}
    for m in sorted(missing):
        parts = m.split(".")
        for i in range(max(0, len(parts) - MAX_PARTS), len(parts) - 1):
            by_tail.setdefault(tuple(parts[i:]), m)
    for name in surplus:
        memory = family is not None and family.in_memory(name)
        match = by_form.get(_form(name))
        if match in missing and not memory:
            naming.leaf.append((name, str(match)))
        else:
            match = _by_tail(name, by_tail, missing) or (match if match in missing else None)
            if match is None and not memory:
                naming.unknown.append(name)
                continue
            strayed = match is not None and not memory and _strayed(name, match)
            (naming.submodel if strayed else naming.prefix).append((name, match or ""))
        if match:
            missing.discard(match)
    for name in sorted(missing):
        key = expert_key(split(name)[0])
        if is_mtp(name):
            naming.mtp.append(name)
        elif name.endswith(".bias") and _linear_here(name, tensors):
            naming.biases.append(name)
        elif key is not None:
            naming.experts.append((key, name))
        else:
            naming.lost.append(name)
    return naming


def leaked(name: str) -> bool:
    """Whether a name is that of a calibration buffer, which ModelOpt strips at export."""
    return ("quantizer" in name or name.endswith("_amax")) and _LEAKED.search(name) is not None


def all_leaked(names: Collection[str]) -> list[str]:
    """Return the names of calibration buffers, in order."""
    text = "\n".join(names)
    return list(filter(leaked, names)) if "quantizer" in text or "_amax" in text else []


def unwrapped(name: str) -> str | None:
    """Return a name without the parts that wrapper modules put into it, or None where it has
    none.
    """
    parts = name.split(".")
    kept = [p for p in parts if p not in WRAPPERS]
    return ".".join(kept) if kept and len(kept) < len(parts) else None


def _take_wrapped(surplus: list[str], missing: set[str], naming: Naming) -> list[str]:
    rest = []
    for name in surplus:
        expected = unwrapped(name)
        if expected in missing:
            naming.wrapped.append((name, str(expected)))
            missing.discard(str(expected))
        else:
            rest.append(name)
    return rest


def _strayed(name: str, expected: str) -> bool:
    """Whether a name has the prefix of another part of the model than the one that it
    belongs to.
    """
    here, there = _part(name), _part(expected)
    return bool(here and there and here != there)


def _part(name: str) -> str:
    """Return the part of the model that a name's outermost prefix means: language, vision … or
    ''.
    """
    found = _PARTS.search(name)
    if found:
        return next(part for part, word in found.groupdict().items() if word)
    return (
        "language"
        if name.startswith(("model.layers.", "model.embed_tokens.", "model.norm.", "lm_head."))
        else ""
    )


def _linear_here(bias: str, tensors: Mapping[str, Tensor]) -> bool:
    head = bias.removesuffix("bias")
    weight = tensors.get(f"{head}weight") or tensors.get(f"{head}weight_packed")
    return weight is not None and len(weight.shape) == 2


def _take_fused(
    surplus: list[str], missing: set[str], tensors: Mapping[str, Tensor], naming: Naming
) -> list[str]:
    """Move fused and stacked names from ``surplus`` to ``naming``, with the missing names that they
    stand for.
    """
    parts_of: dict[str, list[str]] = {}
    experts_at: dict[str, list[str]] = {}
    for m in missing:
        module = split(m)[0]
        packed = packed_name(module)
        if packed:
            parts_of.setdefault(_form(packed), []).append(m)
        key = expert_key(module)
        if key is not None:
            experts_at.setdefault(_layer_tail(key.container), []).append(m)
    rest = []
    for name in surplus:
        tensor = tensors.get(name)
        module = split(name)[0]
        stacked = _STACKED.search(name) and tensor is not None and len(tensor.shape) >= 3
        taken: list[str] = []
        if stacked:
            container = name[: name.index(".experts.") + len(".experts")]
            taken = experts_at.get(_layer_tail(container), [])
        elif _FUSED.search(name) and module.rpartition(".")[2] in PACKED:
            taken = parts_of.get(_form(module), []) or _fused_by_tail(module, parts_of)
        if stacked or taken:
            naming.fused.append((name, len(taken)))
            missing.difference_update(taken)
        else:
            rest.append(name)
    return rest


def _fused_by_tail(module: str, parts_of: dict[str, list[str]]) -> list[str]:
    tail = _layer_tail(_form(module))
    return next((v for k, v in parts_of.items() if _layer_tail(k) == tail), [])


def _layer_tail(name: str) -> str:
    """Return the name from ``layers.N`` on, in normal form up to the container."""
    found = re.search(r"(layers\.\d+\..*)$", name)
    return _form(found[1] if found else name)


def _by_tail(name: str, by_tail: dict[tuple[str, ...], str], missing: set[str]) -> str | None:
    parts = name.split(".")
    for i in range(max(0, len(parts) - MAX_PARTS), len(parts) - 1):
        found = by_tail.get(tuple(parts[i:]))
        if found in missing:
            return found
    return None


def _form(name: str) -> str:
    """Return a name in one spelling of the containers and projections that vendors spell
    differently.
    """
    text = f"{name}."
    for old, new in _ALIASES:
        text = text.replace(old, new)
    return text[:-1]
