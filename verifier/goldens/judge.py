# SPDX-License-Identifier: Apache-2.0
"""Whether a run agrees with an accepted record.

Of a gate: the loss over the base, run against record, document by document
(`verifier.gate.statistics.paired`). The difference of losses is taken and not that of candidates
alone, so that an environment that moves base and candidate alike does not show. Of a check: every
count, exactly.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

from verifier.errors import MissingExtra
from verifier.goldens import store
from verifier.goldens.store import Golden, Pending
from verifier.history.record import now

if TYPE_CHECKING:
    from verifier.gate.statistics import Interval

Outcome = Literal[
    "agrees",
    "within",
    "stale",
    "worse",
    "inconclusive",
    "unlike",
    "changed",
    "new",
    "nonfinite",
    "error",
]
EXIT_OF_OUTCOME: dict[str, int] = {
    "agrees": 0,
    "within": 0,
    "stale": 0,
    "worse": 1,
    "inconclusive": 3,
    "unlike": 1,
    "changed": 1,
    "new": 1,
    "nonfinite": 1,
    "error": 4,
}
NOISE_OF_DRIFT = 0.1
"""An improvement below this part of the drift margin is taken for noise, where the noise floor was
not measured."""
MAX_SHOWN = 8


@dataclass(frozen=True)
class GoldenComparison:
    """What a run came to against a record, in one sentence; ``interval`` is the paired drift of a
    gate.
    """

    outcome: Outcome
    sentence: str
    interval: Interval | None = None

    @property
    def exit_code(self) -> int:
        """0 agrees, is within the drift margin or better; 1 disagrees; 3 neither is shown; 4 the
        run broke.
        """
        return EXIT_OF_OUTCOME[self.outcome]


def judge(old: Golden | None, new: Golden) -> GoldenComparison:
    """Hold a run against an accepted record; None is no record yet."""
    if new.verdict == "error":
        return GoldenComparison("error", "the run ended in an error; there is nothing to compare")
    if new.nonfinite:
        return GoldenComparison(
            "nonfinite", f"logits that are not finite in {new.nonfinite} documents"
        )
    if old is None:
        return GoldenComparison(
            "new", "no record is accepted yet; `ckptgate goldens review`, then accept"
        )
    if old.kind != new.kind:
        return GoldenComparison("unlike", f"the record is of a {old.kind}, the run of a {new.kind}")
    unlike = sorted(k for k in {*old.key, *new.key} if old.key.get(k) != new.key.get(k))
    if unlike:
        told = ", ".join(
            f"{k} {_short(old.key.get(k))} -> {_short(new.key.get(k))}" for k in unlike[:MAX_SHOWN]
        )
        return GoldenComparison("unlike", f"the record was made under another protocol: {told}")
    return _drift(old, new) if old.kind == "gate" else _facts(old, new)


def hold(run: dict[str, Any], file: str | os.PathLike[str]) -> GoldenComparison:
    """Hold a run against the accepted record in a file; where it does not agree, write the pending
    record beside it.

    Raises:
        UsageError: the path names no golden.
        ContentError: the record is none, or a field of the run is not what it must be.
    """
    folder, name = store.split_path(file)
    before = store.digest_of(folder, name)
    new = store.proposed(run)
    judged = judge(store.load(folder, name) if before is not None else None, new)
    if judged.outcome in ("agrees", "within", "error"):
        return judged
    pending = Pending(
        proposed=new,
        against=before,
        outcome=judged.outcome,
        sentence=judged.sentence[:2000],
        time=now(),
    )
    store.write_pending(folder, name, pending)
    return GoldenComparison(
        judged.outcome, f"{judged.sentence}; pending in {name}{store.PENDING}", judged.interval
    )


def _drift(old: Golden, new: Golden) -> GoldenComparison:
    if [t for _, _, t in old.documents] != [t for _, _, t in new.documents] or not old.documents:
        return GoldenComparison(
            "unlike",
            "the documents have other numbers of tokens than the record's, under the same protocol key",
        )
    if old.documents == new.documents:
        count = f"{len(new.documents):,}"
        return GoldenComparison(
            "agrees", f"the sums of all {count} documents equal the record's to the last bit"
        )
    if find_spec("scipy") is None:
        raise MissingExtra("comparing losses", "gate")
    from verifier.gate.statistics import accuracy_loss, paired  # noqa: PLC0415  (of use to a gate only)

    ours, theirs = ([q - b for b, q, _ in g.documents] for g in (new, old))
    found, unit = paired(theirs, ours, [t for _, _, t in old.documents]), "nats a token"
    if old.key.get("protocol") == "task":  # right and wrong answers
        moved = [a - b for a, b in zip(ours, theirs, strict=True)]
        found, unit = (
            accuracy_loss(sum(x > 0 for x in moved), sum(x < 0 for x in moved), len(moved)),
            "of accuracy",
        )
    told = f"drift {found.delta:+.6f} {unit} [{found.low:+.6f}, {found.high:+.6f}], margin {old.drift:g}"
    noise = max(NOISE_OF_DRIFT * old.drift, old.floor or 0.0, new.floor or 0.0)
    if found.high < -noise:
        return GoldenComparison(
            "stale",
            f"{told}: better than noise ({noise:g}); the golden is stale, review and accept",
            found,
        )
    if found.high <= old.drift:
        return GoldenComparison("within", f"{told}: within the margin", found)
    if found.low > old.drift:
        return GoldenComparison("worse", f"{told}: a proved regression", found)
    return GoldenComparison(
        "inconclusive", f"{told}: the interval holds the margin, neither is shown", found
    )


def _facts(old: Golden, new: Golden) -> GoldenComparison:
    other = sorted(k for k in {*old.facts, *new.facts} if old.facts.get(k) != new.facts.get(k))
    if not other and old.verdict == new.verdict:
        return GoldenComparison("agrees", f"all {len(new.facts):,} counts equal the record's")
    told = [
        f"{k} {_short(old.facts.get(k))} -> {_short(new.facts.get(k))}" for k in other[:MAX_SHOWN]
    ]
    if len(other) > MAX_SHOWN:
        told.append(f"and {len(other) - MAX_SHOWN} more")
    if old.verdict != new.verdict:
        told.insert(0, f"verdict {old.verdict} -> {new.verdict}")
    fewer = all(
        k.startswith("findings.") and _count(new.facts.get(k)) < _count(old.facts.get(k))
        for k in other
    )
    if fewer and (new.verdict in (old.verdict, "passed")):
        return GoldenComparison(
            "stale", f"fewer findings ({', '.join(told)}); the golden is stale, review and accept"
        )
    return GoldenComparison("changed", ", ".join(told))


def _count(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def _short(value: object) -> str:
    return "none" if value is None else str(value)[:40]
