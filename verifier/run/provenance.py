# SPDX-License-Identifier: Apache-2.0
"""Where checkpoints came from, and what reading them fetched."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from verifier.checkpoint import Source
from verifier.summary import Fetched


def commits_of(sources: Mapping[str, Source]) -> dict[str, str]:
    """Return the commit of each source that has one, by its role."""
    return {role: s.revision for role, s in sources.items() if s.revision}


def fetched_from(sources: Collection[Source]) -> Fetched | None:
    """Return what was fetched over the network, None where all sources are local."""
    if not any(s.remote for s in sources):
        return None
    amounts = [s.traffic() for s in {id(s): s for s in sources}.values()]
    return Fetched(sum(a.requests for a in amounts), sum(a.nbytes for a in amounts))
