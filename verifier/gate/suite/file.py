# SPDX-License-Identifier: Apache-2.0
"""The file of a suite: YAML that names corpora and tasks of lm-eval, each with its margin."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from verifier.errors import UsageError
from verifier.gate.corpora import WIKITEXT
from verifier.gate.options import SEQ_LEN
from verifier.suggest import did_you_mean
from verifier.text import printable

MAX_BYTES = 1_000_000
LENGTH_CHANGE = "5%"
_CORPUS_ONLY = frozenset({"lm_eval", "max_kl"})
_TASK_ONLY = frozenset({"metric", "repeats", "max_length_change"})
_CONFIG = ConfigDict(extra="forbid", frozen=True)
Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,39}$")]
MarginText = Annotated[str, Field(max_length=40)] | float


class SuiteEntry(BaseModel):
    """One corpus, or one task of lm-eval by its name or YAML file, and what is tolerated on it.

    ``lm_eval`` scores a corpus as lm-eval's ``wikitext`` task does. ``repeats``: how often each
    item of a task with sampled answers is answered. ``max_length_change`` is of the tokens that a
    task generates, ``5%`` up or down by default. The other fields are options of
    `verifier.gate.run`.
    """

    model_config = _CONFIG
    name: Name
    corpus: str | None = None
    task: str | None = None
    lm_eval: bool = False
    metric: str | None = None
    documents: Annotated[int, Field(ge=1)] | None = None
    seq_len: Annotated[int, Field(ge=2, le=1_000_000)] = SEQ_LEN
    max_increase: MarginText | None = None
    max_kl: MarginText | None = None
    max_length_change: MarginText = LENGTH_CHANGE
    repeats: Annotated[int, Field(ge=1, le=1000)] = 1

    @model_validator(mode="after")
    def _goes_together(self) -> SuiteEntry:
        if (self.corpus is None) == (self.task is None):
            raise ValueError(f"{self.name}: give corpus or task, one of both")
        kind, other = ("corpus", _TASK_ONLY) if self.task is None else ("task", _CORPUS_ONLY)
        if wrong := sorted(self.model_fields_set & other):
            raise ValueError(f"{self.name}: {wrong[0]} does not go with a {kind}")
        if self.task is not None and self.max_increase is None:
            raise ValueError(
                f"{self.name}: a task has no default margin; give max_increase, e.g. 1% of accuracy"
            )
        return self

    @property
    def protocol(self) -> str:
        """The protocol of the gate: ``tokens``, ``lm-eval``, or the task."""
        return self.task or ("lm-eval" if self.lm_eval else "tokens")


class SuiteFile(BaseModel):
    """A named list of entries."""

    model_config = _CONFIG
    name: Annotated[str, Field(min_length=1, max_length=100)]
    entries: Annotated[tuple[SuiteEntry, ...], Field(min_length=1, max_length=50)]

    @model_validator(mode="after")
    def _has_distinct_names(self) -> SuiteFile:
        names = [entry.name for entry in self.entries]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"two entries are named {twice}")
        return self


@dataclass(frozen=True)
class Suite:
    """A suite whose files are found from the working directory; ``sha256`` is of all that its file
    says, however it is written.
    """

    name: str
    entries: tuple[SuiteEntry, ...]
    sha256: str


def read_suite(file: str | os.PathLike[str]) -> Suite:
    """Read a suite; paths in it are relative to its folder.

    Raises:
        UsageError: no such file, or what is wrong in it and where.
    """
    path = Path(file)
    if not path.is_file():
        raise UsageError(f"--suite {path}: no such file")
    if path.stat().st_size > MAX_BYTES:
        raise UsageError(f"--suite {path}: larger than {MAX_BYTES:,} bytes")
    try:
        value = yaml.load(path.read_bytes(), _Loader)  # noqa: S506  (a safe loader)
        said = SuiteFile.model_validate(value)
    except ValidationError as error:
        raise UsageError(f"--suite {path}: {_first_fault(error)}") from error
    except (yaml.YAMLError, UnicodeError, RecursionError) as error:
        reason = printable(" ".join(str(error).split()), 200)
        raise UsageError(f"--suite {path}: not YAML: {reason}") from error
    entries = tuple(_resolved(entry, path.parent) for entry in said.entries)
    digest = hashlib.sha256(said.model_dump_json().encode()).hexdigest()
    return Suite(said.name, entries, digest)


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, which also rejects a key that is given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Return a mapping.

        Raises:
            ConstructorError: a key is given twice.
        """
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {twice!r} is given twice", node.start_mark
            )
        return super().construct_mapping(node, deep)


def _first_fault(error: ValidationError) -> str:
    """Return the first fault in one sentence: where it is, and what."""
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        known = (SuiteEntry if len(first["loc"]) > 1 else SuiteFile).model_fields
        return printable(f"{where}: unknown key.{did_you_mean(str(first['loc'][-1]), known)}", 300)
    message = first["msg"].removeprefix("Value error, ")
    return printable(f"{where}: {message}" if where else message, 300)


def _resolved(entry: SuiteEntry, folder: Path) -> SuiteEntry:
    """Return an entry whose files are found from the working directory."""
    changes = {}
    if entry.corpus is not None and entry.corpus != WIKITEXT:
        changes["corpus"] = str(folder / entry.corpus)
    if entry.task is not None and entry.task.endswith((".yaml", ".yml")):
        changes["task"] = str(folder / entry.task)
    return entry.model_copy(update=changes)
