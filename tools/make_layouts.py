# SPDX-License-Identifier: Apache-2.0
"""Render docs/expert-layouts.md from exporter/layout/experts.yaml.

    python tools/make_layouts.py [--check]

``--check`` writes nothing and fails where the committed page differs.
"""

from __future__ import annotations

import sys
from pathlib import Path

from exporter.layout import families

PAGE = Path(__file__).parent.parent / "docs" / "expert-layouts.md"
HEAD = """# Experts in stacks

<!-- rendered by tools/make_layouts.py from exporter/layout/experts.yaml -->

Some families' hub checkpoints hold all experts of a layer in one tensor. `ckptgate export --expert-layout` writes
them

* `per-expert`: one module for each projection of each expert, weights [out, in], and biases with them;
* `hub`: as the hub has them: the same tensors under the same names, in the same axes and order of gate and up, with
  siblings named `<parameter>_weight_scale` (or `<module>.weight_scale` where the hub's name ends in `.weight`).

Either way blocks run along the input axis, whatever axes the stack has. Of *one* scale a stack has one `weight_scale_2`
and one `input_scale` for all of its experts, as engines read it; of *each* a vector of one for each expert, and then the
codes are byte for byte those of single experts. A stack is quantized whole or not at all. If a recipe takes no expert,
the stacks keep their bytes; if it takes some one by one, all are written so. Stacks that are quantized already are read:
MXFP4 (`_blocks`, `_scales`, [experts, out, in]), 128x128 FP8, and what is written here. 128x128 FP8 is written in stacks
only where gate and up meet on a multiple of 128.

`check` reads both layouts, and either against either as base: a stack of a family below is judged as the linears that
engines build of it. What it says of `experts.3.gate_proj` may therefore stand in a stack; the finding names that. Of
other families a stack is judged as it is stored.
"""


def page() -> str:
    """Return the page."""
    rows = [f for f in families() if not f.refused]
    axes = {
        "out_in": "[E, out, in]",
        "in_out": "[E, in, out]",
        "either": "[E, in, out] or [E, out, in]",
    }
    lines = [
        HEAD,
        "## Exported",
        "",
        "| family | hub | axes | gate and up | linear of one expert | default | scales of a stack |",
        "|" + "---|" * 7,
    ]
    for f in rows:
        fused = [v for v in f.stacks.values() if len(v) > 1]
        order = ("interleaved" if f.interleaved else "gate first") if fused else "apart"
        stacks, leaves = (
            "<br>".join(f"`{s}`" for s in f.stacks),
            ", ".join(x for v in f.stacks.values() for x in v),
        )
        single = f"`{f.linear.format(expert='E', leaf='…')}`: {leaves}"
        count = "one" if f.one_scale else "each"
        lines.append(
            f"| {', '.join(f.types)} | {stacks} | {axes[f.axes]} | {order} | {single} | {f.default} | {count} |"
        )
    lines += ["", "## Why that default", "", "| family | why | read from |", "|---|---|---|"]
    lines += [f"| {f.name} | {f.why} | {f.cite} |" for f in rows]
    lines += ["", "## Refused", "", "| family | why |", "|---|---|"]
    lines += [f"| {', '.join(f.types)} | {f.refused.strip()} |" for f in families() if f.refused]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Write or compare the page."""
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
