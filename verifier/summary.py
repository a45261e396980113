# SPDX-License-Identifier: Apache-2.0
"""What a report says apart from findings and coverage; in its JSON form the object ``stats``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from verifier.evaluation import Evaluation, evaluation_json, evaluation_of
from verifier.text import counted

FailOn = Literal["error", "warning"]
FAIL_ON: tuple[FailOn, ...] = ("error", "warning")
"""What ``fail_on`` may be: the lowest severity that fails a check."""
WEIGHTS = ("base", "moved", "rotated", "folded")
"""What ``weights`` may be: as in the base, or how a method moved them."""
_IF_SET = ("subset", "sample", "seed", "weights")


@dataclass(frozen=True, slots=True)
class ReportedOptions:
    """The options of a check, as `verifier.check` takes them."""

    depth: str = "header"
    require: tuple[str, ...] = ()
    fail_on: FailOn = "error"
    tp: int | None = None
    ep: int | None = None
    base: str | None = None
    merged_from: str | None = None
    baseline: str | None = None
    select: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    profile: str | None = None
    plugins: tuple[str, ...] = ()
    subset: str | None = None
    sample: float | None = None
    seed: int | None = None
    weights: str | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the options as JSON values; `_IF_SET` only where they are set."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in values.items()
            if value is not None or name not in _IF_SET
        }


@dataclass(frozen=True, slots=True)
class Contents:
    """What a checkpoint holds, by its headers.

    Attributes:
        tensors: how many.
        shards: how many files.
        bytes: of all tensors.
        scale_bytes: of the scales among them.
        formats: quantized modules by algorithm.
        unquantized: other modules by the dtype of their weight.
        model_type: from config.json.
    """

    tensors: int
    shards: int
    bytes: int
    scale_bytes: int
    formats: Mapping[str, int]
    unquantized: Mapping[str, int]
    model_type: str | None


@dataclass(frozen=True, slots=True)
class Fetched:
    """What was fetched over the network; in JSON ``traffic``."""

    requests: int
    bytes: int


@dataclass(frozen=True, slots=True)
class StaleEntry:
    """An entry of a baseline whose defect was not found again."""

    fingerprint: str
    rule: str
    what: str
    place: str


@dataclass(frozen=True, slots=True)
class BaselineSummary:
    """How the findings compare with a baseline.

    Attributes:
        file: the baseline.
        known: findings that it accepts.
        grown: findings that are worse than its entries.
        stale: entries that were not found again.
        not_judged: entries whose rule did not examine everything.
    """

    file: str
    known: int
    grown: int
    stale: tuple[StaleEntry, ...]
    not_judged: int


NotCheckedKind = Literal["modules", "scales", "values", "weights", "declarations"]


_NOUNS: dict[NotCheckedKind, str] = {
    "modules": "quantized module",
    "scales": "scale tensor",
    "values": "scale tensor",
    "weights": "quantized weight",
    "declarations": "statement",
}


@dataclass(frozen=True, slots=True)
class NotChecked:
    """What a check left unexamined, so that it cannot pass.

    Attributes:
        kind: quantized modules; scale tensors; the values of scale tensors; quantized weights that
            could not be compared with the base; statements of a declaration.
        count: how many.
        example: the first module, tensor or file.
        why: the reason, which all of them have in common.
        settle: what settles it, as an instruction.
    """

    kind: NotCheckedKind
    count: int
    example: str
    why: str
    settle: str

    @property
    def subject(self) -> str:
        """What was left unexamined, with its number: ``3 scale tensors``."""
        if self.kind == "declarations":
            return f"{counted(self.count, _NOUNS[self.kind])} of the declaration"
        text = counted(self.count, _NOUNS[self.kind])
        return f"the values of {text}" if self.kind == "values" else text


@dataclass(frozen=True, slots=True)
class Advice:
    """What to do about the findings of a rule.

    Attributes:
        title: of the rule.
        fix: how the defect is fixed, in a sentence or two.
        repairable: whether `ckptgate repair` fixes such defects.
        why: how the defect comes about.
        impact: what it does to the engines that load the checkpoint.
    """

    title: str
    fix: str
    repairable: bool = False
    why: str = ""
    impact: str = ""


@dataclass(frozen=True, slots=True)
class Summary:
    """What a report says apart from findings and coverage.

    Attributes:
        contents: of the checkpoint, None where it could not be read.
        options: of the check, None where it did not begin.
        config: the configuration file that some options came from.
        commits: that were read, by role (``checkpoint``, ``base``, ``merged_from``).
        fetched: over the network, None for local directories.
        baseline: None without one.
        stopped: rules that could not finish, with the reason.
        seconds: wall time.
        inconclusive: why the verdict is inconclusive, or ''.
        evaluation: what depth eval measured, None at other depths.
        error: why there is no report of the checkpoint, or ''.
        different_base: why the base is a different model, or ''.
        not_checked: what was left unexamined, by kind and reason.
        scale_bytes_read: of the scales whose values were read; None where no rule reads all.
        advice: what to do about the findings, by rule.
    """

    contents: Contents | None = None
    options: ReportedOptions | None = None
    config: str | None = None
    commits: Mapping[str, str] = field(default_factory=dict)
    fetched: Fetched | None = None
    baseline: BaselineSummary | None = None
    stopped: Mapping[str, str] = field(default_factory=dict)
    seconds: float | None = None
    inconclusive: str = ""
    evaluation: Evaluation | None = None
    error: str = ""
    different_base: str = ""
    not_checked: tuple[NotChecked, ...] = ()
    scale_bytes_read: int | None = None
    advice: Mapping[str, Advice] = field(default_factory=dict)

    @property
    def reason(self) -> str:
        """Why the verdict is inconclusive or error, or ''."""
        return self.inconclusive or self.error

    def options_json(self) -> dict[str, Any]:
        """Return the options and the configuration file as JSON values."""
        options = self.options.as_json() if self.options else {}
        return options | ({"config": self.config} if self.config else {})

    def as_json(self) -> dict[str, Any]:
        """Return the object ``stats`` of the JSON report, without what does not apply."""
        contents = asdict(self.contents) if self.contents else {}
        others = {
            "options": self.options_json() or None,
            "commits": dict(self.commits) or None,
            "traffic": asdict(self.fetched) if self.fetched else None,
            "baseline": asdict(self.baseline) if self.baseline else None,
            "stopped": dict(self.stopped) or None,
            "seconds": self.seconds,
            "inconclusive": self.inconclusive or None,
            "not_checked": [asdict(entry) for entry in self.not_checked] or None,
            "scale_bytes_read": self.scale_bytes_read,
            "eval": evaluation_json(self.evaluation) if self.evaluation is not None else None,
            "error": self.error or None,
            "different_base": self.different_base or None,
            "advice": {rule: asdict(advice) for rule, advice in self.advice.items()} or None,
        }
        return contents | {name: value for name, value in others.items() if value is not None}


def summary_of(stats: Mapping[str, Any]) -> Summary:
    """Return the summary that the object ``stats`` of a JSON report holds.

    Raises:
        ContentError: the evaluation has a wrong field.
        KeyError: a field is missing.
        TypeError: a field is of a different type, or is not known.
    """
    contents = {f.name: stats[f.name] for f in fields(Contents)} if "tensors" in stats else None
    options, baseline = dict(stats.get("options", {})), stats.get("baseline")
    traffic = stats.get("traffic")
    config = options.pop("config", None)
    return Summary(
        contents=Contents(**contents) if contents is not None else None,
        options=_options_of(options) if options else None,
        config=config,
        commits=stats.get("commits", {}),
        fetched=Fetched(**traffic) if traffic is not None else None,
        baseline=_baseline_of(baseline) if baseline is not None else None,
        stopped=stats.get("stopped", {}),
        seconds=stats.get("seconds"),
        inconclusive=stats.get("inconclusive", stats.get("unproven", "")),
        not_checked=tuple(NotChecked(**entry) for entry in stats.get("not_checked", ())),
        scale_bytes_read=stats.get("scale_bytes_read"),
        evaluation=evaluation_of(stats["eval"]) if "eval" in stats else None,
        error=stats.get("error", ""),
        different_base=stats.get("different_base", ""),
        advice={rule: Advice(**value) for rule, value in stats.get("advice", {}).items()},
    )


def _options_of(value: Mapping[str, Any]) -> ReportedOptions:
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in value.items()}
    return ReportedOptions(**values)


def _baseline_of(value: Mapping[str, Any]) -> BaselineSummary:
    return BaselineSummary(**{**value, "stale": tuple(StaleEntry(**e) for e in value["stale"])})
