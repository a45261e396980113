# SPDX-License-Identifier: Apache-2.0
"""Write the stubs of a new rule: the rule, its defect and its test.

    python tools/new_rule.py QC518 quantized_bias
    python tools/new_rule.py QC5xx quantized_bias    # the next free number of the family

Each stub runs, and fails with "not written yet". docs/add-a-rule.md says how to fill them in.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from string import Template

ROOT = Path(__file__).resolve().parent.parent
RULE = Template('''\
# SPDX-License-Identifier: Apache-2.0
"""$id: $title."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding
from verifier.rules.context import Context
from verifier.rules.registry import rule


@rule(
    "$id",
    "$title",
    severity="error",
    depth="$depth",
    unit="modules",
    consumers=("vLLM", "SGLang", "TensorRT-LLM", "transformers"),
    sources=("where the defect was seen",),
)
def check(ctx: Context) -> Iterator[Finding]:
    """What holds in a valid checkpoint, in one sentence.

    **What it does.** What is compared, and which cases other rules report.

    **Why it happens.** How the defect comes about.

    **Impact.** What engines do with it.

    **Fix.** What to do.
    """
    raise NotImplementedError("$id is not written yet")
    yield ctx.finding("what is wrong")
''')
DEFECT = Template('''

# $id


@defect("$id")
def $name(ckpt: CheckpointEditor) -> Where:
    """Make the defect of $id."""
    raise NotImplementedError("the defect of $id is not written yet")
''')
TEST = Template('''\
# SPDX-License-Identifier: Apache-2.0
"""$id: $title."""

from __future__ import annotations

from pathlib import Path

import verifier
from verifier.selftest.tiny import TINY, make


def test_a_valid_checkpoint_has_no_finding(tmp_path: Path) -> None:
    tiny = make(tmp_path, TINY[0])
    report = verifier.check(tiny.path, base=tiny.base, depth="$depth", select=("$id",))
    assert report.findings == ()


def test_edge_cases() -> None:
    raise NotImplementedError("the test of $id is not written yet")
''')
DEPTHS = {"5": "payload", "6": "load", "7": "eval"}
"""The usual depth of a family; the others read headers."""


def next_free(family: str) -> str:
    """Return the id after the last one of a family."""
    files = (ROOT / "verifier" / "rules" / f"qc{family}xx").glob("qc*_*.py")
    numbers = [int(file.name[2:5]) for file in files]
    return f"QC{max(numbers, default=int(family) * 100) + 1}"


def write_stubs(rule_id: str, name: str) -> list[Path]:
    """Write the three stubs, and return their files."""
    family = rule_id[2]
    fields = {
        "id": rule_id,
        "name": name,
        "title": name.replace("_", " "),
        "depth": DEPTHS.get(family, "header"),
    }
    rule = ROOT / "verifier" / "rules" / f"qc{family}xx" / f"{rule_id.lower()}_{name}.py"
    test = ROOT / "tests" / "unit" / "verifier" / "rules" / f"test_{rule_id.lower()}_{name}.py"
    rule.write_text(RULE.substitute(fields), encoding="utf-8")
    test.write_text(TEST.substitute(fields), encoding="utf-8")
    defects = ROOT / "verifier" / "selftest" / "defects" / f"qc{family}xx.py"
    if not defects.is_file():  # depth eval has no defects in files
        return [rule, test]
    with defects.open("a", encoding="utf-8") as file:
        file.write(DEFECT.substitute(fields))
    return [rule, defects, test]


def main(arguments: list[str]) -> int:
    """Write the stubs of one rule."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("id", help="QC518, or QC5xx for the next free number")
    parser.add_argument("name", help="lower case with underscores: quantized_bias")
    options = parser.parse_args(arguments)
    if not re.fullmatch(r"QC[1-7](\d\d|xx)", options.id):
        parser.error(f"{options.id!r} is not an id: write QC518, or QC5xx for the next free number")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", options.name):
        parser.error(f"{options.name!r} is not a name: use lower case letters and underscores")
    rule_id = options.id if options.id[3] != "x" else next_free(options.id[2])
    if list((ROOT / "verifier" / "rules").glob(f"qc?xx/{rule_id.lower()}_*.py")):
        parser.error(f"{rule_id} exists already")
    for file in write_stubs(rule_id, options.name):
        print(file.relative_to(ROOT))
    print("Fill them in (docs/add-a-rule.md), then run python tools/make_docs.py")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
