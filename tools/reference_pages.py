# SPDX-License-Identifier: Apache-2.0
"""The reference of the command line and of the Python API, for `tools/make_docs.py`.

Commands are read from click, the API from source files: nothing that they need is imported.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click

import exporter
import verifier
from verifier.cli import cli
from verifier.cli.main import SECTIONS
from verifier.cli.terminal import TERMINAL_OPTIONS

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "command-line.md"
MARK = ("<!-- commands: rendered by tools/make_docs.py -->", "<!-- end of commands -->")
MODULES = {
    "gate": "verifier.gate",
    "codecs": "exporter.codecs",
    "adapters": "exporter.adapters",
}
"""Public modules, by their name in `ckptgate`."""
Definition = ast.FunctionDef | ast.ClassDef


# --- commands


def command_line_page() -> str:
    """Return docs/command-line.md with the reference of all commands."""
    start, end = MARK
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(start)
    lines: list[str] = []
    for section, commands in SECTIONS.items():
        lines += [f"### {section}", ""]
        for name in commands:
            command = cli.get_command(click.Context(cli), name)
            if command is not None:
                lines += _command(command, f"ckptgate {name}", 4)
    body = "\n".join(lines)
    return f"{before}{start}\n\n{body}\n{end}{rest.partition(end)[2]}"


def _command(command: click.Command, path: str, level: int) -> Iterator[str]:
    context = click.Context(command, info_name=path)
    usage = " ".join([path, *command.collect_usage_pieces(context)])
    yield from (f"{'#' * level} {path}", "", f"`{usage}`", "")
    yield from (_unwrapped(command.help or ""), "")
    common = {name for option in TERMINAL_OPTIONS for name in option.opts}
    options = [p for p in command.params if isinstance(p, click.Option)]
    records = [o.get_help_record(context) for o in options if not common & set(o.opts)]
    rows = [_row(*record) for record in records if record is not None]
    if rows:
        yield from ("| option | |", "| --- | --- |", *rows, "")
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            sub = command.get_command(context, name)
            if sub is not None and not sub.hidden:
                yield from _command(sub, f"{path} {name}", level + 1)


def _row(names: str, text: str) -> str:
    text = re.sub(r"\s*\[([^\[\]]*)\](?:\s*\[([^\[\]]*)\])?$", _defaults, text)
    names = names.replace("INTEGER RANGE", "N").replace("INTEGER", "N")
    return f"| `{_cell(names)}` | {_cell(text)} |"


def _defaults(brackets: re.Match[str]) -> str:
    return f" *({'; '.join(filter(None, brackets.groups()))})*"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _unwrapped(text: str) -> str:
    paragraphs = re.split(r"\n\s*\n", inspect.cleandoc(text).replace("\b", ""))
    return "\n\n".join(" ".join(p.split()) for p in paragraphs)


# --- Python


class Documented(NamedTuple):
    """A public name, where it is defined, and its definition."""

    name: str
    node: Definition


def python_page() -> str:
    """Return docs/python.md."""
    lines = [
        "# Python API",
        "",
        "Rendered from the docstrings by `tools/make_docs.py`. `import ckptgate` is light: numpy, "
        "torch and transformers are imported on",
        "first use of a name that needs them. Every error is a `ckptgate.CkptgateError` with the "
        "exit code of the command line",
        "([exit codes](exit-codes.md)); functions print nothing.",
        "",
        "```python",
        "import ckptgate",
        "",
        'report = ckptgate.check("OUT", base="BF16", depth="payload")',
        "print(report.verdict, [finding.rule for finding in report.findings])",
        "```",
    ]
    for title, package in (("Check", verifier), ("Make", exporter)):
        lines += ["", f"## {title}"]
        for name in package.__all__:
            home = package._HOME.get(name)
            if home is not None:
                lines += _documented(Documented(f"ckptgate.{name}", _definition(home, name)))
    for name, module in MODULES.items():
        tree = _parsed(module)
        lines += ["", f"## ckptgate.{name}", "", _markup(ast.get_docstring(tree) or "")]
        for public in _public(tree):
            node = _definition(module, public, required=False)
            if node is not None:
                lines += _documented(Documented(f"ckptgate.{name}.{public}", node))
    return "\n".join(lines) + "\n"


def _parsed(module: str) -> ast.Module:
    path = ROOT / module.replace(".", "/")
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(file.read_text(encoding="utf-8"))


def _public(tree: ast.Module) -> list[str]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    return []


def _definition(module: str, name: str, *, required: bool = True) -> Any:
    """Return the function or class that a module defines or imports under a name."""
    for node in _parsed(module).body:
        if isinstance(node, Definition) and node.name == name:
            return node
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return _definition(node.module, alias.name, required=required)
    if required:
        raise LookupError(f"{module}.{name}")
    return None


def _documented(it: Documented) -> Iterator[str]:
    yield from ("", f"### {it.name}", "")
    if isinstance(it.node, ast.FunctionDef):
        yield from ("```python", _signature(it.name, it.node), "```", "")
    yield _markup(ast.get_docstring(it.node) or "")
    if isinstance(it.node, ast.ClassDef):
        members = list(_members(it.node))
        if members:
            yield from ("", "| | |", "| --- | --- |", *members)


def _members(node: ast.ClassDef) -> Iterator[str]:
    """Yield a row for each public field that the docstring does not list, and each method."""
    listed = "Attributes:" in (ast.get_docstring(node) or "")
    for child in node.body:
        if isinstance(child, ast.AnnAssign) and not listed:
            field = ast.unparse(child.target)
            if not field.startswith("_"):
                yield f"| `{field}` | `{_cell(ast.unparse(child.annotation))}` |"
        if isinstance(child, ast.FunctionDef) and not child.name.startswith("_"):
            if not _is_deprecated(child):
                yield _member(child)


def _is_deprecated(node: ast.FunctionDef) -> bool:
    return "DeprecationWarning" in ast.unparse(node)


def _member(node: ast.FunctionDef) -> str:
    is_property = any(ast.unparse(d).endswith("property") for d in node.decorator_list)
    name = node.name if is_property else f"{node.name}()"
    summary = (ast.get_docstring(node) or "").partition("\n\n")[0]
    return f"| `{name}` | {_cell(_markup(summary))} |"


def _signature(name: str, node: ast.FunctionDef) -> str:
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    whole = f"{name}({ast.unparse(node.args)}){returns}"
    if len(whole) <= 88:
        return whole
    arguments = _arguments(node.args)
    return "\n".join([f"{name}(", *(f"    {a}," for a in arguments), f"){returns}"])


def _arguments(args: ast.arguments) -> list[str]:
    positional = [*args.posonlyargs, *args.args]
    defaults: list[ast.expr | None] = [None] * (len(positional) - len(args.defaults))
    result = [_argument(a, d) for a, d in zip(positional, [*defaults, *args.defaults], strict=True)]
    if args.vararg:
        result.append(f"*{ast.unparse(args.vararg)}")
    elif args.kwonlyargs:
        result.append("*")
    result += [_argument(a, d) for a, d in zip(args.kwonlyargs, args.kw_defaults, strict=True)]
    return result + ([f"**{ast.unparse(args.kwarg)}"] if args.kwarg else [])


def _argument(arg: ast.arg, default: ast.expr | None) -> str:
    return ast.unparse(arg) + (f" = {ast.unparse(default)}" if default is not None else "")


def _markup(docstring: str) -> str:
    """Return a docstring as Markdown: sections as lists, double backticks as single ones."""
    lines: list[str] = []
    for block in docstring.replace("``", "`").split("\n\n"):
        head, _, rest = block.partition("\n")
        if head not in ("Args:", "Attributes:", "Raises:", "Returns:", "Yields:"):
            lines += ["" if lines else None, " ".join(block.split())]  # type: ignore[list-item]
            continue
        lines += ["", f"**{head.replace('Args', 'Arguments')[:-1]}**", ""]
        for entry in re.findall(r"^    (\S.*(?:\n {5,}.*)*)", rest, re.M):
            name, _, text = " ".join(entry.split()).partition(": ")
            lines.append(f"* `{name}`: {text}" if text else f"* {name}")
    return "\n".join(line for line in lines if line is not None)
