# SPDX-License-Identifier: Apache-2.0
"""``ckptgate repair``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from exporter.cli.export import OVERWRITE, REPORT, WORKERS, _require_writable


@click.command()
@click.argument("broken")
@click.argument("out")
@click.option(
    "--base",
    metavar="REF",
    required=True,
    help="The checkpoint that BROKEN was made from, in hub layout.",
)
@click.option("--dry-run", is_flag=True, help="Print what would be done and write nothing.")
@OVERWRITE
@WORKERS
@REPORT
@click.pass_context
def repair(
    ctx: click.Context,
    broken: str,
    out: str,
    base: str,
    dry_run: bool,
    overwrite: bool,
    workers: int | None,
    report_file: Path | None,
) -> None:
    """Make the wrongly named, stacked or described export in BROKEN right, into OUT; no quantized
    byte changes.

    What cannot be known is refused (exit 1) before anything is written. OUT is then checked against
    REF.
    """
    import exporter  # noqa: PLC0415  (torch costs a second, and --help does not need it)

    if dry_run:
        from exporter.exporting import summary  # noqa: PLC0415  (as above)

        found = exporter.plan_repair(broken, base=base)
        plan = found.repair.plan
        lines = [f"repair {broken} by {base}", *describe(summary(found))]
        lines.append(f"  result       {len(plan.specs):,} tensors, {plan.nbytes:,} bytes")
        click.echo("\n".join([*lines, "nothing was written (dry run)"]))
        return
    _require_writable(report_file, out)
    manifest = exporter.repair(broken, out, base=base, overwrite=overwrite, workers=workers)
    same: dict[str, Any] = manifest.notes["unchanged"]
    lines = [
        f"wrote {out}: {manifest.tensors:,} tensors, {manifest.bytes:,} bytes",
        *describe(manifest.notes["repair"]),
    ]
    lines.append(
        f"  sha256       {same['sha256_before']} before, of {same['quantized_tensors']:,} quantized tensors"
    )
    lines.append(f"               {same['sha256_after']} after: equal, tensor by tensor")
    if same["stacks"]:
        lines.append(f"               {same['stacks']:,} stacks made again from their parts: equal")
    click.echo("\n".join(lines))
    ctx.exit(_check(manifest, out, base, report_file))


def _check(manifest: Any, out: str, base: str, report_file: Path | None) -> int:
    """Check what was written against the base, and return the check's exit code."""
    import verifier  # noqa: PLC0415  (numpy)
    from verifier.report import render_json, render_text  # noqa: PLC0415

    report = verifier.check(out, base=base, depth="payload")
    click.echo(render_text(report), nl=False)
    if report_file is not None:
        value = {
            "manifest": manifest.model_dump(mode="json"),
            "check": json.loads(render_json(report)),
        }
        report_file.parent.mkdir(parents=True, exist_ok=True)
        report_file.write_text(json.dumps(value, indent=2) + "\n")
    return report.exit_code


def describe(found: dict[str, Any]) -> list[str]:
    """Return the lines of what a repair does."""
    kept, compared = found["kept"]
    more = f", {compared:,} compared with the base" if compared else ""
    lines = [f"  keep         {kept:,} quantized tensors, byte for byte{more}"]
    count, names = found["renamed"]
    if count:
        first, new = next(iter(names.items()))
        lines.append(f"  rename       {count:,} tensors ({first} to {new} first)")
    count, parts, names = found["split"]
    if count:
        first, into = next(iter(names.items()))
        lines.append(
            f"  take apart   {count:,} stacked or fused tensors into {parts:,} ({first} to {into[0]} first)"
        )
    count, names = found["replaced"]
    if count:
        lines.append(
            f"  replace      {count:,} unquantized tensors that differ from the base's: "
            + ", ".join(f"{n} ({how})" for n, how in list(names.items())[:3])
        )
    for kind, word in (("from_base", "add"), ("dropped", "drop")):
        count, listed = found[kind]
        if count:
            what = (
                "tensors of the base that it lacks"
                if word == "add"
                else "tensors that belong to no checkpoint"
            )
            lines.append(f"  {word:12} {count:,} {what}: {', '.join(listed[:3])}")
    described = found["described"]
    lines.append(
        f"  describe     index and configs anew: {described['shown']} (declared: {described['was']})"
    )
    for kind, what in (
        ("dead", "exclusions that match no module"),
        ("absent", "quantized_layers that are no module"),
    ):
        count, names = described[kind]
        if count:
            lines.append(f"  drop         {count:,} {what}: {', '.join(names)}")
    return lines
