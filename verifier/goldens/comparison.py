# SPDX-License-Identifier: Apache-2.0
"""Whether a run agrees with an accepted record.

Of a gate: the KL divergence from the base, run against record, document by document, where both
have it (`verifier.gate.statistics.log_ratio`): it sees damage that the loss does not. Else the loss
over the base (`verifier.gate.statistics.paired`): the difference of losses is used and not that of
candidates alone, so an environment that moves base and candidate alike does not show. Of a check:
every count, exactly.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Literal

from verifier.errors import MissingExtra
from verifier.evaluation import Interval
from verifier.goldens import store
from verifier.goldens.store import Golden, Pending, golden_of
from verifier.history.record import now
from verifier.history.results import Result
from verifier.text import counted

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
EXIT_OF_OUTCOME: dict[Outcome, int] = {
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
"""An improvement below this part of the drift margin counts as noise where the noise floor was not
measured."""
MAX_NAMED = 8
KL_LEVEL = 0.99
"""The level of each bound of a ratio of KL divergences, which are skewed."""
BETTER_KL = 0.95
"""A ratio that is shown to be below this is an improvement."""
WORSE_BASE = 1.05
"""The perplexity that a base may have, relative to its record's."""


@dataclass(frozen=True)
class GoldenComparison:
    """The outcome of comparing a run with a record, in one sentence; ``interval`` is the paired
    drift of a gate's loss, ``kl`` the logarithm of the ratio of its KL divergence to the record's.
    """

    outcome: Outcome
    sentence: str
    interval: Interval | None = None
    kl: Interval | None = None

    @property
    def exit_code(self) -> int:
        """0 agrees, within the drift margin or better; 1 disagrees; 3 inconclusive; 4 the run ended
        in an error.
        """
        return EXIT_OF_OUTCOME[self.outcome]


def compare(old: Golden | None, new: Golden) -> GoldenComparison:
    """Compare a run with an accepted record; None where there is no record yet."""
    if new.verdict == "error":
        return GoldenComparison("error", "the run ended in an error; there is nothing to compare")
    if new.nonfinite:
        documents = counted(new.nonfinite, "document")
        return GoldenComparison("nonfinite", f"logits are not finite in {documents}")
    if old is None:
        return GoldenComparison(
            "new", "no accepted record yet; run `ckptgate goldens review`, then accept"
        )
    if old.kind != new.kind:
        return GoldenComparison("unlike", f"the record is of a {old.kind}, the run of a {new.kind}")
    if differences := _differences(old.key, new.key):
        return GoldenComparison(
            "unlike", f"the record used a different protocol: {', '.join(differences)}"
        )
    return _compare_gates(old, new) if old.kind == "gate" else _compare_checks(old, new)


def compare_with_golden(result: Result, file: str | os.PathLike[str]) -> GoldenComparison:
    """Compare a result with the accepted record in a file; where it does not agree, write a pending
    record next to it.

    Raises:
        UsageError: the path is not that of a golden.
        ContentError: the record cannot be read, or the result makes no golden.
    """
    folder, name = store.split_path(file)
    against = store.digest_of(folder, name)
    new = golden_of(result)
    comparison = compare(store.load(folder, name) if against is not None else None, new)
    if comparison.outcome in ("agrees", "within", "error"):
        return comparison
    pending = Pending(
        proposed=new,
        against=against,
        outcome=comparison.outcome,
        sentence=comparison.sentence[:2000],
        time=now(),
    )
    store.write_pending(folder, name, pending)
    sentence = f"{comparison.sentence}; pending in {name}{store.PENDING}"
    return replace(comparison, sentence=sentence)


def _compare_gates(old: Golden, new: Golden) -> GoldenComparison:
    tokens = [count for _, _, count in old.documents]
    if tokens != [count for _, _, count in new.documents] or not tokens:
        return GoldenComparison(
            "unlike", "the documents have other numbers of tokens, under the same protocol key"
        )
    if old.documents == new.documents:
        documents = counted(len(tokens), "document")
        return GoldenComparison("agrees", f"identical to the golden: the sums of {documents}")
    worse = sum(base for base, _, _ in new.documents) - sum(base for base, _, _ in old.documents)
    if old.key.get("protocol") == "tokens" and worse > math.log(WORSE_BASE) * sum(tokens):
        return GoldenComparison(
            "unlike",
            f"the base is worse than in the record, by {worse / sum(tokens):.4f} nats per token; "
            "is it the same base?",
        )
    drift, unit = _drift(old, new)
    if (ratio := _kl_ratio(old, new)) is not None:
        return replace(_compare_kl(old, ratio), interval=drift)
    sentence = (
        f"drift {drift.delta:+.6f} {unit} [{drift.low:+.6f}, {drift.high:+.6f}], margin "
        f"{old.drift:g}"
    )
    noise = max(NOISE_OF_DRIFT * old.drift, old.floor or 0.0, new.floor or 0.0)
    if drift.high < -noise:
        why = f"better by more than noise ({noise:g}); the golden is stale, review and accept"
        return GoldenComparison("stale", f"{sentence}: {why}", drift)
    if drift.high <= old.drift:
        return GoldenComparison("within", f"{sentence}: within the margin", drift)
    if drift.low > old.drift:
        return GoldenComparison("worse", f"{sentence}: a significant regression", drift)
    return GoldenComparison("inconclusive", f"{sentence}: the interval straddles the margin", drift)


def _kl_ratio(old: Golden, new: Golden) -> Interval | None:
    """Return the logarithm of the ratio of a run's KL divergence from the base to a record's; None
    where one has none, or they were not computed alike.
    """
    if not old.kl or len(old.kl) != len(new.kl) or old.kl_kind != new.kl_kind:
        return None
    from verifier.gate.statistics import log_ratio  # noqa: PLC0415  (an extra)

    tokens = [count for _, _, count in old.documents]
    return log_ratio(new.kl, old.kl, tokens, KL_LEVEL)


def _compare_kl(old: Golden, ratio: Interval) -> GoldenComparison:
    low, high = math.exp(ratio.low), math.exp(ratio.high)
    sentence = (
        f"KL divergence from the base {ratio.ratio:.3f} times the golden's "
        f"[{low:.3f}, {high:.3f}], margin {old.kl_ratio:g}"
    )
    if high < BETTER_KL:
        why = f"better by more than noise ({BETTER_KL:g}); the golden is stale, review and accept"
        return GoldenComparison("stale", f"{sentence}: {why}", kl=ratio)
    if high <= old.kl_ratio:
        return GoldenComparison("within", f"{sentence}: within the margin", kl=ratio)
    if low > old.kl_ratio:
        return GoldenComparison("worse", f"{sentence}: a significant regression", kl=ratio)
    return GoldenComparison(
        "inconclusive", f"{sentence}: the interval straddles the margin", kl=ratio
    )


def _drift(old: Golden, new: Golden) -> tuple[Interval, str]:
    """Return the paired drift of a run over a record, and its unit."""
    if find_spec("scipy") is None:
        raise MissingExtra("comparing losses", "gate")
    from verifier.gate.statistics import accuracy_loss, paired  # noqa: PLC0415  (an extra)

    new_losses, old_losses = _losses(new), _losses(old)
    if old.key.get("protocol") != "task":
        tokens = [count for _, _, count in old.documents]
        return paired(old_losses, new_losses, tokens), "nats per token"
    moved = [a - b for a, b in zip(new_losses, old_losses, strict=True)]
    lost, won = sum(x > 0 for x in moved), sum(x < 0 for x in moved)
    return accuracy_loss(lost, won, len(moved)), "of accuracy"


def _losses(golden: Golden) -> list[float]:
    return [candidate - base for base, candidate, _ in golden.documents]


def _compare_checks(old: Golden, new: Golden) -> GoldenComparison:
    changed = sorted(k for k in {*old.facts, *new.facts} if old.facts.get(k) != new.facts.get(k))
    if not changed and old.verdict == new.verdict:
        return GoldenComparison("agrees", f"identical to the golden: all {len(new.facts):,} counts")
    differences = _differences(old.facts, new.facts)
    if old.verdict != new.verdict:
        differences.insert(0, f"verdict {old.verdict} → {new.verdict}")
    text = ", ".join(differences)
    if _only_fewer_findings(changed, old, new) and new.verdict in (old.verdict, "passed"):
        return GoldenComparison(
            "stale", f"fewer findings ({text}); the golden is stale, review and accept"
        )
    return GoldenComparison("changed", text)


def _only_fewer_findings(changed: Sequence[str], old: Golden, new: Golden) -> bool:
    return all(
        name.startswith("findings.") and _count(new.facts.get(name)) < _count(old.facts.get(name))
        for name in changed
    )


def _count(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def _differences(old: Mapping[str, object], new: Mapping[str, object]) -> list[str]:
    names = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
    texts = [f"{n} {_short(old.get(n))} → {_short(new.get(n))}" for n in names[:MAX_NAMED]]
    more = len(names) - MAX_NAMED
    return [*texts, f"and {more} more"] if more > 0 else texts


def _short(value: object) -> str:
    return "none" if value is None else str(value)[:40]
