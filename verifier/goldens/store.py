# SPDX-License-Identifier: Apache-2.0
"""Golden records on disk: ``NAME.golden.json`` is accepted, ``NAME.pending.json`` beside it waits
for a person.

A record of a gate keeps the sums of every document, so that drift against it is a paired test; one
of a check keeps counts and the digest of the headers. Neither keeps bytes of weights.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from verifier.errors import ContentError, MachineError, UsageError
from verifier.files import write_atomic
from verifier.findings import Verdict, current_verdict
from verifier.history.record import Number, Record, Scalar, SchemaVersion, Text, now, recorded

ACCEPTED, PENDING = ".golden.json", ".pending.json"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
MAX_BYTES = 64 << 20
MAX_EARLIER = 200
DRIFT_NATS = 0.003
PathLike = str | os.PathLike[str]
_Model = TypeVar("_Model", bound=BaseModel)
_CONFIG = ConfigDict(extra="forbid", frozen=True, strict=True)


class Acceptance(BaseModel):
    """When and why a record was accepted, and the loss that it then had."""

    model_config = _CONFIG
    time: Text
    reason: Annotated[str, Field(min_length=1, max_length=4000)]
    commit: Text = ""
    loss: Number | None = None


class Golden(BaseModel):
    """What a run came to. ``documents``: base nats, candidate nats, tokens of each; ``drift``: its
    margin, nats a token.
    """

    model_config = _CONFIG
    schema_version: SchemaVersion = "1.1"
    kind: Literal["gate", "check"]
    of: Annotated[str, Field(min_length=1, max_length=400)]
    verdict: Annotated[Verdict, BeforeValidator(current_verdict)]
    key: dict[Text, Scalar] = Field(default={}, max_length=100)
    environment: dict[Text, Scalar] = Field(default={}, max_length=100)
    versions: dict[Text, Text] = Field(default={}, max_length=20)
    checkpoint: dict[Text, Scalar] = Field(default={}, max_length=20)
    recipe: dict[Text, Scalar] = Field(default={}, max_length=100)
    documents: list[
        Annotated[tuple[Number, Number, Annotated[int, Field(ge=0)]], Field(strict=False)]
    ] = Field(default=[], max_length=2_000_000)
    nonfinite: int = 0
    loss: Number | None = None
    low: Number | None = None
    high: Number | None = None
    floor: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    drift: Annotated[float, Field(gt=0, allow_inf_nan=False)] = DRIFT_NATS
    facts: dict[Text, Scalar] = Field(default={}, max_length=2000)
    accepted: Acceptance | None = None
    earlier: list[Acceptance] = Field(default=[], max_length=MAX_EARLIER)


class Pending(BaseModel):
    """A record that waits, what it was held against (the SHA-256 of that file), and what that came
    to.
    """

    model_config = _CONFIG
    proposed: Golden
    against: str | None = None
    outcome: Text
    sentence: Text
    time: Text


def split_path(file: PathLike) -> tuple[Path, str]:
    """Return folder and name of an accepted record's path.

    Raises:
        UsageError: it does not end in ``.golden.json``, or the name holds other characters than
            letters, digits, ``._-``.
    """
    path = Path(file)
    name = path.name.removesuffix(ACCEPTED)
    if name == path.name or not NAME.fullmatch(name):
        raise UsageError(
            f"{path}: a golden is called NAME{ACCEPTED}, NAME of letters, digits, dots, dashes, underscores"
        )
    return path.parent, name


def proposed(run: dict[str, Any]) -> Golden:
    """Return what a gate or a check would leave as its golden.

    Raises:
        ContentError: a field of the run is not what it must be.
    """
    record = recorded(run)
    fields: dict[str, Any] = {
        "kind": record.kind,
        "of": record.name,
        "verdict": record.verdict,
        "key": record.key,
        "environment": record.environment,
        "versions": record.versions,
        "checkpoint": record.checkpoint,
        "recipe": record.recipe,
    }
    if record.kind == "gate":
        nonfinite = run.get("nonfinite") or []
        loss = record.measures.get("loss")
        fields |= {
            "documents": [] if nonfinite else run.get("documents") or [],
            "nonfinite": len(nonfinite),
        }
        if loss is not None and not nonfinite:
            fields |= {"loss": loss.value, "low": loss.low, "high": loss.high}
        if "floor" in record.measures:
            fields["floor"] = record.measures["floor"].value
    else:
        fields["facts"] = _facts(run, record)
    try:
        return Golden.model_validate(fields)
    except ValidationError as error:
        raise ContentError(f"the run makes no golden: {_first(error)}") from error


def _facts(run: dict[str, Any], record: Record) -> dict[str, Any]:
    sizes = ("tensors", "bytes", "scale_bytes")
    found: dict[str, Any] = {n: int(m.value) for n, m in record.measures.items() if n in sizes}
    told = run.get("stats")
    stats: dict[str, Any] = told if isinstance(told, dict) else {}
    for what in ("formats", "unquantized"):
        values = stats.get(what)
        found |= (
            {f"{what}.{k}": v for k, v in sorted(values.items())}
            if isinstance(values, dict)
            else {}
        )
    for finding in run["findings"]:
        if not isinstance(finding, dict) or finding.get("standing") == "known":
            continue
        if finding.get("severity") in ("error", "warning"):
            name = f"findings.{finding.get('rule')}"
            found[name] = found.get(name, 0) + (
                finding["count"] if isinstance(finding.get("count"), int) else 1
            )
    for rule in run["coverage"]:
        if isinstance(rule, dict) and rule.get("ran"):
            found[f"examined.{rule.get('rule')}"] = rule.get("checked")
    if "header_sha256" in record.checkpoint:
        found["header_sha256"] = record.checkpoint["header_sha256"]
    return found


def names(folder: PathLike, suffix: str) -> list[str]:
    """Return the names of the records in a folder, sorted.

    Raises:
        UsageError: no such folder.
    """
    try:
        found = os.listdir(folder)
    except OSError as error:
        raise UsageError(f"goldens {os.fspath(folder)}: {error.strerror or error}") from error
    stems = (n.removesuffix(suffix) for n in found if n.endswith(suffix))
    return sorted(n for n in stems if NAME.fullmatch(n))


def matching(folder: PathLike, suffix: str, patterns: Sequence[str]) -> list[str]:
    """Return the names that any pattern matches, all without patterns.

    Raises:
        ContentError: a pattern matches nothing.
    """
    have = names(folder, suffix)
    for p in patterns:
        if not any(fnmatchcase(n, p) for n in have):
            what = "pending record" if suffix == PENDING else "golden"
            raise ContentError(
                f"{p!r} matches no {what} in {os.fspath(folder)} ({len(have)} are there)"
            )
    return [n for n in have if not patterns or any(fnmatchcase(n, p) for p in patterns)]


def load(folder: PathLike, name: str) -> Golden:
    """Read an accepted record.

    Raises:
        UsageError: there is none.
        ContentError: it is none.
    """
    raw = _read(Path(folder) / f"{name}{ACCEPTED}")
    return _parse(Golden, raw, f"{name}{ACCEPTED}")


def load_pending(folder: PathLike, name: str) -> Pending:
    """Read a pending record; see `load`."""
    raw = _read(Path(folder) / f"{name}{PENDING}")
    return _parse(Pending, raw, f"{name}{PENDING}")


def digest_of(folder: PathLike, name: str) -> str | None:
    """Return the SHA-256 of an accepted record's file, or None where there is none."""
    path = Path(folder) / f"{name}{ACCEPTED}"
    return hashlib.sha256(_read(path)).hexdigest() if path.exists() else None


def write_pending(folder: PathLike, name: str, pending: Pending) -> None:
    """Write a pending record; one that was there is replaced."""
    write_atomic(_own(Path(folder) / f"{name}{PENDING}"), pending.model_dump_json(indent=1) + "\n")


def accept(folder: PathLike, name: str, reason: str) -> Golden:
    """Make the pending record the accepted one and return it.

    Raises:
        UsageError: ``CI`` is set, the reason is empty, nothing is pending.
        ContentError: the accepted record is no longer the one that the pending one was held
            against, or the run had logits that were not finite.
    """
    refuse_in_ci("accepts goldens")
    if not reason.strip():
        raise UsageError("--reason is empty; say why the record is accepted")
    pending = load_pending(folder, name)
    if pending.against != digest_of(folder, name):
        raise ContentError(
            f"{name}: the accepted record changed since; run again, then review what is pending"
        )
    new = pending.proposed
    if new.nonfinite or new.verdict == "error":
        why = (
            f"{new.nonfinite} documents had logits that are not finite"
            if new.nonfinite
            else "the run broke"
        )
        raise ContentError(f"{name}: {why}; such a run is never accepted")
    from verifier.history.record import commit_here  # noqa: PLC0415

    earlier: list[Acceptance] = []
    drift = new.drift
    if pending.against is not None:
        old = load(folder, name)
        earlier, drift = (
            [*old.earlier, *([old.accepted] if old.accepted else [])][-MAX_EARLIER:],
            old.drift,
        )
    entry = Acceptance(
        time=now(), reason=reason.strip()[:4000], commit=commit_here(), loss=new.loss
    )
    found = new.model_copy(update={"accepted": entry, "earlier": earlier, "drift": drift})
    write_atomic(_own(Path(folder) / f"{name}{ACCEPTED}"), found.model_dump_json(indent=1) + "\n")
    _remove(Path(folder) / f"{name}{PENDING}")
    return found


def reject(folder: PathLike, name: str) -> None:
    """Drop a pending record; the accepted one stays.

    Raises:
        UsageError: nothing is pending under that name.
    """
    path = Path(folder) / f"{name}{PENDING}"
    if not os.path.lexists(path):
        raise UsageError(f"{path}: nothing is pending")
    _remove(path)


def drop(folder: PathLike, name: str) -> None:
    """Delete an accepted record.

    Raises:
        UsageError: ``CI`` is set.
    """
    refuse_in_ci("drops goldens")
    _remove(Path(folder) / f"{name}{ACCEPTED}")


def refuse_in_ci(what: str) -> None:
    """Refuse what a person must do, where ``CI`` is set.

    Raises:
        UsageError: it is set and not empty.
    """
    if os.environ.get("CI"):
        raise UsageError(f"CI is set; a person {what}, on a machine of their own")


def _read(path: Path) -> bytes:
    try:
        with open(path, "rb") as handle:
            raw = handle.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    if len(raw) > MAX_BYTES:
        raise ContentError(f"{path}: larger than {MAX_BYTES:,} bytes")
    return raw


def _parse(model: type[_Model], raw: bytes, name: str) -> _Model:
    try:
        return model.model_validate_json(raw)
    except ValidationError as error:
        raise ContentError(f"{name}: no such record: {_first(error)}") from error


def _first(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    return f"{'.'.join(map(str, first['loc']))[:100]}: {first['msg'][:200]}"


def _own(path: Path) -> Path:
    if path.is_symlink():
        raise UsageError(f"{path}: a link; a golden is a file of its own")
    return path


def _remove(path: Path) -> None:
    try:
        path.unlink()
    except OSError as error:
        raise MachineError(f"{path}: {error.strerror or error}") from error
