# SPDX-License-Identifier: Apache-2.0
"""``ckptgate gate``."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import click

from verifier.cli.recording import record, recordable, recording_options
from verifier.errors import MissingExtra


@click.command()
@click.argument("candidate")
@click.option("--base", metavar="REF", required=True, help="The checkpoint to compare with.")
@click.option("--corpus", metavar="NAME|FILE", required=True, help="wikitext2-test, a text file, or .jsonl of ids or text.")
@click.option("--protocol", type=click.Choice(["tokens", "lm-eval"]), default="tokens", show_default=True)
@click.option("--max-increase", metavar="8%", help="Largest tolerated loss: % of perplexity, or nats a token.")
@click.option("--window", type=click.IntRange(2, 1_000_000), default=512, show_default=True, help="Tokens in a window.")
@click.option("--documents", type=click.IntRange(min=1), help="Score the first N documents only.")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1 …")
@click.option("--batch", type=click.IntRange(1, 4096), default=8, show_default=True, help="Windows at a time.")
@click.option("--workers", type=click.IntRange(1, 64), help="Processes; by default processors on CPU, at most 4.")
@click.option("--format", "format_", type=click.Choice(["text", "json"]), default="text", show_default=True)
@recording_options
@click.pass_context
def gate(
    ctx: click.Context,
    candidate: str,
    base: str,
    corpus: str,
    protocol: str,
    max_increase: str | None,
    window: int,
    documents: int | None,
    device: str,
    batch: int,
    workers: int | None,
    format_: str,
    history: str | None,
    label: str,
    golden: str | None,
) -> None:
    """Measure the loss of CANDIDATE against its base on the same text.

    Exit 0: the loss is shown to be within the margin. 1: shown to be beyond it. 3: inconclusive.
    """
    for module in ("torch", "transformers", "scipy"):
        if find_spec(module) is None:
            raise MissingExtra("gate", "gate")
    recordable(history, golden, label)
    started = time.monotonic()
    from verifier import gate as room  # noqa: PLC0415  (numpy, as in check)

    with _bar() as progress:
        result = room.run(
            candidate, base=base, corpus=corpus, protocol=protocol, max_increase=max_increase, window=window,  # type: ignore[arg-type]
            documents=documents, device=device, batch=batch, workers=workers, progress=progress,
        )  # fmt: skip
    click.echo(room.render_json(result) if format_ == "json" else room.render_text(result), nl=False)
    seconds = time.monotonic() - started
    code = record(
        room.render_json(result), result.exit_code, history=history, label=label, golden=golden, seconds=seconds
    )
    ctx.exit(code)


@contextmanager
def _bar() -> Iterator[Callable[[int, int], None] | None]:
    """Yield a progress callback that draws a bar on a terminal, and None elsewhere."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console  # noqa: PLC0415  (of use on a terminal only)
    from rich.progress import Progress  # noqa: PLC0415

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("scoring", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
