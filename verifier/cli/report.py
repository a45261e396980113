# SPDX-License-Identifier: Apache-2.0
"""``ckptgate report``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec

import click

from verifier.checkpoint import open_checkpoint
from verifier.cli.options import REPLACED
from verifier.cli.progress import progress_bar
from verifier.cli.recording import print_notes
from verifier.errors import ContentError, MissingExtra, UsageError
from verifier.evaluation import Drift, GateResult, Margin
from verifier.files import require_writable, write_atomic
from verifier.goldens import compare, golden_of, store
from verifier.history import Result, load, read_result
from verifier.history.picture import draw
from verifier.history.render import change_lines, trend_lines
from verifier.inspect.noise import noise
from verifier.report.figures import Figure, heat


@click.command()
@click.argument("runs", metavar="RUN.json...", nargs=-1, required=True)
@click.option("-o", "--output", metavar="FILE.html", required=True, help="The page to write.")
@click.option("--history", metavar="FILE", help="Also plot the runs' names over time from this.")
@click.option(
    "--golden", metavar="FILE", help="Also show the drift of the first run over this record."
)
@click.option("--measure", default="loss", show_default=True, help="What is plotted over time.")
@click.option(
    "--weights",
    is_flag=True,
    help="Read the checkpoints of the first run, and show signal to quantization noise.",
)
@REPLACED
def report(
    runs: tuple[str, ...],
    output: str,
    history: str | None,
    golden: str | None,
    measure: str,
    weights: bool,
) -> None:
    """Render runs and history as one HTML page.

    RUN.json is what `gate --format json` or `check --format json` printed. The page has no script,
    fetches nothing, follows light and dark mode, and has at most 2 MB.
    """
    if find_spec("jinja2") is None:
        raise MissingExtra("report", "report")
    from verifier.report.page import render_page  # noqa: PLC0415  (jinja2, an extra)

    require_writable(output)
    results = [read_result(run) for run in runs]
    figures: list[Figure] = []
    if golden is not None:
        results[0], figures = _with_drift(results[0], golden)
    if history is not None:
        figures.append(_over_time(history, results, measure))
    if weights:
        figures += _of_weights(results[0])
    write_atomic(output, render_page(results, figures))
    click.echo(f"wrote {output}")


def _uri(result: Result) -> str:
    return result.candidate if isinstance(result, GateResult) else result.uri


def _over_time(file: str, results: Sequence[Result], measure: str) -> Figure:
    history = load(file)
    print_notes(history.notes)
    uris = [_uri(result).rstrip("/") for result in results]
    names = {uri.rpartition("/")[2] or uri for uri in uris}
    records = [record for record in history.records if record.name in names]
    if not records:
        raise ContentError(
            f"{file}: no run of {', '.join(sorted(names))} among {len(history.records):,}"
        )
    lines = [*change_lines(records, measure), *trend_lines(records)][:10]
    changes = "; ".join(line.strip() for line in lines) or "no change point"
    words = f"A dot is a run, the ribbon its interval, a dotted line a change; {changes}."
    return Figure(f"{measure} over time", words, draw(records, measure))


def _with_drift(result: Result, file: str) -> tuple[Result, list[Figure]]:
    """Return a gate's result with its paired drift over an accepted record; where the two are
    equal, the result and a remark.
    """
    accepted = store.load(*store.split_path(file))
    comparison = compare(accepted, golden_of(result))
    if comparison.outcome == "agrees" and comparison.interval is None:
        return result, [Figure("Identical to the accepted record", comparison.sentence, "")]
    if comparison.interval is None or not isinstance(result, GateResult):
        raise ContentError(f"{file}: no drift to show: {comparison.sentence}")
    margin = Margin(accepted.drift, "of the golden")
    return replace(result, drift=Drift(file, margin, comparison.interval)), []


def _require_same_checkpoint(result: Result) -> None:
    """Refuse a directory that holds a different checkpoint than the run was of.

    Raises:
        ContentError: the digest of its weights is not that of a gate's candidate; or it holds a
            different number of tensors or bytes than the checked one.
    """
    stored = open_checkpoint(_uri(result))
    if isinstance(result, GateResult):
        if result.weights_sha256 not in ("", stored.weights_sha256):
            raise ContentError(
                f"{_uri(result)} is not the checkpoint of the run: the SHA-256 of its weights is "
                f"{stored.weights_sha256[:16]}…, the run had {result.weights_sha256[:16]}…"
            )
        return
    contents = result.summary.contents
    if contents is None:
        return
    if (len(stored.tensors), stored.nbytes) != (contents.tensors, contents.bytes):
        raise ContentError(
            f"{_uri(result)} is not the checkpoint of the run: {len(stored.tensors):,} tensors of "
            f"{stored.nbytes:,} bytes, the run had {contents.tensors:,} of {contents.bytes:,}"
        )


_SQNR = (0.0, 40.0)
"""The palest and the strongest color of a heat map: noise as large as the weights, and more than
8-bit formats keep."""
_SQNR_WORDS = "Pale is noise; in the goldens NVFP4 keeps 20 to 22 dB, MXFP8 about 31 dB."


def _of_weights(result: Result) -> list[Figure]:
    if not result.base:
        raise UsageError("--weights compares with a base, and the run has none")
    _require_same_checkpoint(result)
    with progress_bar("decoding", unit="module") as progress:
        measured = noise(_uri(result), result.base, progress)
    words = f"10 log10 of signal over quantization error, {measured.weights:,} weights."
    if measured.left_out:
        words += f" {measured.left_out} weights could not be compared."
    figures = [
        Figure(
            "Signal to quantization noise by role and layer",
            f"{words} {_SQNR_WORDS}",
            heat(measured.roles, "Signal to noise", "SQNR in dB", ends=_SQNR),
        )
    ]
    if measured.experts:
        figures.append(
            Figure(
                "Signal to quantization noise by layer and expert",
                "All projections of an expert. One that stands out is framed.",
                heat(measured.experts, "Signal to noise of experts", "SQNR in dB", ends=_SQNR),
            )
        )
    if measured.floor:
        title, unit = "Block scales at the floor", "% at 2^-9 or zero"
        figures.append(
            Figure(
                title,
                "NVFP4 blocks whose scale is the smallest one or zero.",
                heat(measured.floor, title, unit, ends=(0, 100), low_is_bad=False),
            )
        )
    return figures
