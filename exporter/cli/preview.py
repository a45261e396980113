# SPDX-License-Identifier: Apache-2.0
"""``ckptgate export --preview``: a few prompts completed by the source and by the result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from verifier.errors import UsageError
from verifier.text import counted

MAX_PROMPTS = 32
NEW_TOKENS = 32
Prompt = str | list[int]


def read_prompts(file: str) -> list[Prompt]:
    """Return the prompts of a file: one per line, or ``{"text": …}`` or ``{"ids": […]}`` per line
    of a .jsonl file.

    Raises:
        UsageError: no such file, no prompt, or more than `MAX_PROMPTS`.
    """
    path = Path(file)
    if not path.is_file():
        raise UsageError(f"--preview {file}: no such file")
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines or len(lines) > MAX_PROMPTS:
        raise UsageError(
            f"--preview {file}: {counted(len(lines), 'prompt')}; use 1 to {MAX_PROMPTS}, "
            "one per line"
        )
    if path.suffix != ".jsonl":
        return list(lines)
    prompts: list[Prompt] = []
    for number, line in enumerate(lines, 1):
        prompt = _prompt(line)
        if prompt is None:
            raise UsageError(
                f'--preview {file}: line {number} is neither {{"text": …}} nor {{"ids": […]}}'
            )
        prompts.append(prompt)
    return prompts


def _prompt(line: str) -> Prompt | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    value = entry.get("ids", entry.get("text")) if isinstance(entry, dict) else None
    if isinstance(value, list) and value and all(type(i) is int and i >= 0 for i in value):
        return value
    return value if isinstance(value, str) and value else None


def print_preview(source: str, out: str, prompts: list[Prompt]) -> list[dict[str, Any]]:
    """Print the greedy completion of each prompt by the source and by the result; return them."""
    from verifier.load.preview import preview  # noqa: PLC0415  (torch and transformers)

    pairs = zip(*(preview(uri, prompts, NEW_TOKENS) for uri in (source, out)), strict=True)
    rows = [
        {"prompt": a.prompt, "source": a.text, "quantized": b.text, "same_tokens": a.same(b)}
        for a, b in pairs
    ]
    for row in rows:
        click.echo(f"preview    {row['prompt']}")
        click.echo(f"  source     {row['source']}")
        click.echo(f"  quantized  {row['quantized']}")
        click.echo(f"  {'':10} first {row['same_tokens']} of {NEW_TOKENS} tokens identical")
    return rows
