# SPDX-License-Identifier: Apache-2.0
"""``ckptgate export --preview``: a few prompts by the source and by what was written, side by
side.
"""

from __future__ import annotations

import json
from pathlib import Path

import click

from verifier.errors import UsageError

PROMPTS = 32
NEW_TOKENS = 32


def read_prompts(file: str) -> list[str | list[int]]:
    """Return the prompts of a file: a line each, or ``{"text": …}`` or ``{"ids": […]}`` in a .jsonl
    file.

    Raises:
        UsageError: no such file, no prompt, or more than `PROMPTS`.
    """
    path = Path(file)
    if not path.is_file():
        raise UsageError(f"--preview {file}: no such file")
    lines = [
        line
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines()
        if line.strip()
    ]
    if not lines or len(lines) > PROMPTS:
        raise UsageError(
            f"--preview {file}: {len(lines)} prompts; 1 to {PROMPTS} belong there, a line each"
        )
    if path.suffix != ".jsonl":
        return list(lines)
    found: list[str | list[int]] = []
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        value = value.get("ids", value.get("text")) if isinstance(value, dict) else None
        if isinstance(value, list) and value and all(type(i) is int and i >= 0 for i in value):
            found.append(value)
        elif isinstance(value, str) and value:
            found.append(value)
        else:
            raise UsageError(
                f'--preview {file}: line {number} is neither {{"text": …}} nor {{"ids": […]}}'
            )
    return found


def show_preview(
    source: str, out: str, prompts: list[str | list[int]], report_file: Path | None
) -> None:
    """Let the source and what was written go on from each prompt, greedily, and print both."""
    from verifier.load.preview import preview  # noqa: PLC0415  (torch and transformers)

    found = [preview(uri, prompts, NEW_TOKENS) for uri in (source, out)]
    rows = [
        {"prompt": a.prompt, "source": a.text, "quantized": b.text, "same_tokens": a.same(b)}
        for a, b in zip(*found, strict=True)
    ]
    for row in rows:
        click.echo(
            f"preview    {row['prompt']}\n  source     {row['source']}\n  quantized  {row['quantized']}"
        )
        click.echo(f"  {'':10} {row['same_tokens']} of {NEW_TOKENS} tokens alike from the start")
    if report_file is not None:
        value = json.loads(report_file.read_text())
        report_file.write_text(json.dumps(value | {"preview": rows}, indent=2) + "\n")
