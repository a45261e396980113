# SPDX-License-Identifier: Apache-2.0
"""Which classes of the installed transformers hold fused experts, read from its source: nothing is
imported.

A class counts that is decorated with ``use_experts_implementation``, or that is called experts and
makes a parameter with three axes; so does each that the zoo knows to be without either.
"""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

DECORATOR = "use_experts_implementation"
PLAIN = ("DbrxExpertGLU", "JetMoeParallelExperts", "InklingSharedExperts")
"""Without the decorator; the first keeps its experts in two-dimensional stacks."""


def expert_classes(root: Path | None = None) -> dict[str, str]:
    """Return the family folder of each class with fused experts.

    Args:
        root: a folder of model folders; by default that of the installed transformers.
    """
    found: dict[str, str] = {}
    for file in sorted((root or _models()).glob("*/modeling_*.py")):
        text = file.read_text(encoding="utf-8")
        if "xpert" not in text:
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef) and _holds(node):
                found[node.name] = file.parent.name
    return found


def _models() -> Path:
    spec = importlib.util.find_spec("transformers")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / "models"


def _holds(node: ast.ClassDef) -> bool:
    names = {n.id for d in node.decorator_list for n in ast.walk(d) if isinstance(n, ast.Name)}
    names |= {
        n.attr for d in node.decorator_list for n in ast.walk(d) if isinstance(n, ast.Attribute)
    }
    return (
        DECORATOR in names
        or node.name in PLAIN
        or ("Experts" in node.name and any(map(_stack, ast.walk(node))))
    )


def _stack(node: ast.AST) -> bool:
    """Whether a call makes a tensor of three axes for a parameter: ``nn.Parameter(torch.empty(a, b,
    c))``.
    """
    if not (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "Parameter"
    ):
        return False
    made = node.args[0] if node.args else None
    if not (
        isinstance(made, ast.Call)
        and isinstance(made.func, ast.Attribute)
        and made.func.attr in MAKERS
    ):
        return False
    first = made.args[0] if len(made.args) == 1 else None
    return len(first.elts if isinstance(first, ast.Tuple | ast.List) else made.args) == 3


MAKERS = ("empty", "zeros", "ones", "randn", "rand")
