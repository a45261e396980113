# SPDX-License-Identifier: Apache-2.0
"""One run as one line: measures with intervals, keys, digests, versions, wall time."""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from verifier import __version__
from verifier.checkpoint import open_checkpoint
from verifier.errors import CkptgateError, ContentError
from verifier.evaluation import GateResult, Interval, Margin
from verifier.findings import Report, Verdict, current_verdict
from verifier.history.results import Result
from verifier.manifest import MANIFEST
from verifier.summary import ReportedOptions

if TYPE_CHECKING:
    from verifier.gate.suite import SuiteResult

MAX_MANIFEST = 16 << 20
Text = Annotated[str, Field(max_length=2000)]
Number = Annotated[float, Field(allow_inf_nan=False)]
SchemaVersion = Annotated[
    Literal["1.1"], BeforeValidator(lambda version: "1.1" if version == "1.0" else version)
]
"""Version 1.0 differs only in the names of verdicts, and is read as 1.1."""
Scalar = Text | bool | int | Number | None
_CONFIG = ConfigDict(extra="ignore", frozen=True, strict=True)


class Measure(BaseModel):
    """A value, and where it has them its interval, its standard error and its margin."""

    model_config = _CONFIG
    value: Number
    low: Number | None = None
    high: Number | None = None
    se: Number | None = None
    margin: Number | None = None


class Record(BaseModel):
    """One line of a history file; fields of later versions are ignored."""

    model_config = _CONFIG
    schema_version: SchemaVersion = "1.1"
    id: Annotated[str, Field(pattern="^[0-9a-f]{16}$")]
    time: Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,6})?Z$")]
    kind: Literal["gate", "check", "golden", "suite"]
    name: Annotated[str, Field(min_length=1, max_length=400)]
    label: Text = ""
    verdict: Annotated[Verdict | Literal["accepted"], BeforeValidator(current_verdict)]
    measures: dict[Annotated[str, Field(pattern=r"^[a-z][a-z0-9_.]{0,63}$")], Measure] = Field(
        default={}, max_length=200
    )
    key: dict[Text, Scalar] = Field(default={}, max_length=100)
    environment: dict[Text, Scalar] = Field(default={}, max_length=100)
    checkpoint: dict[Text, Scalar] = Field(default={}, max_length=20)
    base: dict[Text, Scalar] = Field(default={}, max_length=20)
    recipe: dict[Text, Scalar] = Field(default={}, max_length=100)
    versions: dict[Text, Text] = Field(default={}, max_length=20)
    seconds: Number | None = None
    commit: Text = ""
    documents_sha256: Text = ""

    @property
    def series(self) -> str:
        """What runs must share to be one time series: kind, name and protocol key."""
        raw = json.dumps([self.kind, self.name, self.key], sort_keys=True)
        return hashlib.sha256(raw.encode()).hexdigest()[:12]


def recorded(
    result: Result, *, name: str = "", label: str = "", seconds: float | None = None
) -> Record:
    """Return the record of a gate or a check.

    Args:
        result: of the gate or the check.
        name: what the time series is called; by default the last part of the checkpoint's path.
        label: a note that stays with the run.
        seconds: wall time, where the result does not state it.

    Raises:
        ContentError: a value cannot be recorded.
    """
    uri = result.candidate if isinstance(result, GateResult) else result.uri
    of_kind = _of_gate(result) if isinstance(result, GateResult) else _of_check(result)
    return build({"seconds": seconds, **_of_checkpoints(uri, result.base, name, label), **of_kind})


def recorded_suite(result: SuiteResult, *, label: str = "") -> Record:
    """Return the record of a suite, with a measure for the recovery of each entry and for
    everything that decides it: ``ENTRY.recovery``, ``ENTRY.loss``, ``ENTRY.kl``, ``ENTRY.length``.

    Args:
        result: of the suite.
        label: a note that stays with the run.

    Raises:
        ContentError: a value cannot be recorded.
    """
    measures = {}
    for entry in result.entries:
        if (recovery := entry.recovery) is not None:
            measures[f"{entry.name}.recovery"] = {
                "value": recovery.value,
                "low": _finite(recovery.low),
                "high": _finite(recovery.high),
            }
        for criterion in entry.criteria:
            name = f"{entry.name}.{criterion.measure.lower()}"
            measures[name] = _measure(criterion.interval, criterion.margin)
    return build(
        {
            "kind": "suite",
            "verdict": result.outcome,
            "seconds": result.seconds,
            **_of_checkpoints(result.candidate.uri, result.base.uri, "", label),
            "measures": measures,
            "key": {"suite": result.name, "suite_sha256": result.sha256},
            "versions": result.versions,
        }
    )


def _of_checkpoints(uri: str, base: str | None, name: str, label: str) -> dict[str, Any]:
    """Return the fields of a record that every kind has."""
    return {
        "label": label,
        "time": now(),
        "commit": commit_here(),
        "name": name or uri.rstrip("/").rpartition("/")[2] or uri,
        "versions": {"ckptgate": __version__},
        "checkpoint": identity(uri),
        "base": identity(base) if base else {},
        "recipe": recipe_of(uri),
    }


def _of_gate(result: GateResult) -> dict[str, Any]:
    documents = json.dumps(result.documents, separators=(",", ":"))
    return {
        "kind": "gate",
        "verdict": result.outcome,
        "measures": _gate_measures(result),
        "key": scalars(result.key),
        "environment": scalars(result.environment),
        "documents_sha256": hashlib.sha256(documents.encode()).hexdigest(),
    }


def _of_check(report: Report) -> dict[str, Any]:
    summary = report.summary
    options = summary.options or ReportedOptions()
    evaluation = summary.evaluation if isinstance(summary.evaluation, GateResult) else None
    key: dict[str, Any] = {
        "depth": options.depth,
        "fail_on": options.fail_on,
        "profile": options.profile,
        "tp": options.tp,
        "ep": options.ep,
        "select": list(options.select),
        "ignore": list(options.ignore),
        "base": options.base is not None,
        "merged_from": options.merged_from is not None,
    }
    measures = _check_measures(report)
    if evaluation is not None:
        key["eval"] = evaluation.key
        measures |= _gate_measures(evaluation)
    fields = {
        "kind": "check",
        "verdict": report.verdict,
        "measures": measures,
        "key": scalars(key),
    }
    return fields | ({"seconds": summary.seconds} if summary.seconds is not None else {})


def build(fields: dict[str, Any]) -> Record:
    """Return a record of these fields, with a new id.

    Raises:
        ContentError: a field has a wrong type or value.
    """
    raw = json.dumps(fields, sort_keys=True, default=str) + os.urandom(8).hex()
    try:
        return Record.model_validate(
            {"id": hashlib.sha256(raw.encode("utf-8", "replace")).hexdigest()[:16], **fields}
        )
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise ContentError(f"the run cannot be recorded: {field}: {first['msg']}") from error


def now() -> str:
    """Return the time in UTC, ISO 8601 with microseconds and Z."""
    return datetime.datetime.now(tz=datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def commit_here() -> str:
    """Return the commit that CI names, or that is checked out in the working directory (with
    ``-dirty`` for local changes); '' where there is none.
    """
    for name in ("GITHUB_SHA", "CI_COMMIT_SHA"):
        if re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", os.environ.get(name, "")):
            return os.environ[name]
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"],  # noqa: S607  (the user's own git)
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.SubprocessError, UnicodeError):
        return ""
    commit = done.stdout.strip()
    return commit if re.fullmatch(r"[0-9a-f]{40,64}(-dirty)?", commit) else ""


def identity(uri: str) -> dict[str, Scalar]:
    """Return the address of a checkpoint, its commit on the hub, the digest of its headers, and
    that of its files where its manifest or the hub knows it.

    Of a checkpoint that does not exist only the address is known.
    """
    fields: dict[str, Scalar] = {"uri": uri[-2000:]}
    try:
        ckpt = open_checkpoint(uri)
    except CkptgateError:
        return fields
    state = hashlib.sha256()
    for name in sorted(ckpt.tensors):
        tensor = ckpt.tensors[name]
        line = f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0"
        state.update(line.encode("utf-8", "replace"))
    fields |= {
        "header_sha256": state.hexdigest(),
        "tensors": len(ckpt.tensors),
        "bytes": ckpt.nbytes,
    }
    files = _manifest_of(uri).files
    known = {name: file.sha256 for name, file in files.items()} or ckpt.source.digests()
    digests = {name: known[name] for name in sorted(known) if name.endswith(".safetensors")}
    if ckpt.source.revision:
        fields["commit"] = ckpt.source.revision
    if digests:
        fields["files_sha256"] = _digest(digests)
    return fields


def recipe_of(uri: str) -> dict[str, Scalar]:
    """Return the options in an export's manifest, with one digest over them; {} without any."""
    options = _manifest_of(uri).options
    if not options:
        return {}
    used = {name: value for name, value in options.items() if value is not None}
    return {"sha256": _digest(options), **scalars(used)}


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


class _File(BaseModel):
    """A file of an export."""

    sha256: str | None = None


class _Manifest(BaseModel):
    """The part of an export's manifest that is recorded."""

    options: dict[str, Any] = {}
    files: dict[str, _File] = {}


def _manifest_of(uri: str) -> _Manifest:
    """Return the manifest of an export in a local directory; an empty one where it has none."""
    try:
        with open(Path(uri) / MANIFEST, "rb") as handle:
            return _Manifest.model_validate_json(handle.read(MAX_MANIFEST))
    except (OSError, ValueError):
        return _Manifest()


def _gate_measures(result: GateResult) -> dict[str, dict[str, float | None]]:
    measures: dict[str, dict[str, float | None]] = {}
    drift, kl = result.drift, result.measures.kl
    bound = "" if kl is None or kl.kind == "lockstep" else "_lower"  # of KL, not KL itself
    ratio = drift.kl if drift else None
    intervals = {
        "loss": (result.interval, result.margin),
        "drift": (drift.interval, drift.margin) if drift else (None, None),
        f"kl{bound}": (kl.mean if kl else None, kl.margin if kl else None),
        "log_kl_ratio": (ratio.interval, ratio.margin) if ratio else (None, None),
        "top1": (result.measures.top1, None),
    }
    for name, (interval, margin) in intervals.items():
        if interval is not None and math.isfinite(interval.delta):
            measures[name] = _measure(interval, margin)
    if kl is not None and all(map(math.isfinite, kl.tail)):
        value, low, high = kl.tail
        measures[f"kl_999{bound}"] = {"value": value, "low": low, "high": high}
    values = {
        "flips": _share(result.measures.flips, result.measures.sure),
        "perplexity_base": _finite(result.perplexity_base),
        "perplexity_candidate": _finite(result.perplexity_candidate),
        "floor": result.floor,
    }
    if (right := result.accuracy) is not None and result.interval is not None:
        values["accuracy_base"] = _share(right.base, result.interval.documents)
        values["accuracy_candidate"] = _share(right.candidate, result.interval.documents)
    values["nonfinite"] = float(len(result.nonfinite))
    return measures | {n: {"value": v} for n, v in values.items() if v is not None}


def _measure(interval: Interval, margin: Margin | None) -> dict[str, float | None]:
    return {
        "value": interval.delta,
        "low": _finite(interval.low),
        "high": _finite(interval.high),
        "se": _finite(interval.se),
        "margin": margin.nats if margin else None,
    }


def _share(count: int | None, of: int | None) -> float | None:
    return count / of if count is not None and of else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _check_measures(report: Report) -> dict[str, dict[str, float | None]]:
    values: dict[str, float] = {
        "errors": report.count("error"),
        "warnings": report.count("warning"),
        "known": sum(finding.standing == "known" for finding in report.findings),
    }
    if (contents := report.summary.contents) is not None:
        values["tensors"] = contents.tensors
        values["bytes"] = contents.bytes
        values["scale_bytes"] = contents.scale_bytes
    values["rules_run"] = sum(covered.ran for covered in report.coverage)
    return {name: {"value": float(value)} for name, value in values.items()}


def scalars(values: Mapping[str, Any]) -> dict[str, Scalar]:
    """Return values as a record keeps them: at most 100, what is not a scalar as JSON."""
    first = list(values.items())[:100]
    return {str(name)[:200]: _scalar(value) for name, value in first}


def _scalar(value: Any) -> Scalar:
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, str):
        return value[:2000]
    if isinstance(value, float) and math.isfinite(value):
        return value
    return json.dumps(value, sort_keys=True, default=str)[:2000]
