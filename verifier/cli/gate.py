# SPDX-License-Identifier: Apache-2.0
"""``ckptgate gate``, ``score`` and ``compare``."""

from __future__ import annotations

import glob
import json
import os
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from verifier.cli.common import progress_bar
from verifier.cli.recording import record, recordable, recording_options
from verifier.errors import MissingExtra, UsageError

if TYPE_CHECKING:
    from verifier.gate import GateResult
    from verifier.gate.jobs import Scorer

_CORPUS = click.option(
    "--corpus",
    metavar="NAME|FILE",
    help="wikitext2-test, a text file, or .jsonl of ids or text; a task has its own.",
)
_PROTOCOL = click.option(
    "--protocol",
    metavar="P",
    default="tokens",
    show_default=True,
    help="tokens, lm-eval (its wikitext), or a task of lm-eval by its name or YAML file: right and wrong answers.",
)
_METRIC = click.option(
    "--metric",
    metavar="NAME",
    help="Which metric of a task says right or wrong; its first by default.",
)
_MARGIN = click.option(
    "--max-increase",
    "--max-loss",
    "max_increase",
    metavar="8%",
    help="Largest tolerated loss: % of perplexity, or nats a token; of a task points of accuracy.",
)
_DRIFT = click.option(
    "--drift-against",
    metavar="RUN",
    help="Run of an accepted candidate, to judge the drift against too.",
)
_MAX_DRIFT = click.option(
    "--max-drift", metavar="NATS", help="Largest tolerated drift; 0.003 nats a token by default."
)
_FLOOR = click.option(
    "--floor",
    metavar="RUN",
    multiple=True,
    help="Run of the base by another engine: differences up to that are noise.",
)
_WINDOW = click.option(
    "--window",
    type=click.IntRange(2, 1_000_000),
    default=512,
    show_default=True,
    help="Tokens in a window.",
)
_DOCUMENTS = click.option(
    "--documents", type=click.IntRange(min=1), help="Score the first N documents only."
)
_DEVICE = click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1 …")
_BATCH = click.option(
    "--batch", type=click.IntRange(1, 4096), default=8, show_default=True, help="Windows at a time."
)
_WORKERS = click.option(
    "--workers",
    type=click.IntRange(1, 64),
    help="Processes; by default processors on CPU, at most 4.",
)
_SCORER = (
    click.option(
        "--scorer",
        "scorer",
        type=click.Choice(["hf", "vllm", "server"]),
        default="hf",
        show_default=True,
        help="transformers here; vLLM under another interpreter; a running server (score only).",
    ),
    click.option(
        "--activations",
        type=click.Choice(["bf16", "declared"]),
        default="bf16",
        show_default=True,
        help="bf16 judges weights alone; declared rounds activations too, as the checkpoint declares (hf only).",
    ),
    click.option(
        "--engine-python", metavar="PATH", default="", help="The interpreter that has vLLM."
    ),
    click.option(
        "--engine-option",
        "engine_options",
        metavar="K=V",
        multiple=True,
        help="An argument of vLLM's LLM.",
    ),
    click.option(
        "--endpoint",
        metavar="URL",
        default="",
        help="http://HOST:PORT/v1 of an OpenAI-style server.",
    ),
    click.option(
        "--served",
        metavar="NAME",
        default="",
        help="The model's name there, where it serves several.",
    ),
    click.option(
        "--engine-timeout",
        type=float,
        default=1800.0,
        show_default=True,
        help="Seconds an engine may take.",
    ),
)
_FORMAT = click.option(
    "--format", "format_", type=click.Choice(["text", "json"]), default="text", show_default=True
)


def _scorer_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(_SCORER):
        command = option(command)
    return command


def _scorer_of(given: dict[str, Any]) -> Scorer:
    """Return the scorer that the options stand for; they are taken out of ``given``."""
    from verifier.gate.jobs import Scorer  # noqa: PLC0415  (numpy, as in check)

    pairs = []
    for text in given.pop("engine_options"):
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise UsageError(
                f"--engine-option {text[:80]}: give NAME=VALUE, e.g. tensor_parallel_size=8"
            )
        pairs.append((name, _scalar(value)))
    found = Scorer(
        given.pop("scorer"),
        given.pop("activations"),
        given.pop("engine_python"),
        given.pop("endpoint"),
        given.pop("served"),
        tuple(pairs),
        given.pop("engine_timeout"),
    )
    found.check()
    return found


def _scalar(text: str) -> str | int | float | bool:
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, int | float | bool | str) else text


@click.command()
@click.argument("candidate")
@click.option("--base", metavar="REF", required=True, help="The checkpoint to compare with.")
@_CORPUS
@_PROTOCOL
@_METRIC
@_MARGIN
@_DRIFT
@_MAX_DRIFT
@_FLOOR
@click.option(
    "--kl",
    type=click.Choice(["auto", "lockstep", "top-k", "off"]),
    default="auto",
    show_default=True,
    help="KL divergence: both models side by side, or a lower bound from the likeliest tokens of both.",
)
@click.option(
    "--cache",
    metavar="DIR",
    help="Keep the base's run, unfinished work and attempts here; nowhere by default.",
)
@click.option(
    "--plan",
    is_flag=True,
    help="Score ten documents and tell what the whole would detect and cost; no verdict.",
)
@_WINDOW
@_DOCUMENTS
@_DEVICE
@_BATCH
@_WORKERS
@_scorer_options
@_FORMAT
@recording_options
@click.pass_context
def gate(
    ctx: click.Context,
    /,
    candidate: str,
    base: str,
    corpus: str | None,
    format_: str,
    *,
    plan: bool,
    history: str | None,
    label: str,
    golden: str | None,
    **options: Any,
) -> None:
    """Measure the loss of CANDIDATE against its base on the same text.

    Exit 0: the loss is shown to be within the margin. 1: shown to be beyond it. 3: inconclusive.
    """
    require_installed("torch", "transformers", "scipy")
    if plan and (history is not None or golden is not None or label):
        raise UsageError(
            "--plan measures nothing that could be recorded; leave out --history, --label and --golden"
        )
    recordable(history, golden, label)
    started, options["scorer"] = time.monotonic(), _scorer_of(options)
    from verifier import gate as room  # noqa: PLC0415  (numpy, as in check)

    with progress_bar("scoring") as progress:
        if plan:
            found = room.plan(candidate, base=base, corpus=corpus, progress=progress, **options)
            click.echo(
                room.render_plan_json(found) if format_ == "json" else room.render_plan_text(found),
                nl=False,
            )
            return
        result = room.run(
            candidate, base=base, corpus=corpus, progress=progress, say=say, **options
        )
    _end(ctx, result, format_, started, history=history, label=label, golden=golden)


@click.command()
@click.argument("checkpoint")
@_CORPUS
@_PROTOCOL
@_METRIC
@click.option("-o", "--output", metavar="RUN", required=True, help="The run file to write.")
@click.option(
    "--top-k",
    type=click.IntRange(0, 4096),
    default=0,
    help="Log-probabilities to keep a token; none by default.",
)
@_WINDOW
@_DOCUMENTS
@_DEVICE
@_BATCH
@_WORKERS
@_scorer_options
@click.option("--force", is_flag=True, help="Replace RUN where it exists.")
def score(
    checkpoint: str,
    corpus: str | None,
    protocol: str,
    metric: str | None,
    output: str,
    top_k: int,
    documents: int | None,
    *,
    force: bool,
    **options: Any,
) -> None:
    """Score CHECKPOINT once, to compare later: `ckptgate compare BASE.run CANDIDATE.run`.

    A run that was killed goes on from RUN.part when it is started again, and gives the same bits.
    Under torchrun each rank scores its share, and the last one to finish writes RUN.
    """
    require_installed("torch", "transformers", "scipy")
    from verifier import gate as room  # noqa: PLC0415
    from verifier.checkpoint import local_directory, open_checkpoint  # noqa: PLC0415
    from verifier.files import require_writable  # noqa: PLC0415
    from verifier.gate.gate import corpus_of  # noqa: PLC0415
    from verifier.gate.scorers.lm_eval_task import kind_of  # noqa: PLC0415

    if Path(output).exists() and not force:
        raise UsageError(f"{output}: exists; --force replaces it")
    if top_k and protocol != "tokens":
        raise UsageError(
            f"--top-k needs the protocol tokens; {protocol} gives sums of documents only"
        )
    require_writable(output)
    options["scorer"] = _scorer_of(options)
    part, ranks = Path(f"{output}.part"), _ranks()
    if ranks is not None and options["device"] == "cuda":
        options["device"] = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    with progress_bar("scoring") as progress:
        found = room.score_run(
            open_checkpoint(local_directory(checkpoint)),
            corpus_of(protocol, corpus, metric).head(documents),
            top_k=top_k,
            journal=part,
            protocol=kind_of(protocol),
            progress=progress,
            say=say,
            ranks=ranks,
            **options,
        )
    if found is None:
        return  # the rank that finishes last writes the run
    room.write_run(output, found)
    for file in (part, *part.parent.glob(f"{glob.escape(part.name)}.*-of-*")):
        file.unlink(missing_ok=True)
    click.echo(room.render_run(found, output), nl=False)


@click.command()
@click.argument("base", metavar="BASE.run")
@click.argument("candidate", metavar="CANDIDATE.run")
@_MARGIN
@_DRIFT
@_MAX_DRIFT
@_FLOOR
@_FORMAT
@recording_options
@click.pass_context
def compare(
    ctx: click.Context,
    base: str,
    candidate: str,
    max_increase: str | None,
    drift_against: str | None,
    max_drift: str | None,
    floor: tuple[str, ...],
    format_: str,
    history: str | None,
    label: str,
    golden: str | None,
) -> None:
    """Judge CANDIDATE.run against BASE.run, both written by `ckptgate score`; no model is loaded.

    Exit 0: the loss is shown to be within the margin. 1: shown to be beyond it. 3: inconclusive.
    """
    require_installed("scipy")
    from verifier import gate as room  # noqa: PLC0415

    if max_drift is not None and drift_against is None:
        raise UsageError("--max-drift needs --drift-against RUN")
    recordable(history, golden, label)
    started = time.monotonic()
    reference, ours = room.read_run(base), room.read_run(candidate)
    accepted = room.read_run(drift_against) if drift_against is not None else None
    task = ours.header.key.get("protocol") == "task"
    margin = room.margin_of(max_increase, ours.header.formats, task=task)
    drift_margin = room.drift_margin_of(max_drift, task=task)
    result = room.compare_runs(
        reference,
        ours,
        margin,
        drift_against=accepted,
        drift_margin=drift_margin,
        floor_runs=[*map(room.read_run, floor)],
    )
    _end(ctx, result, format_, started, history=history, label=label, golden=golden)


def _ranks() -> tuple[int, int] | None:
    """Return this process's rank and their number where torchrun started it, else None."""
    try:
        number, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    except (KeyError, ValueError):
        return None
    return (number, count) if count > 1 and 0 <= number < count else None


def _end(
    ctx: click.Context, result: GateResult, format_: str, started: float, **recording: Any
) -> None:
    """Print the result, put it on record where that is asked for, and end with its exit code."""
    from verifier import gate as room  # noqa: PLC0415

    seconds, text = time.monotonic() - started, room.render_json(result)
    click.echo(text if format_ == "json" else room.render_text(result), nl=False)
    ctx.exit(record(text, result.exit_code, seconds=seconds, **recording))


def require_installed(*modules: str) -> None:
    """Refuse where what scores is not installed."""
    for module in modules:
        if find_spec(module) is None:
            raise MissingExtra("gate", "gate")


def say(message: str) -> None:
    """Tell a person something on stderr."""
    from verifier.text import printable  # noqa: PLC0415

    click.echo(f"ckptgate: {printable(message, 2000)}", err=True)
