# SPDX-License-Identifier: Apache-2.0
"""Golden records on disk: ``NAME.golden.json`` is accepted, ``NAME.pending.json`` next to it waits
for review.

A record of a gate keeps the sums of every document, so that drift against it is a paired test; one
of a check keeps counts and the digest of the headers. Neither keeps bytes of weights.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from verifier.errors import ContentError, MachineError, UsageError
from verifier.evaluation import GateResult
from verifier.files import write_atomic
from verifier.findings import Report, Verdict, current_verdict
from verifier.history.record import (
    Number,
    Record,
    Scalar,
    SchemaVersion,
    Text,
    commit_here,
    now,
    recorded,
)
from verifier.history.results import Result
from verifier.text import counted

ACCEPTED, PENDING = ".golden.json", ".pending.json"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
MAX_BYTES = 64 << 20
MAX_EARLIER = 200
DRIFT_NATS = 0.003
MAX_KL_RATIO = 1.15
PathLike = str | os.PathLike[str]
_Model = TypeVar("_Model", bound=BaseModel)
_CONFIG = ConfigDict(extra="forbid", frozen=True, strict=True)


class Acceptance(BaseModel):
    """When and why a record was accepted, and its loss."""

    model_config = _CONFIG
    time: Text
    reason: Annotated[str, Field(min_length=1, max_length=4000)]
    commit: Text = ""
    loss: Number | None = None


class Golden(BaseModel):
    """The result of a run, as later runs are compared with it.

    ``documents``: the base's nats, the candidate's nats and the tokens of each. ``kl``: the sum of
    KL(base || candidate) of each, nats, computed as ``kl_kind`` says; ``kl_ratio`` is the largest
    tolerated ratio of a later run's to it. ``margin`` is that of the loss over the base, ``drift``
    that of later runs, nats per token, which decides where there is no KL; ``facts`` are counts and
    digests.
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
    kl: list[Number] = Field(default=[], max_length=2_000_000)
    kl_kind: Text = ""
    nonfinite: int = 0
    loss: Number | None = None
    low: Number | None = None
    high: Number | None = None
    margin: Number | None = None
    floor: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    drift: Annotated[float, Field(gt=0, allow_inf_nan=False)] = DRIFT_NATS
    kl_ratio: Annotated[float, Field(gt=1, allow_inf_nan=False)] = MAX_KL_RATIO
    facts: dict[Text, Scalar] = Field(default={}, max_length=2000)
    accepted: Acceptance | None = None
    earlier: list[Acceptance] = Field(default=[], max_length=MAX_EARLIER)


class Pending(BaseModel):
    """A record that waits for review, what it was compared with (the SHA-256 of that file), and the
    outcome.
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
            f"{path}: name a golden NAME{ACCEPTED}, where NAME has only letters, digits, dots, "
            "dashes and underscores"
        )
    return path.parent, name


def golden_of(result: Result) -> Golden:
    """Return the golden that a result would be accepted as.

    Raises:
        ContentError: a value cannot be recorded.
    """
    record = recorded(result)
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
    of_kind = (
        _gate_fields(result, record)
        if isinstance(result, GateResult)
        else {"facts": _check_facts(result, record)}
    )
    try:
        return Golden.model_validate(fields | of_kind)
    except ValidationError as error:
        raise ContentError(f"the run makes no golden: {_first(error)}") from error


def _gate_fields(result: GateResult, record: Record) -> dict[str, Any]:
    floor = record.measures.get("floor")
    fields: dict[str, Any] = {"floor": floor.value} if floor is not None else {}
    if result.nonfinite:
        return fields | {"nonfinite": len(result.nonfinite)}
    loss = record.measures.get("loss")
    if loss is not None:
        fields |= {"loss": loss.value, "low": loss.low, "high": loss.high}
    kl = result.measures.kl
    if kl is not None and result.kl_documents:
        fields |= {"kl": result.kl_documents, "kl_kind": kl.kind}
    return fields | {"documents": result.documents, "margin": result.margin.nats}


def _check_facts(report: Report, record: Record) -> dict[str, Scalar]:
    facts: dict[str, Scalar] = {
        name: int(record.measures[name].value)
        for name in ("tensors", "bytes", "scale_bytes")
        if name in record.measures
    }
    if (contents := report.summary.contents) is not None:
        for table, counts in (
            ("formats", contents.formats),
            ("unquantized", contents.unquantized),
        ):
            facts |= {f"{table}.{name}": count for name, count in sorted(counts.items())}
    findings: Counter[str] = Counter()
    for finding in report.findings:
        if finding.severity in ("error", "warning") and finding.standing != "known":
            findings[f"findings.{finding.rule}"] += finding.count
    facts |= findings
    facts |= {f"examined.{c.rule}": c.checked for c in report.coverage if c.ran}
    if "header_sha256" in record.checkpoint:
        facts["header_sha256"] = record.checkpoint["header_sha256"]
    return facts


def names(folder: PathLike, suffix: str) -> list[str]:
    """Return the names of the records in a directory, sorted.

    Raises:
        UsageError: no such directory.
    """
    path = os.fspath(folder)
    try:
        files = os.listdir(folder)
    except FileNotFoundError as error:
        raise UsageError(f"no goldens directory {path!r}; use --dir") from error
    except OSError as error:
        raise UsageError(f"goldens directory {path}: {error.strerror or error}") from error
    stems = [file.removesuffix(suffix) for file in files if file.endswith(suffix)]
    return sorted(stem for stem in stems if NAME.fullmatch(stem))


def matching(folder: PathLike, suffix: str, patterns: Sequence[str]) -> list[str]:
    """Return the names that any pattern matches, all without patterns.

    Raises:
        ContentError: a pattern matches nothing.
    """
    kind = "pending record" if suffix == PENDING else "golden"
    return select(names(folder, suffix), patterns, f"{kind} in {os.fspath(folder)}")


def select(names: Sequence[str], patterns: Sequence[str], kind: str) -> list[str]:
    """Return the names that any pattern matches, all without patterns.

    Raises:
        ContentError: a pattern matches nothing; ``kind`` says what was looked for.
    """
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ContentError(f"{pattern!r} matches no {kind} ({len(names)} exist)")
    if not patterns:
        return list(names)
    return [name for name in names if any(fnmatchcase(name, p) for p in patterns)]


def load(folder: PathLike, name: str) -> Golden:
    """Read an accepted record.

    Raises:
        UsageError: it does not exist.
        ContentError: it is not a golden.
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
    """Write a pending record, replacing an earlier one."""
    write_atomic(_own(Path(folder) / f"{name}{PENDING}"), pending.model_dump_json(indent=1) + "\n")


def accept(folder: PathLike, name: str, reason: str) -> Golden:
    """Make the pending record the accepted one and return it.

    Raises:
        UsageError: ``CI`` is set, the reason is empty, nothing is pending.
        ContentError: the accepted record is no longer the one that the pending one was compared
            with, or the run had logits that were not finite.
    """
    refuse_in_ci("accepting goldens")
    if not reason.strip():
        raise UsageError("--reason is empty; give a reason for accepting the record")
    pending = load_pending(folder, name)
    if pending.against != digest_of(folder, name):
        raise ContentError(f"{name}: the accepted record has changed since; run again, then review")
    new = pending.proposed
    if new.nonfinite:
        documents = counted(new.nonfinite, "document")
        raise ContentError(f"{name}: logits were not finite in {documents}; cannot be accepted")
    if new.verdict == "error":
        raise ContentError(f"{name}: the run ended in an error; cannot be accepted")
    entry = Acceptance(
        time=now(), reason=reason.strip()[:4000], commit=commit_here(), loss=new.loss
    )
    update: dict[str, Any] = {"accepted": entry}
    if pending.against is not None:
        old = load(folder, name)
        earlier = [*old.earlier, *([old.accepted] if old.accepted else [])]
        update |= {"earlier": earlier[-MAX_EARLIER:], "drift": old.drift, "kl_ratio": old.kl_ratio}
    accepted = new.model_copy(update=update)
    text = accepted.model_dump_json(indent=1) + "\n"
    write_atomic(_own(Path(folder) / f"{name}{ACCEPTED}"), text)
    _remove(Path(folder) / f"{name}{PENDING}")
    return accepted


def reject(folder: PathLike, name: str) -> None:
    """Delete a pending record; the accepted one stays.

    Raises:
        UsageError: nothing is pending under that name.
    """
    path = Path(folder) / f"{name}{PENDING}"
    if not os.path.lexists(path):
        raise UsageError(f"{path}: does not exist; nothing is pending")
    _remove(path)


def drop(folder: PathLike, name: str) -> None:
    """Delete an accepted record.

    Raises:
        UsageError: ``CI`` is set.
    """
    refuse_in_ci("deleting goldens")
    _remove(Path(folder) / f"{name}{ACCEPTED}")


def refuse_in_ci(action: str) -> None:
    """Refuse what only a person may do, where ``CI`` is set.

    Raises:
        UsageError: it is set and not empty.
    """
    if os.environ.get("CI"):
        raise UsageError(f"{action} is refused where CI is set; do it on your own machine")


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
        raise ContentError(f"{name}: not a golden: {_first(error)}") from error


def _first(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    return f"{'.'.join(map(str, first['loc']))[:100]}: {first['msg'][:200]}"


def _own(path: Path) -> Path:
    if path.is_symlink():
        raise UsageError(f"{path}: a symbolic link; a golden must be a regular file")
    return path


def _remove(path: Path) -> None:
    try:
        path.unlink()
    except OSError as error:
        raise MachineError(f"{path}: {error.strerror or error}") from error
