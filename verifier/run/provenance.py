# SPDX-License-Identifier: Apache-2.0
"""Where checkpoints came from, and what reading them fetched."""

from __future__ import annotations

from collections.abc import Mapping

from verifier.checkpoint import Checkpoint


def provenance(checkpoints: Mapping[str, Checkpoint | None]) -> dict[str, object]:
    """Return the commits that were read, and what was fetched over the network; {} of local
    directories.
    """
    sources = {role: c.source for role, c in checkpoints.items() if c is not None}
    found: dict[str, object] = {}
    commits = {role: s.revision for role, s in sorted(sources.items()) if s.revision}
    if commits:
        found["commits"] = commits
    if any(s.remote for s in sources.values()):
        amounts = [s.traffic() for s in {id(s): s for s in sources.values()}.values()]
        requests, nbytes = (sum(column) for column in zip(*amounts, strict=True))
        found["traffic"] = {"requests": requests, "bytes": nbytes}
    return found
