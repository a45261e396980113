# SPDX-License-Identifier: Apache-2.0
"""Render docs/expert-layouts.md from verifier/layouts/expert_stacks.toml.

    python tools/make_layouts.py [--check]

``--check`` writes nothing and fails where the committed page differs.
"""

from __future__ import annotations

import sys
from pathlib import Path

from verifier.layouts.expert_stacks import StackLayout, stack_layouts
from verifier.schemes import ENGINE_NAMES

PAGE = Path(__file__).parent.parent / "docs" / "expert-layouts.md"
HEAD = """# Experts in stacks

<!-- rendered by tools/make_layouts.py from verifier/layouts/expert_stacks.toml -->

The hub checkpoints of some families hold all experts of a layer in one tensor.
`ckptgate export --expert-layout` writes them either way:

* `per-expert`: one module per projection of each expert, with weights [out, in] and biases;
* `hub`: as the hub has them: the same tensors under the same names, with the same axes and the
  same order of gate and up. Siblings are named `<parameter>_weight_scale`, or
  `<module>.weight_scale` where the hub's name ends in `.weight`.

Either way blocks run along the input axis, whatever axes the stack has. With *one* scale, a stack
has a single `weight_scale_2` and a single `input_scale` for all of its experts, as engines read
it. With *each*, it has a vector of one per expert, and the quantized values are byte for byte
those of individual experts.

A stack is quantized as a whole or not at all. If the recipe quantizes no expert, stacks are
copied unchanged; if it quantizes some experts individually, all are written individually.
Quantized stacks can be read as well: MXFP4 (`_blocks`, `_scales`, [experts, out, in]), 128x128
FP8, and every format that ckptgate writes. 128x128 FP8 is written in stacks only where gate and
up meet at a multiple of 128.

`check` reads both layouts, and compares either with a base in either: it checks a stack of a
family below as the linear layers that engines build of it. A finding for `experts.3.gate_proj`
may therefore be about a part of a stack; the finding names the stack. Stacks of other families
are checked as they are stored.
"""


def page() -> str:
    """Return the page."""
    rows = [row for row in stack_layouts() if not row.refused]
    lines = [
        HEAD,
        "## Supported",
        "",
        "| family | hub | axes | gate and up | linear layer of one expert | default "
        "| scales of a stack |",
        "|" + "---|" * 7,
        *map(_row, rows),
    ]
    lines += [
        "",
        "## Reasons for the defaults",
        "",
        "| family | reason | source |",
        "|---|---|---|",
    ]
    lines += [f"| {row.name} | {row.why} | {row.source} |" for row in rows]
    lines += [
        "",
        "## What engines load",
        "",
        "`export` writes a layout that vLLM and SGLang load, or the engine that `--for` names. If",
        "there is none, it refuses quantized experts of the family; `--for none` writes them.",
        "For other families and engines only the reason of the default is known.",
        "",
        "| family | engine | loads quantized experts | reason | source |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.name} | {ENGINE_NAMES[engine]} | {' or '.join(forms.layouts) or 'in no layout'} "
        f"| {forms.why} | {forms.source} |"
        for row in rows
        for engine, forms in row.engines.items()
    ]
    lines += ["", "## Refused", "", "| family | reason |", "|---|---|"]
    refused = (row for row in stack_layouts() if row.refused)
    lines += [f"| {', '.join(row.model_types)} | {row.refused} |" for row in refused]
    return "\n".join(lines) + "\n"


def _row(layout: StackLayout) -> str:
    axes = {
        False: "[E, out, in]",
        True: "[E, in, out]",
        None: "[E, in, out] or [E, out, in]",
    }
    fused = any(len(leaves) > 1 for leaves in layout.stacks.values())
    order = ("interleaved" if layout.interleaved else "gate first") if fused else "separate stacks"
    leaves = ", ".join(leaf for leaves in layout.stacks.values() for leaf in leaves)
    linear = layout.linear.format(expert="E", leaf="…")
    cells = (
        ", ".join(layout.model_types),
        "<br>".join(f"`{suffix}`" for suffix in layout.stacks),
        axes[layout.transposed],
        order,
        f"`{linear}`: {leaves}",
        layout.default,
        "one" if layout.one_scale else "each",
    )
    return f"| {' | '.join(cells)} |"


def main() -> int:
    """Write the page, or compare it with the committed one."""
    text = page()
    if "--check" not in sys.argv:
        PAGE.write_text(text, encoding="utf-8")
        return 0
    if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == text:
        return 0
    print("docs/expert-layouts.md differs from the table (python tools/make_layouts.py writes it)")
    return 1


if __name__ == "__main__":
    sys.exit(main())
