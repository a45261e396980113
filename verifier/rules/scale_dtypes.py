# SPDX-License-Identifier: Apache-2.0
"""Dtypes of scales: those that a format has, and one for all scales of a kind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from verifier.checkpoint import Tensor
from verifier.schemes import FLOATS, Format, Sibling


def wrong_dtypes(
    scales: Iterable[tuple[Format, Sibling, Tensor]],
) -> Iterator[tuple[Format, Tensor, str]]:
    """Yield the tensors whose dtype their format does not have, and those of another float dtype
    than most of their kind, each with the dtypes expected.
    """
    kinds: dict[tuple[str, str], list[tuple[Format, Sibling, Tensor]]] = {}
    for fmt, sibling, tensor in scales:
        kinds.setdefault((fmt.name, sibling.leaves[0]), []).append((fmt, sibling, tensor))
    for alike in kinds.values():
        floats = Counter(t.dtype for _, s, t in alike if t.dtype in s.dtypes and t.dtype in FLOATS)
        usual = floats.most_common(1)[0][0] if floats else ""
        for fmt, sibling, tensor in alike:
            if tensor.dtype not in sibling.dtypes:
                yield fmt, tensor, " or ".join(sibling.dtypes)
            elif tensor.dtype in FLOATS and tensor.dtype != usual:
                yield fmt, tensor, f"{usual}, as the others"
