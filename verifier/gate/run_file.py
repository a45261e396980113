# SPDX-License-Identifier: Apache-2.0
"""What one checkpoint scored on one corpus under one protocol, as a file that is compared later, on
any machine.

A run file is a safetensors container. ``__metadata__.ckptgate_run`` holds its header as JSON,
``sha256`` the digest of that header and of every array. Arrays, for D documents and T scored tokens
in corpus order:

    sums          F64 [D]     nats of each document (a task: 1 for wrong, 0 for right)
    tokens        I64 [D]     scored tokens of each document (lm-eval: words, a task: 1)
    completion    I64 [D]     generated tokens of each document; tasks that generate
    finish        I32 [D]     how it ends: 0 end token, 1 stop sequence, 2 cut off at the limit
    nats          F32 [T]     nats of each token; this and the rest only for the protocol tokens
    top1, sure    I32, F32    the top token at each position and its log-probability; not
                              from every engine
    top_ids       I32 [T, k]  with --top-k: the top k tokens
    top_logprobs  F32 [T, k]  and their log-probabilities
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.numpy import save

from verifier.checkpoint.header import read_shard, strict_json
from verifier.checkpoint.source import LocalSource
from verifier.errors import ContentError, IncomparableError, UsageError
from verifier.files import write_atomic
from verifier.gate.jobs import Array
from verifier.manifest import Sha256

MAX_FILE = 64_000_000_000
MAX_DOCUMENTS = 10_000_000
MAX_TOKENS = 2**40
DTYPES = {
    "sums": ("F64", np.float64),
    "tokens": ("I64", np.int64),
    "completion": ("I64", np.int64),
    "finish": ("I32", np.int32),
    "nats": ("F32", np.float32),
    "top1": ("I32", np.int32),
    "sure": ("F32", np.float32),
    "top_ids": ("I32", np.int32),
    "top_logprobs": ("F32", np.float32),
}
PER_TOKEN = ("nats", "top1", "sure")
TOP = ("top_ids", "top_logprobs")
COMPLETION = ("completion", "finish")
_Text = Annotated[str, Field(max_length=4096)]


class RunHeader(BaseModel):
    """What was scored and how. ``key`` must be equal for two runs to be compared, ``environment``
    should be.

    The digests of weights, configuration and tokenizer say which checkpoint was scored (version 1.0
    recorded the weights only). ``documents`` are digests; ``groups`` holds the number of each
    document's group, and is empty where every document is its own. ``parameters`` counts those of
    linear layers by format. ``vocab_size`` is that of config.json, ``chance`` the share of right
    answers that guessing gives in a task. ``floor``: the model against itself in other batches,
    nats per token; ``experts``: tokens of each expert by layer.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    schema_version: Literal["1.0", "1.1"] = "1.1"
    model: _Text
    weights_sha256: Sha256
    config_sha256: Sha256 | None = None
    tokenizer_sha256: Sha256 | None = None
    formats: list[_Text] = Field(default=[], max_length=100)
    key: dict[_Text, _Text | bool | int] = Field(max_length=100)
    environment: dict[_Text, _Text] = Field(max_length=100)
    documents: list[Annotated[str, Field(pattern="^[0-9a-f]{16}$")]] = Field(
        max_length=MAX_DOCUMENTS
    )
    groups: list[Annotated[int, Field(ge=0)]] = Field(default=[], max_length=MAX_DOCUMENTS)
    parameters: dict[_Text, Annotated[int, Field(ge=0)]] = Field(default={}, max_length=100)
    vocab_size: Annotated[int, Field(ge=1)] | None = None
    chance: Annotated[float, Field(ge=0, le=1)] | None = None
    sampled_from: _Text | None = None
    nonfinite: list[Annotated[int, Field(ge=0)]] = []
    experts: dict[_Text, list[Annotated[int, Field(ge=0)]]] = Field(default={}, max_length=100_000)
    floor: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0


@dataclass(frozen=True)
class Run:
    """A header and its arrays, which the module's docstring lists."""

    header: RunHeader
    arrays: dict[str, Array] = field(repr=False)

    @property
    def sums(self) -> Array:
        """Nats of each document, float64 [D]."""
        return self.arrays["sums"]

    @property
    def tokens(self) -> Array:
        """Scored tokens of each document, int64 [D]."""
        return self.arrays["tokens"]

    def __len__(self) -> int:
        return len(self.header.documents)


def sums_of(nats: Array, tokens: Array) -> Array:
    """Return the exact sum of each document's tokens, rounded once to float64: the order of work
    cannot change it.
    """
    ends = np.cumsum(tokens)
    values = nats.tolist()
    return np.array(
        [math.fsum(values[e - n : e]) for e, n in zip(ends.tolist(), tokens.tolist(), strict=True)],
        np.float64,
    )


def write_run(file: str | os.PathLike[str], run: Run) -> None:
    """Write a run under a temporary name and rename it.

    Raises:
        MachineError: it could not be written; an earlier file is unchanged.
    """
    arrays = {k: np.ascontiguousarray(v, DTYPES[k][1]) for k, v in run.arrays.items()}
    text = run.header.model_dump_json()
    write_atomic(file, save(arrays, {"ckptgate_run": text, "sha256": _digest(text, arrays)}))


def read_run(file: str | os.PathLike[str]) -> Run:
    """Read a run and check every field.

    Raises:
        UsageError: there is no such file.
        ContentError: it is not a run file, or was changed after it was written.
    """
    path = Path(file)
    if not path.is_file():
        raise UsageError(f"{path}: no such file; `ckptgate score` writes one")
    size = path.stat().st_size
    if size > MAX_FILE:
        raise ContentError(f"{path}: {size:,} bytes; a run file has at most {MAX_FILE:,}")
    source = LocalSource(path.parent)
    try:
        shard = read_shard(source, path.name, size)
        if shard.problems:
            raise ContentError(f"{path}: not a run file: {shard.problems[0].message}")
        if "ckptgate_run" not in shard.metadata:
            raise ContentError(
                f"{path}: a safetensors file, but not a run file; `ckptgate score` writes one"
            )
        text = shard.metadata["ckptgate_run"]
        header = _header(path, text)
        arrays = {}
        for name, t in shard.tensors.items():
            if name not in DTYPES or t.dtype != DTYPES[name][0]:
                raise ContentError(f"{path}: unexpected array {name[:80]!r} of {t.dtype}")
            raw = source.read(path.name, t.offset, t.nbytes)
            arrays[name] = raw.view(DTYPES[name][1]).reshape(t.shape)
    finally:
        source.close()
    fault = _fault(header, arrays)
    if fault is None and shard.metadata.get("sha256") != _digest(text, arrays):
        fault = "wrong digest: the file was changed or damaged after it was written"
    if fault:
        raise ContentError(f"{path}: {fault}")
    return Run(header, arrays)


def _header(path: Path, text: str) -> RunHeader:
    try:
        return RunHeader.model_validate(strict_json(text))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))[:80]
        raise ContentError(
            f"{path}: not the header of a run: {where}: {first['msg'][:120]}"
        ) from error
    except ValueError as error:
        raise ContentError(f"{path}: the header is not JSON: {str(error)[:120]}") from error


def _fault(header: RunHeader, arrays: dict[str, Array]) -> str | None:
    """Return what is wrong with the arrays of a run, or None."""
    count = len(header.documents)
    if missing := sorted(_required(header, arrays) - arrays.keys()):
        return f"no array {missing[0]!r}"
    sums, tokens = arrays["sums"], arrays["tokens"]
    if sums.shape != (count,) or tokens.shape != (count,):
        return f"{count} documents, but sums {list(sums.shape)} and tokens {list(tokens.shape)}"
    if count == 0:
        return "no document"
    if header.groups and len(header.groups) != count:
        return f"{count} documents, but the groups of {len(header.groups)}"
    if (tokens < 0).any() or (tokens > MAX_TOKENS).any():
        return "a document with an impossible number of tokens"
    if any(document >= count for document in header.nonfinite):
        return "nonfinite names a document that does not exist"
    if header.key.get("protocol") == "task" and not (
        np.isin(sums, (0.0, 1.0)).all() and (tokens == 1).all()
    ):
        return "a document of a task that is neither right (0) nor wrong (1)"
    if "finish" in arrays and (fault := _completion_fault(arrays, count)):
        return fault
    for name, values in arrays.items():
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            return f"{name} has values that are not finite"
    return _token_fault(arrays, int(tokens.sum()))


def _required(header: RunHeader, arrays: dict[str, Array]) -> set[str]:
    """Return the arrays that a run of this protocol has, given those that it has."""
    required = {"sums", "tokens"}
    if header.key.get("protocol") == "tokens":
        required.add("nats")
    for together in (TOP, PER_TOKEN[1:], COMPLETION):
        if any(name in arrays for name in together):
            required.update(together)
    return required


def _completion_fault(arrays: dict[str, Array], count: int) -> str | None:
    completion, finish = (arrays[name] for name in COMPLETION)
    if completion.shape != (count,) or finish.shape != (count,):
        return f"{count} documents, but other numbers of completions"
    if (completion < 0).any() or (completion > MAX_TOKENS).any():
        return "a completion with an impossible number of tokens"
    return None if np.isin(finish, (0, 1, 2)).all() else "a completion that ends in no known way"


def _token_fault(arrays: dict[str, Array], total: int) -> str | None:
    for name in (*PER_TOKEN, *TOP):
        if name in arrays and (
            arrays[name].ndim != (2 if name in TOP else 1) or len(arrays[name]) != total
        ):
            return f"{name} is {list(arrays[name].shape)} for {total:,} tokens"
    if "nats" not in arrays:
        return "a sum of nats below zero" if (arrays["sums"] < 0).any() else None
    if "top_ids" in arrays and arrays["top_ids"].shape != arrays["top_logprobs"].shape:
        return "top_ids and top_logprobs differ in shape"
    if (arrays["nats"] < 0).any() or any(
        (arrays[n] > 0).any() for n in ("sure", "top_logprobs") if n in arrays
    ):
        return "a probability above one"
    if not np.array_equal(sums_of(arrays["nats"], arrays["tokens"]), arrays["sums"]):
        return "sums are not the sums of nats"
    return None


def _digest(text: str, arrays: dict[str, Array]) -> str:
    state = hashlib.sha256(text.encode())
    for name in sorted(arrays):
        state.update(f"\0{name}\0{arrays[name].shape}\0".encode() + arrays[name].tobytes())
    return state.hexdigest()


def require_same_protocol(base: RunHeader, other: RunHeader) -> None:
    """Refuse two runs of different protocols or documents; the name of the corpus may differ.

    Raises:
        IncomparableError: naming the first key that differs, and both values.
    """
    require_same_key(base.model, base.key, other.model, other.key)
    if base.documents != other.documents:
        raise IncomparableError(f"{base.model} and {other.model} were scored on other documents")


def require_same_key(
    model: str, key: Mapping[str, Any], other_model: str, other_key: Mapping[str, Any]
) -> None:
    """Refuse two protocol keys that differ in more than the name of the corpus.

    Raises:
        IncomparableError: naming the first key that differs, and both values.
    """
    for name in sorted(key.keys() | other_key.keys()):
        if name != "corpus" and key.get(name) != other_key.get(name):
            values = [json.dumps(a_key.get(name))[:70] for a_key in (key, other_key)]
            raise IncomparableError(
                f"cannot compare {model} and {other_model}: runs used different protocols ({name} "
                f"is {values[0]} and {values[1]}); score one of them again"
            )


def unlike_environment(base: RunHeader, other: RunHeader) -> list[str]:
    """Return the environment keys in which two runs differ, each with both values."""
    old, new = base.environment, other.environment
    names = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    return [f"{n} {old.get(n, 'unknown')} and {new.get(n, 'unknown')}" for n in names]
