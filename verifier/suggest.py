# SPDX-License-Identifier: Apache-2.0
"""What a mistyped name probably means."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

SYNONYMS = {
    "tensorrt": "trtllm",
    "tensorrt-llm": "trtllm",
    "tensorrt_llm": "trtllm",
    "trt": "trtllm",
    "trt-llm": "trtllm",
    "hf": "transformers",
    "huggingface": "transformers",
    "validate": "check",
    "verify": "check",
    "lint": "check",
    "quantize": "export",
    "convert": "export",
    "evaluate": "gate",
    "eval": "gate",
    "perplexity": "gate",
    "fix": "repair",
    "inspect": "show",
    "info": "stats",
    "env": "doctor",
    "version": "--version",
    "md": "markdown",
    "xml": "junit",
    "txt": "text",
}
"""Names that people use elsewhere for one of ours; it counts only where that one is known."""
_DIGITS = str.maketrans("OIL", "011")
"""Letters that are read as digits, in the id of a rule."""
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


def suggestions(name: str, known: Iterable[str], limit: int = 3) -> list[str]:
    """Return the known names that a name probably means, best first."""
    import difflib  # noqa: PLC0415  (only a mistake needs it)

    names = list(known)
    lowered = name.lower()
    for meant in (SYNONYMS.get(lowered), name.upper().translate(_DIGITS)):
        if meant in names:
            return [meant]
    begins = [n for n in names if lowered and n.lower().startswith(lowered)]
    near = difflib.get_close_matches(lowered, [n.lower() for n in names], n=limit, cutoff=0.6)
    of_case = {n.lower(): n for n in names}
    return list(dict.fromkeys([*begins, *(of_case[n] for n in near)]))[:limit]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `` Did you mean a or b?``, with the space before it, or ''."""
    near = suggestions(name, known)
    return f" Did you mean {' or '.join(near)}?" if near else ""


def with_numbers_of(name: str, pattern: str, known: Collection[str]) -> str | None:
    """Return the known name of a pattern that has the numbers of a mistyped name, or None.

    Args:
        name: as the user typed it: ``layers.3.experts.5.w22``.
        pattern: a name with its numbers as ``*``: ``layers.*.experts.*.w2.weight``.
        known: the names that exist.
    """
    numbers, parts = _NUMBER.findall(name), pattern.split("*")
    if len(parts) != len(numbers) + 1:
        return None
    filled = "".join(map("".join, zip(parts, [*numbers, ""], strict=True)))
    return filled if filled in known else None
