# SPDX-License-Identifier: Apache-2.0
"""Dtypes of scales: those that a format has, and one float dtype for all scales of a kind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from verifier.checkpoint import Tensor
from verifier.quantized import ModuleGroup
from verifier.schemes import Format, Sibling


class ScaleKind(NamedTuple):
    """One scale of the modules of a group."""

    group: ModuleGroup
    format: Format
    leaf: str
    sibling: Sibling

    @property
    def dtype(self) -> str:
        """The dtype on disk, which is the same in the whole group."""
        return self.group.first.parts[self.leaf].dtype


def scale_kinds(groups: Iterable[ModuleGroup], *, scalars: bool) -> list[ScaleKind]:
    """Return the scales that groups of modules have: scalars next to the weight's own scale, or all
    others.
    """
    kinds = []
    for group in groups:
        module, fmt = group.first, group.format
        if fmt is None:
            continue
        for leaf in module.scales:
            sibling = fmt.sibling(leaf)
            if sibling is None:
                continue
            if scalars == (sibling.scalar and module.parts[leaf] is not module.scale):
                kinds.append(ScaleKind(group, fmt, leaf, sibling))
    return kinds


def wrong_dtypes(kinds: Iterable[ScaleKind]) -> Iterator[tuple[Format, Tensor, str]]:
    """Yield the tensors whose dtype their format does not have, and those whose dtype differs
    from most of their kind, each with the dtypes expected.
    """
    alike: dict[tuple[str, str], list[ScaleKind]] = {}
    for kind in kinds:
        alike.setdefault((kind.format.name, kind.sibling.leaves[0]), []).append(kind)
    for members in alike.values():
        usual = _usual_dtype(members)
        for kind in members:
            expected = ""
            if kind.dtype not in kind.sibling.dtypes:
                expected = " or ".join(kind.sibling.dtypes)
            elif kind.dtype != usual:
                expected = f"{usual}, as the others"
            if expected:
                for module in kind.group.modules:
                    yield kind.format, module.parts[kind.leaf], expected


def _usual_dtype(kinds: Iterable[ScaleKind]) -> str:
    """Return the dtype that most scales have, of those that their format has."""
    counts: Counter[str] = Counter()
    for kind in kinds:
        if kind.dtype in kind.sibling.dtypes:
            counts[kind.dtype] += len(kind.group.modules)
    return counts.most_common(1)[0][0] if counts else ""
