# SPDX-License-Identifier: Apache-2.0
"""``ckptgate gate``, ``score`` and ``compare``."""

from __future__ import annotations

import glob
import json
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import click

from verifier import gate as gate_api
from verifier.checkpoint import local_directory, open_checkpoint
from verifier.cli.options import OVERWRITE, RUNNERS
from verifier.cli.progress import progress_bar
from verifier.cli.recording import Recording, record, recording_options, require_recordable
from verifier.cli.results import RESULT, write_result
from verifier.cli.runners import runner_given
from verifier.cli.spellings import RenamedOptions
from verifier.cli.terminal import on_interrupt
from verifier.cli.units import ScoreJob
from verifier.errors import MissingExtra, UsageError
from verifier.evaluation import GateResult
from verifier.files import require_writable
from verifier.gate.comparison import require_top_tokens
from verifier.gate.decision import kl_margin_of, kl_ratio_of
from verifier.gate.gate import corpus_of
from verifier.gate.jobs import Scorer, protocol_of
from verifier.gate.options import BATCH, SEQ_LEN
from verifier.text import printable

Command = TypeVar("Command", bound=Callable[..., Any])
_RENAMED = {
    "--window": ("--seq-len",),
    "--batch": ("--batch-size",),
    "--max-loss": ("--max-increase",),
    "--force": ("--overwrite",),
}
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
    help="tokens, lm-eval (its wikitext), or a task of lm-eval by its name or YAML file.",
)
_METRIC = click.option(
    "--metric",
    metavar="NAME",
    help="Metric of a task that marks answers right or wrong.  [default: its first]",
)
_MARGIN = click.option(
    "--max-increase",
    metavar="8%",
    help="Largest tolerated loss: % of perplexity, or nats per token; points of accuracy for a "
    "task.",
)
_DRIFT = click.option(
    "--drift-against", metavar="RUN", help="Also test drift against this accepted run."
)
_MAX_DRIFT = click.option(
    "--max-drift",
    metavar="RATIO|NATS",
    help="Largest tolerated drift: 1.15x the accepted run's KL divergence from the base, or nats "
    "per token of loss.  [default: 1.15x; 0.003 without top tokens]",
)
_MAX_KL = click.option(
    "--max-kl",
    metavar="NATS",
    help="Largest tolerated KL divergence from the base, nats per token.  [default: twice the "
    "formats' budgets]",
)
_FLOOR = click.option(
    "--floor",
    metavar="RUN",
    multiple=True,
    help="Run of the base by another engine; differences up to that are noise.  Repeatable.",
)
_SEQ_LEN = click.option(
    "--seq-len",
    type=click.IntRange(2, 1_000_000),
    default=SEQ_LEN,
    show_default=True,
    help="Context length: tokens in a window.",
)
DOCUMENTS = click.option(
    "--documents", type=click.IntRange(min=1), help="Score only the first N documents."
)
DEVICE = click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1 …")
BATCH_SIZE = click.option(
    "--batch-size",
    "batch",
    type=click.IntRange(1, 4096),
    default=BATCH,
    show_default=True,
    help="Windows at a time.",
)
WORKERS = click.option(
    "--workers",
    type=click.IntRange(1, 64),
    help="Processes.  [default: number of CPUs, max 4; 1 on another device]",
)
_SCORER = (
    click.option(
        "--scorer",
        type=click.Choice(["hf", "vllm", "server"]),
        default="hf",
        show_default=True,
        help="transformers here; vLLM under another interpreter; a running server (score only).",
    ),
    click.option(
        "--activations",
        type=click.Choice(["bf16", "declared", "shared"]),
        default="bf16",
        show_default=True,
        help="bf16: weight-only error. declared: round activations too, as the checkpoint "
        "declares. shared: with one input scale for all experts of a layer, as vLLM has (hf only).",
    ),
    click.option(
        "--engine-python", metavar="PATH", default="", help="The interpreter that has vLLM."
    ),
    click.option(
        "--engine-option",
        "engine_options",
        metavar="K=V",
        multiple=True,
        help="Argument of vLLM's LLM.  Repeatable.",
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
        help="The model's name on the server, if it serves several.",
    ),
    click.option(
        "--engine-timeout",
        type=float,
        default=1800.0,
        show_default=True,
        help="Seconds that an engine may take to start, and for each batch.",
    ),
)


def _scorer_options(command: Command) -> Command:
    for option in reversed(_SCORER):
        command = option(command)
    return command


def _scorer_of(options: dict[str, Any]) -> Scorer:
    """Take the scorer's options out of ``options`` and return the scorer that they stand for."""
    scorer = Scorer(
        options.pop("scorer"),
        options.pop("activations"),
        options.pop("engine_python"),
        options.pop("endpoint"),
        options.pop("served"),
        tuple(_engine_option(text) for text in options.pop("engine_options")),
        options.pop("engine_timeout"),
    )
    scorer.check()
    return scorer


def _engine_option(text: str) -> tuple[str, str | int | float | bool]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise UsageError(
            f"--engine-option {text[:80]}: give NAME=VALUE, e.g. tensor_parallel_size=8"
        )
    return name, _scalar(value)


def _scalar(text: str) -> str | int | float | bool:
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, int | float | bool | str) else text


@click.command(cls=RenamedOptions, renamed=_RENAMED)
@click.argument("candidate")
@click.option("--base", metavar="REF", required=True, help="The checkpoint to compare with.")
@_CORPUS
@_PROTOCOL
@_METRIC
@_MARGIN
@_DRIFT
@_MAX_DRIFT
@_MAX_KL
@_FLOOR
@click.option(
    "--kl",
    type=click.Choice(["auto", "lockstep", "top-k", "off"]),
    default="auto",
    show_default=True,
    help="KL divergence: exact with both models side by side (lockstep), or a lower bound from the "
    "top tokens of both (top-k).",
)
@click.option(
    "--cache",
    metavar="DIR",
    help="Keep the base's run, unfinished work and attempts here.  [default: nothing is kept]",
)
@click.option(
    "--plan",
    is_flag=True,
    help="Score ten documents, and estimate the detectable loss and the cost; no verdict.",
)
@_SEQ_LEN
@DOCUMENTS
@DEVICE
@BATCH_SIZE
@WORKERS
@_scorer_options
@RESULT
@recording_options
@click.pass_context
def gate(
    ctx: click.Context,
    /,
    candidate: str,
    base: str,
    format_: str,
    *,
    plan: bool,
    recording: Recording,
    **options: Any,
) -> None:
    """Measure the loss of CANDIDATE over its base on the same text.

    Exit 0: the loss is shown to be within the margin. 1: shown to be beyond it. 3: inconclusive.
    """
    require_installed("torch", "transformers", "scipy")
    started = time.monotonic()
    if plan and recording != Recording():
        raise UsageError("--plan has no result to record; leave out --history, --label, --golden")
    require_recordable(recording)
    options["scorer"] = _scorer_of(options)
    require_device(options["device"])
    on_interrupt(
        f"finished work is kept in {options['cache']}; run the same command again to resume"
        if options["cache"]
        else "nothing is kept; --cache DIR keeps finished work"
    )
    with progress_bar("scoring", unit="document") as progress:
        options |= {"progress": progress, "say": say}
        if plan:
            _print_plan(gate_api.plan(candidate, base=base, **options), format_)
            return
        result = gate_api.run(candidate, base=base, **options)
    ctx.exit(_finish(result, format_, recording, started))


def _print_plan(plan: gate_api.GatePlan, format_: str) -> None:
    render = gate_api.render_plan_json if format_ == "json" else gate_api.render_plan_text
    write_result(render(plan))


@click.command(cls=RenamedOptions, renamed=_RENAMED)
@click.argument("checkpoint")
@_CORPUS
@_PROTOCOL
@_METRIC
@click.option("-o", "--output", metavar="RUN", required=True, help="The run file to write.")
@click.option(
    "--top-k",
    type=click.IntRange(0, 4096),
    default=0,
    show_default=True,
    help="Log-probabilities to keep per token.",
)
@_SEQ_LEN
@DOCUMENTS
@DEVICE
@BATCH_SIZE
@WORKERS
@_scorer_options
@OVERWRITE
@RUNNERS
def score(
    checkpoint: str,
    corpus: str | None,
    protocol: str,
    metric: str | None,
    output: str,
    documents: int | None,
    *,
    overwrite: bool,
    units: str | None,
    ray: str | None,
    **options: Any,
) -> None:
    """Score CHECKPOINT once, to compare later: `ckptgate compare BASE.run CANDIDATE.run`.

    Rerunning a command that was killed resumes from RUN.part and gives the same bits. Under
    torchrun each rank scores its share, and the last one to finish writes RUN.
    """
    require_installed("torch", "transformers", "scipy")
    if Path(output).exists() and not overwrite:
        raise UsageError(f"{output} already exists; use --overwrite to replace it")
    if options["top_k"] and protocol != "tokens":
        raise UsageError(
            f"--top-k needs the protocol tokens; {protocol} gives only sums of documents"
        )
    require_writable(output)
    options["scorer"] = _scorer_of(options)
    part, ranks = Path(f"{output}.part"), _ranks()
    on_interrupt(f"finished work is kept in {part}; run the same command again to resume")
    if ranks is not None and options["device"] == "cuda":
        options["device"] = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    if ray is None:
        require_device(options["device"])
    given = runner_given(
        units,
        ray,
        label="scoring",
        workers=options["workers"],
        gpus=int(options["device"].startswith("cuda")),
    )
    texts = corpus_of(protocol, corpus, metric).head(documents)
    options |= {"journal": part, "protocol": protocol_of(protocol), "say": say}
    with given or nullcontext() as runner, progress_bar("scoring", unit="document") as progress:
        if runner is not None:
            run = runner(ScoreJob.for_runner(runner, checkpoint, texts, options, progress))
        else:
            opened = open_checkpoint(local_directory(checkpoint))
            run = gate_api.score_run(opened, texts, progress=progress, ranks=ranks, **options)
    if run is None:
        return  # the rank or part that finishes last writes the run
    gate_api.write_run(output, run)
    for file in (part, *part.parent.glob(f"{glob.escape(part.name)}.*-of-*")):
        file.unlink(missing_ok=True)
    click.echo(gate_api.render_run(run, output), nl=False)


@click.command(cls=RenamedOptions, renamed=_RENAMED)
@click.argument("base", metavar="BASE.run")
@click.argument("candidate", metavar="CANDIDATE.run")
@_MARGIN
@_DRIFT
@_MAX_DRIFT
@_MAX_KL
@_FLOOR
@RESULT
@recording_options
def compare(
    base: str,
    candidate: str,
    max_increase: str | None,
    drift_against: str | None,
    max_drift: str | None,
    max_kl: str | None,
    floor: tuple[str, ...],
    format_: str,
    recording: Recording,
) -> None:
    """Compare CANDIDATE.run with BASE.run, both from `ckptgate score`; no model is loaded.

    Exit 0: the loss is shown to be within the margin. 1: shown to be beyond it. 3: inconclusive.
    """
    require_installed("scipy")
    started = time.monotonic()
    if max_drift is not None and drift_against is None:
        raise UsageError("--max-drift needs --drift-against RUN")
    require_recordable(recording)
    base_run, candidate_run = gate_api.read_run(base), gate_api.read_run(candidate)
    accepted = gate_api.read_run(drift_against) if drift_against is not None else None
    if accepted is not None:
        require_top_tokens(max_drift, [base_run, candidate_run, accepted])
    header = candidate_run.header
    task = header.key.get("protocol") == "task"
    result = gate_api.compare_runs(
        base_run,
        candidate_run,
        gate_api.margin_of(max_increase, header.parameters or header.formats, task=task),
        drift_against=accepted,
        drift_margin=gate_api.drift_margin_of(max_drift, task=task),
        kl_margin=None if task else kl_margin_of(max_kl, header.parameters),
        max_kl_ratio=None if task else kl_ratio_of(max_drift),
        floor_runs=[gate_api.read_run(file) for file in floor],
    )
    raise click.exceptions.Exit(_finish(result, format_, recording, started))


def _ranks() -> tuple[int, int] | None:
    """Return this process's rank and the number of ranks where torchrun started it, else None."""
    try:
        rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    except (KeyError, ValueError):
        return None
    return (rank, ranks) if ranks > 1 and 0 <= rank < ranks else None


def _finish(result: GateResult, format_: str, recording: Recording, started: float) -> int:
    """Print the result, put it on record where that is asked for, and return the exit code."""
    seconds = time.monotonic() - started
    render = gate_api.render_json if format_ == "json" else gate_api.render_text
    write_result(render(result))
    return record(result, result.exit_code, recording, seconds)


def require_installed(*modules: str) -> None:
    """Refuse to start where what scores is not installed.

    Raises:
        MissingExtra: naming the extra.
    """
    for module in modules:
        if find_spec(module) is None:
            raise MissingExtra("gate", "gate")


def require_device(device: str) -> None:
    """Refuse a CUDA device that this machine does not have.

    Raises:
        UsageError: naming the option.
    """
    if not device.startswith("cuda"):
        return
    import torch  # noqa: PLC0415  (an extra, and only a device needs it here)

    number = device.partition(":")[2]
    if torch.cuda.device_count() <= (int(number) if number.isdecimal() else 0):
        raise UsageError(f"--device {device}: torch finds no such device here; use cpu")


def say(message: str) -> None:
    """Print a message for the user on stderr."""
    click.echo(f"ckptgate: {printable(message, 2000)}", err=True)
