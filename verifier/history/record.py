# SPDX-License-Identifier: Apache-2.0
"""One run as one line: measures with intervals, keys, digests, versions, wall time; made from what
gate and check print.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import os
import re
import subprocess
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from verifier import __version__
from verifier.errors import CkptgateError, ContentError, UsageError
from verifier.findings import Verdict, current_verdict

MAX_RUN_BYTES = 256 << 20
Text = Annotated[str, Field(max_length=2000)]
Number = Annotated[float, Field(allow_inf_nan=False)]
SchemaVersion = Annotated[
    Literal["1.1"], BeforeValidator(lambda version: "1.1" if version == "1.0" else version)
]
"""Version 1.0 differs in the names of verdicts alone, and is read as 1.1."""
Scalar = Text | bool | int | Number | None
_CONFIG = ConfigDict(extra="ignore", frozen=True, strict=True)


class Measure(BaseModel):
    """A value with its interval and standard error, where it has them, and the margin that it was
    held against.
    """

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
    kind: Literal["gate", "check", "golden"]
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


def read_run(file: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what ``gate --format json`` or ``check --format json`` printed.

    Raises:
        UsageError: no such file, or one that is too large.
        ContentError: it is no such JSON; numbers that are not finite are refused.
    """
    try:
        with open(file, "rb") as handle:
            raw = handle.read(MAX_RUN_BYTES + 1)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{os.fspath(file)}: {getattr(error, 'strerror', None) or error}"
        ) from error
    if len(raw) > MAX_RUN_BYTES:
        raise UsageError(f"{os.fspath(file)}: larger than {MAX_RUN_BYTES:,} bytes")
    return parse_run(raw.decode("utf-8", "replace"), os.fspath(file))


def parse_run(text: str, where: str) -> dict[str, Any]:
    """Return the JSON object of a run; see `read_run`."""
    try:
        value = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise ContentError(f"{where}: not JSON: {str(error)[:120]}") from error
    if not isinstance(value, dict) or run_kind(value) is None:
        wanted = "neither what `ckptgate gate --format json` prints nor what `ckptgate check --format json` prints"
        raise ContentError(f"{where}: {wanted}")
    value["verdict"] = current_verdict(value.get("verdict"))
    return value


def run_kind(value: dict[str, Any]) -> Literal["gate", "check"] | None:
    """Return which command printed a JSON object, or None."""
    if (
        isinstance(value.get("candidate"), str)
        and isinstance(value.get("key"), dict)
        and "interval" in value
    ):
        return "gate"
    if (
        isinstance(value.get("uri"), str)
        and isinstance(value.get("coverage"), list)
        and "findings" in value
    ):
        return "check"
    return None


def recorded(
    value: dict[str, Any], *, name: str = "", label: str = "", seconds: float | None = None
) -> Record:
    """Return the record of a run.

    Args:
        value: the JSON object of a gate or a check.
        name: what the time series is called; by default the last part of the checkpoint's path.
        label: a note that stays with the run.
        seconds: wall time, where the run does not tell it.

    Raises:
        ContentError: a field of the run is not what it must be.
    """
    kind = run_kind(value)
    if kind is None:
        raise ContentError("the run is neither of a gate nor of a check")
    uri = str(value["candidate"] if kind == "gate" else value["uri"])
    fields: dict[str, Any] = {
        "kind": kind,
        "verdict": value.get("verdict"),
        "label": label,
        "time": now(),
        "commit": commit_here(),
        "name": name or uri.rstrip("/").rpartition("/")[2] or uri,
        "versions": {"ckptgate": __version__},
        "measures": (_gate_measures if kind == "gate" else _check_measures)(value),
        "key": _scalars(value.get("key") if kind == "gate" else _check_key(value)),
        "environment": _scalars(value.get("environment")),
        "seconds": _number(value.get("seconds", seconds)),
        "checkpoint": identity(uri),
        "base": identity(str(value["base"])) if value.get("base") else {},
        "recipe": recipe_of(uri),
    }
    if kind == "check":
        fields["seconds"] = _number(_dict(value.get("stats")).get("seconds", seconds))
    if isinstance(value.get("documents"), list):
        raw = json.dumps(value["documents"], separators=(",", ":"))
        fields["documents_sha256"] = hashlib.sha256(raw.encode()).hexdigest()
    return build(fields)


def build(fields: dict[str, Any]) -> Record:
    """Return a record with its id.

    Raises:
        ContentError: a field is not what it must be.
    """
    raw = json.dumps(fields, sort_keys=True, default=str) + os.urandom(8).hex()
    try:
        return Record.model_validate(
            {"id": hashlib.sha256(raw.encode("utf-8", "replace")).hexdigest()[:16], **fields}
        )
    except ValueError as error:
        first = error.errors()[0] if hasattr(error, "errors") else {"loc": (), "msg": str(error)}
        at = ".".join(map(str, first["loc"]))
        raise ContentError(f"the run cannot be recorded: {at}: {first['msg']}") from error


def now() -> str:
    """Return the time in UTC, ISO 8601 with microseconds and Z."""
    return datetime.datetime.now(tz=datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def commit_here() -> str:
    """Return the commit that CI names or that is checked out in the working directory, with
    ``-dirty``; '' where none is.
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
    found = done.stdout.strip()
    return found if re.fullmatch(r"[0-9a-f]{40,64}(-dirty)?", found) else ""


def identity(uri: str) -> dict[str, Scalar]:
    """Return the address of a checkpoint, its commit on the hub, the digest of its headers, and
    that of its files where its manifest or the hub knows it.

    A checkpoint that is gone, or none, is an address alone.
    """
    from verifier.checkpoint import open_checkpoint  # noqa: PLC0415  (numpy, which reading a history does not need)

    found: dict[str, Scalar] = {"uri": uri[-2000:]}
    try:
        ckpt = open_checkpoint(uri)
    except CkptgateError:
        return found
    state = hashlib.sha256()
    for name in sorted(ckpt.tensors):
        state.update(
            f"{name}\0{ckpt.tensors[name].dtype}\0{list(ckpt.tensors[name].shape)}\0".encode(
                "utf-8", "replace"
            )
        )
    found |= {
        "header_sha256": state.hexdigest(),
        "tensors": len(ckpt.tensors),
        "bytes": ckpt.nbytes,
    }
    files = _dict(manifest_of(uri).get("files"))
    known = {n: _dict(f).get("sha256") for n, f in files.items()} or ckpt.source.digests()
    digests = {n: known[n] for n in sorted(known) if n.endswith(".safetensors")}
    if ckpt.source.revision:
        found["commit"] = ckpt.source.revision
    if digests:
        found["files_sha256"] = hashlib.sha256(
            json.dumps(digests, sort_keys=True).encode()
        ).hexdigest()
    return found


def recipe_of(uri: str) -> dict[str, Scalar]:
    """Return the options that an export's manifest tells, with one digest over them; {} without a
    manifest.
    """
    options = _dict(manifest_of(uri).get("options"))
    if not options:
        return {}
    digest = hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()
    return {"sha256": digest, **_scalars({k: v for k, v in options.items() if v is not None})}


def manifest_of(uri: str) -> dict[str, Any]:
    """Return the manifest of an export in a local folder, or {}."""
    from verifier.manifest import MANIFEST  # noqa: PLC0415

    try:
        with open(Path(uri) / MANIFEST, "rb") as handle:
            return _dict(json.loads(handle.read(16 << 20), parse_constant=_refuse))
    except (OSError, ValueError, RecursionError):
        return {}


def _gate_measures(value: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    drift, more = _dict(value.get("drift")), _dict(value.get("measures"))
    kl = _dict(more.get("kl"))
    for name, interval, margin in (
        ("loss", value.get("interval"), value.get("margin")),
        ("drift", drift.get("interval"), drift.get("margin")),
        ("kl", kl.get("mean"), None),
        ("top1", more.get("top1"), None),
    ):
        i = _dict(interval)
        if _number(i.get("delta")) is not None:
            ends = {k: _number(i.get(k)) for k in ("low", "high", "se")}
            found[name] = {
                "value": i["delta"],
                **ends,
                "margin": _number(_dict(margin).get("nats")),
            }
    tail = kl.get("tail")
    if isinstance(tail, list) and len(tail) == 3 and all(_number(x) is not None for x in tail):
        found["kl_999"] = {"value": tail[0], "low": tail[1], "high": tail[2]}
    flips, sure = _number(more.get("flips")), _number(more.get("sure"))
    if flips is not None and sure:
        found["flips"] = {"value": flips / sure}
    for name in ("perplexity_base", "perplexity_candidate", "floor"):
        if _number(value.get(name)) is not None:
            found[name] = {"value": value[name]}
    right, count = (
        _dict(value.get("accuracy")),
        _number(_dict(value.get("interval")).get("documents")),
    )
    for name in ("base", "candidate"):
        if _number(right.get(name)) is not None and count:
            found[f"accuracy_{name}"] = {"value": right[name] / count}
    found["nonfinite"] = {"value": float(len(value.get("nonfinite") or ()))}
    return found


def _check_measures(value: dict[str, Any]) -> dict[str, Any]:
    findings = [_dict(f) for f in value.get("findings") or ()]
    count = {
        s: sum(f.get("severity") == s and f.get("standing") != "known" for f in findings)
        for s in ("error", "warning")
    }
    found: dict[str, Any] = {"errors": count["error"], "warnings": count["warning"]}
    found["known"] = sum(f.get("standing") == "known" for f in findings)
    stats = _dict(value.get("stats"))
    found |= {
        n: stats[n]
        for n in ("tensors", "bytes", "scale_bytes")
        if _number(stats.get(n)) is not None
    }
    found["rules_run"] = sum(bool(_dict(c).get("ran")) for c in value["coverage"])
    scored = _dict(stats.get("eval"))
    return {n: {"value": float(v)} for n, v in found.items()} | (
        _gate_measures(scored) if scored else {}
    )


def _check_key(value: dict[str, Any]) -> dict[str, Any]:
    options = _dict(_dict(value.get("stats")).get("options"))
    wanted = ("depth", "fail_on", "profile", "tp", "ep", "select", "ignore")
    found: dict[str, Any] = {k: options.get(k) for k in wanted}
    found |= {"base": bool(options.get("base")), "merged_from": bool(options.get("merged_from"))}
    scored = _dict(_dict(_dict(value.get("stats")).get("eval")).get("key"))
    return found | ({"eval": scored} if scored else {})


def _scalars(value: object) -> dict[str, Any]:
    found = {str(k)[:200]: _scalar(v) for k, v in _dict(value).items()}
    return dict(list(found.items())[:100])


def _scalar(value: object) -> object:
    if value is None or isinstance(value, bool | str):
        return value[:2000] if isinstance(value, str) else value
    number = _number(value)
    return value if number is not None else json.dumps(value, sort_keys=True, default=str)[:2000]


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def _dict(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _refuse(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")
