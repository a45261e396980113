# SPDX-License-Identifier: Apache-2.0
"""What a corruptor is, how one is registered, and which checkpoints it applies to."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from verifier.findings import Severity, Where
from verifier.selftest.editor import CheckpointEditor

CheckpointKind = Literal["nvfp4", "mxfp8", "mixed", "gptq"]
KINDS: frozenset[CheckpointKind] = frozenset({"nvfp4", "mxfp8", "mixed"})
NVFP4: frozenset[CheckpointKind] = frozenset({"nvfp4", "mixed"})
ONLY_NVFP4: frozenset[CheckpointKind] = frozenset({"nvfp4"})
MXFP8: frozenset[CheckpointKind] = frozenset({"mxfp8"})
UNIFORM: frozenset[CheckpointKind] = frozenset({"nvfp4", "mxfp8"})
GPTQ: frozenset[CheckpointKind] = frozenset({"gptq"})
MIXED: frozenset[CheckpointKind] = frozenset({"mixed"})
Change = Callable[[CheckpointEditor], Where]
"""Makes one defect in place and returns where, as far as it has one location."""
C = TypeVar("C", bound=Change)


@dataclass(frozen=True, slots=True)
class Conditions:
    """Where a defect can be made and caught.

    Attributes:
        kinds: the kinds of checkpoints.
        traits: what such a checkpoint must have, see `traits_of`.
        needs: inputs without which the defect cannot be caught: ``base``, ``merged_from``, or
            ``base|merged_from`` for either of them.
    """

    kinds: frozenset[CheckpointKind] = KINDS
    traits: frozenset[str] = frozenset()
    needs: tuple[str, ...] = ()

    def met_by(self, kind: CheckpointKind, traits: frozenset[str]) -> bool:
        """Whether a checkpoint is of such a kind and has the traits."""
        return kind in self.kinds and self.traits <= traits


def on(
    kinds: frozenset[CheckpointKind] = KINDS, *, traits: str = "", needs: str = ""
) -> Conditions:
    """Return conditions; ``traits`` are words in one string."""
    return Conditions(kinds, frozenset(traits.split()), (needs,) if needs else ())


@dataclass(frozen=True, slots=True)
class Corruptor:
    """One realistic defect, and what a check must report about it.

    Attributes:
        rule: the rule that must catch it.
        name: of the defect, unique for its rule.
        change: makes the defect.
        on: where it can be made and caught.
        severity: of the rule's finding.
        also: other rules that rightly report it at error level.
        instead: rules of which one may report it instead.
    """

    rule: str
    name: str
    change: Change
    on: Conditions = Conditions()
    severity: Severity = "error"
    also: frozenset[str] = frozenset()
    instead: frozenset[str] = frozenset()

    def apply(self, path: Path) -> Where:
        """Make the defect in a checkpoint directory."""
        return self.change(CheckpointEditor(path))


REGISTERED: list[Corruptor] = []


def add(
    rule: str,
    name: str,
    change: Change,
    where: Conditions = Conditions(),
    *,
    severity: Severity = "error",
    also: str = "",
    instead: str = "",
) -> None:
    """Register a change as a defect that ``rule`` must catch, see `Corruptor`.

    ``also`` and ``instead`` are rule numbers in one string: ``"402 404"``.
    """
    rules = _rule_ids(also), _rule_ids(instead)
    REGISTERED.append(Corruptor(rule, name, change, where, severity, *rules))


def defect(
    rule: str,
    where: Conditions = Conditions(),
    *,
    severity: Severity = "error",
    also: str = "",
    instead: str = "",
) -> Callable[[C], C]:
    """Register the decorated function as a defect, named after the function with hyphens."""

    def register(change: C) -> C:
        name = change.__name__.replace("_", "-")
        add(rule, name, change, where, severity=severity, also=also, instead=instead)
        return change

    return register


def _rule_ids(numbers: str) -> frozenset[str]:
    return frozenset(f"QC{number}" for number in numbers.split())


def kind_of(ckpt: CheckpointEditor) -> CheckpointKind:
    """Return the kind of a clean checkpoint, from its tensors."""
    if any(name.endswith(".qweight") for name in ckpt.tensors()):
        return "gptq"
    dtypes = {parts["weight"].dtype for parts in ckpt.modules().values() if "weight" in parts}
    if {"U8", "F8_E4M3"} <= dtypes:
        return "mixed"
    return "nvfp4" if "U8" in dtypes else "mxfp8"


def traits_of(ckpt: CheckpointEditor) -> frozenset[str]:
    """Return what a clean checkpoint has.

    ``index``, ``shards`` (several), ``experts``, ``f32`` (a float32 weight), ``vision`` (a tower),
    ``mtp``, ``mixtral`` (experts as Mixtral names them), ``tokenizer``.
    """
    modules = ckpt.modules()
    weights = [parts["weight"] for parts in modules.values() if "weight" in parts]
    traits = {
        "index": ckpt.has_index,
        "shards": len(ckpt.shards) > 1,
        "experts": any(re.search(r"\.experts\.\d+\.[^.]+$", m) for m in modules),
        "f32": any(weight.dtype == "F32" for weight in weights),
        "vision": any("vision_tower." in m for m in modules),
        "mtp": any(m.startswith("mtp.") for m in modules),
        "mixtral": any(m.endswith(".block_sparse_moe.experts.0.w1") for m in modules),
        "tokenizer": (ckpt.path / "tokenizer.json").is_file(),
    }
    return frozenset(name for name, present in traits.items() if present)
