# SPDX-License-Identifier: Apache-2.0
"""``ckptgate report``."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import click

from verifier.errors import ContentError, MissingExtra, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from verifier.report.runs import Figure


@click.command()
@click.argument("runs", metavar="RUN.json...", nargs=-1, required=True)
@click.option("-o", "--output", metavar="FILE.html", required=True, help="The page to write.")
@click.option(
    "--history", metavar="FILE", help="Draw the runs' names over time from this history too."
)
@click.option(
    "--golden",
    metavar="FILE",
    help="Draw the drift of the first run against this accepted record too.",
)
@click.option("--measure", default="loss", show_default=True, help="What is drawn over time.")
@click.option(
    "--weights",
    is_flag=True,
    help="Read the checkpoints that the first run names; draw their signal to noise.",
)
def report(
    runs: tuple[str, ...],
    output: str,
    history: str | None,
    golden: str | None,
    measure: str,
    weights: bool,
) -> None:
    """Draw runs (gate or check, --format json) as one HTML file: no script, light and dark, at most
    2 MB.
    """
    if find_spec("jinja2") is None:
        raise MissingExtra("report", "report")
    from verifier.files import require_writable, write_atomic  # noqa: PLC0415
    from verifier.history.record import read_run  # noqa: PLC0415  (pydantic and jinja2, which --help does not need)
    from verifier.report.runs import render_runs  # noqa: PLC0415

    require_writable(output)
    read = [read_run(r) for r in runs]
    if golden is not None:
        _drift(read[0], golden)
    extra = _weights(read[0]) if weights else []
    if history is not None:
        extra = [*_history(history, read, measure), *extra]
    write_atomic(output, render_runs(read, extra))
    click.echo(f"wrote {output}")


def _history(file: str, runs: Sequence[dict[str, Any]], measure: str) -> list[Figure]:
    from verifier.history import load  # noqa: PLC0415
    from verifier.history.picture import draw  # noqa: PLC0415
    from verifier.history.render import change_lines, trend_lines  # noqa: PLC0415
    from verifier.report.runs import Figure  # noqa: PLC0415

    found = load(file)
    for note in found.notes:
        click.echo(f"note     {note}", err=True)
    uris = [str(r.get("candidate") or r.get("uri")).rstrip("/") for r in runs]
    names = {u.rpartition("/")[2] or u for u in uris}
    records = [r for r in found.records if r.name in names]
    if not records:
        raise ContentError(
            f"{file}: no run of {', '.join(sorted(names))} among {len(found.records):,}"
        )
    told = " ".join(
        f"{line.strip()}." for line in [*change_lines(records, measure), *trend_lines(records)][:10]
    )
    return [Figure(f"{measure} over time", told or "No change point.", draw(records, measure))]


def _drift(run: dict[str, Any], file: str) -> None:
    """Put the paired drift against an accepted record into a run, where a gate puts its own."""
    from verifier.goldens import store  # noqa: PLC0415
    from verifier.goldens.judge import judge  # noqa: PLC0415

    old = store.load(*store.split_path(file))
    judged = judge(old, store.proposed(run))
    if judged.interval is None:
        raise ContentError(f"{file}: no drift to draw: {judged.sentence}")
    i = judged.interval
    interval = {"delta": i.delta, "low": i.low, "high": i.high, "se": i.se}
    run["drift"] = {"accepted": file, "margin": {"nats": old.drift}, "interval": interval}


def _weights(run: dict[str, Any]) -> list[Figure]:
    from verifier.cli.common import progress_bar  # noqa: PLC0415
    from verifier.inspect.noise import noise  # noqa: PLC0415
    from verifier.report.figures import heat  # noqa: PLC0415
    from verifier.report.runs import Figure  # noqa: PLC0415

    candidate, base = run.get("candidate") or run.get("uri"), run.get("base")
    if not base:
        raise UsageError("--weights compares with a base, and the run names none")
    with progress_bar("decoding", in_bytes=True) as progress:
        found = noise(str(candidate), str(base), progress)
    left = f" {found.left_out} weights could not be compared." if found.left_out else ""
    words = f"10 log10 of signal over quantization error, {found.weights:,} weights.{left} Low is worse."
    figures = [
        Figure(
            "Signal to quantization noise by role and layer",
            words,
            heat(found.roles, "Signal to noise", "dB"),
        )
    ]
    if found.experts:
        picture = heat(found.experts, "Signal to noise of experts", "dB")
        figures.append(
            Figure(
                "Signal to quantization noise by layer and expert",
                "All projections of an expert.",
                picture,
            )
        )
    if found.floor:
        picture = heat(
            found.floor, "Block scales at the floor", "% at 2^-9 or zero", low_is_bad=False
        )
        figures.append(
            Figure(
                "Block scales at the floor",
                "NVFP4 blocks whose scale is the smallest one or zero.",
                picture,
            )
        )
    return figures
