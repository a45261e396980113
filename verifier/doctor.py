# SPDX-License-Identifier: Apache-2.0
"""The environment: what is installed, what it enables, and whether the core works."""

from __future__ import annotations

import importlib
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from typing import Any, Literal

from verifier import __version__
from verifier.text import counted, size

State = Literal["ok", "missing", "broken", "info"]
CORE = (
    "numpy",
    "ml_dtypes",
    "click",
    "rich",
    "pydantic",
    "PyYAML",
    "safetensors",
)
EXTRAS: dict[str, tuple[tuple[str, ...], str]] = {
    "load": (("torch", "transformers"), "check --depth load, calibrate"),
    "export": (("torch",), "export, merge"),
    "fast": (("torch", "numba"), "compiled CPU codecs"),
    "gate": (
        ("torch", "transformers", "scipy", "tokenizers", "lm-eval", "accelerate", "datasets"),
        "gate",
    ),
    "hub": (("huggingface_hub", "httpx2"), "hf:// and https:// addresses"),
    "s3": (("s3fs",), "s3:// addresses"),
    "gs": (("gcsfs",), "gs:// addresses"),
    "ray": (("ray",), "--ray: work on the nodes of a cluster"),
    "report": (("jinja2", "junitparser"), "HTML and JUnit reports"),
}
"""Every extra of pyproject.toml: its packages and what they enable."""
MODULES = {"PyYAML": "yaml", "lm-eval": "lm_eval"}
FP8, FP4 = (8, 9), (10, 0)
"""The lowest CUDA compute capabilities with FP8 and FP4 matrix units."""


@dataclass(frozen=True, slots=True)
class Item:
    """One line: section, name, value, and whether it works."""

    section: str
    name: str
    value: str
    state: State = "info"


def examine() -> list[Item]:
    """Return the environment, section by section. Only an empty temporary file is written, and
    deleted at once.

    A missing or broken item in the section ``core`` means that `ckptgate` does not work here.
    """
    items: list[Item] = []
    for part in (_machine, _core, _extras, _cuda, _space, _plugins):
        items += part()
    return items


def core_broken(items: list[Item]) -> bool:
    """Whether a part of the core is missing or computes wrong values."""
    return any(i.section == "core" and i.state in ("missing", "broken") for i in items)


def _machine() -> Iterator[Item]:
    yield Item("machine", "ckptgate", f"{__version__} in {os.path.dirname(__file__)}")
    yield Item("machine", "python", f"{platform.python_version()} ({sys.executable})")
    yield Item("machine", "platform", f"{platform.platform()}, {counted(_cpus(), 'CPU')}")
    if sys.byteorder != "little":
        yield Item(
            "core",
            "byte order",
            "big-endian; checkpoints are read on little-endian machines only",
            "broken",
        )


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _core() -> Iterator[Item]:
    minimum = _minimum_versions()
    for name in CORE:
        yield _package("core", name, minimum.get(_normalized(name), ""), imported=True)
    yield _tried("core", "decoding", _decodes)
    yield _tried("core", "rules", _rules)


def _normalized(name: str) -> str:
    return name.lower().replace("_", "-")


def _package(section: str, name: str, minimum: str, *, imported: bool) -> Item:
    """Return a package's version; with ``imported``, import it as well."""
    module = MODULES.get(name, name)
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        version = ""
    if find_spec(module) is None:
        return Item(section, name, "not installed", "missing")
    if imported:
        try:
            importlib.import_module(module)
        except Exception as error:  # noqa: BLE001  (an import may raise anything)
            return Item(section, name, f"{version}: import failed: {_message(error)}", "broken")
    if minimum and version and _numbers(version) < _numbers(minimum):
        return Item(section, name, f"{version}; {minimum} or later is required", "broken")
    return Item(section, name, version or "unknown version", "ok")


def _tried(section: str, name: str, test: Callable[[], str]) -> Item:
    try:
        return Item(section, name, test(), "ok")
    except Exception as error:  # noqa: BLE001  (any failure is the result)
        return Item(section, name, _message(error), "broken")


def _decodes() -> str:
    """Decode one code of each table and compare with the value in the OCP MX specification v1.0,
    section 5.3.
    """
    from verifier import decoding  # noqa: PLC0415  (numpy may be what is broken)

    tables = (
        ("E4M3", decoding.e4m3_table(), 0x7E, 448.0),
        ("E8M0", decoding.e8m0_table(), 0x80, 2.0),
        ("E2M1", decoding.e2m1_table(), 0xF, -6.0),
    )
    for name, table, code, value in tables:
        if float(table[code]) != value:
            raise ArithmeticError(
                f"{name} 0x{code:02X} decodes to {float(table[code])}, not {value}"
            )
    return "E4M3, E8M0 and E2M1 decode as specified"


def _rules() -> str:
    from verifier.rules.registry import built_in_rules  # noqa: PLC0415  (as above)

    return f"{len(built_in_rules())} rules"


def _custom_rules() -> str:
    from verifier.rules import all_rules  # noqa: PLC0415  (as above)

    return ", ".join(f"{r.id} from {r.origin}" for r in all_rules().values() if r.origin)


def _extras() -> Iterator[Item]:
    minimum = _minimum_versions()
    for extra, (names, enables) in EXTRAS.items():
        items = [
            _package("extras", name, minimum.get(_normalized(name), ""), imported=False)
            for name in names
        ]
        missing = [
            f"{i.name} {i.value}" if i.state == "broken" else i.name
            for i in items
            if i.state != "ok"
        ]
        if missing:
            install = f"pip install 'ckptgate[{extra}]' enables {enables}"
            yield Item("extras", extra, f"missing: {', '.join(missing)}; {install}", "missing")
        else:
            versions = ", ".join(f"{i.name} {i.value}" for i in items)
            yield Item("extras", extra, f"{enables}: {versions}", "ok")


def _minimum_versions() -> dict[str, str]:
    """Return the lowest version of each requirement in ckptgate's metadata; empty if ckptgate is
    not installed.
    """
    try:
        stated = metadata.requires("ckptgate") or []
    except metadata.PackageNotFoundError:
        return {}
    minimum: dict[str, str] = {}
    for text in stated:
        match = re.match(r"([A-Za-z0-9._-]+)\s*(?:\[[^]]*\])?\s*>=\s*([0-9.]+)", text)
        if match:
            minimum.setdefault(match[1].lower().replace("_", "-"), match[2])
    return minimum


def _numbers(version: str) -> tuple[int, ...]:
    """Return the leading numbers of a version, without trailing zeros."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    numbers = [int(n) for n in match[0].split(".")] if match else []
    while numbers and not numbers[-1]:
        numbers.pop()
    return tuple(numbers)


def _cuda() -> Iterator[Item]:
    if find_spec("torch") is None:
        yield Item(
            "cuda",
            "torch",
            "not installed, so CUDA is unknown; checks do not need it",
            "missing",
        )
        return
    try:
        torch: Any = importlib.import_module("torch")
        available = torch.cuda.is_available()
    except Exception as error:  # noqa: BLE001  (an import may raise anything)
        yield Item("cuda", "torch", f"import failed: {_message(error)}", "broken")
        return
    built = torch.version.cuda
    if not available:
        why = "no device is visible" if built else "built without CUDA"
        value = f"none (torch {torch.__version__}, {why}); checks do not need one"
        yield Item("cuda", "devices", value, "missing")
        return
    for number in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(number)
        capability = (device.major, device.minor)
        native = [n for n, least in (("FP8", FP8), ("FP4", FP4)) if capability >= least]
        value = (
            f"{device.name}, {size(device.total_memory)}, compute {device.major}.{device.minor}, "
            f"CUDA {built}, native {' and '.join(native) or 'neither FP8 nor FP4'}"
        )
        yield Item("cuda", f"cuda:{number}", value, "ok")


def _space() -> Iterator[Item]:
    folder = tempfile.gettempdir()
    try:
        with tempfile.TemporaryFile(dir=folder):
            free = shutil.disk_usage(folder).free
        yield Item("space", "temp", f"{folder}, {size(free)} free", "ok")
    except OSError as error:
        yield Item("space", "temp", f"{folder}: {error.strerror or error}", "broken")
    cache = os.environ.get("HF_HUB_CACHE") or os.path.join(
        os.environ.get("HF_HOME") or os.path.expanduser("~/.cache/huggingface"), "hub"
    )
    offline = (
        ", offline"
        if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
        else ""
    )
    yield Item(
        "space",
        "hub cache",
        f"{cache}{'' if os.path.isdir(cache) else ' (does not exist yet)'}{offline}",
    )


def _plugins() -> Iterator[Item]:
    try:
        version = metadata.version("ckptgate")
    except metadata.PackageNotFoundError:
        yield Item(
            "entry points",
            "ckptgate",
            "not installed as a package: no export commands, no pytest plugin",
            "missing",
        )
        return
    if version != __version__:
        yield Item(
            "entry points",
            "ckptgate",
            f"the installed package is {version}, this code is {__version__}",
            "broken",
        )
    for entry in sorted(metadata.entry_points(group="ckptgate.commands"), key=lambda e: e.name):
        owner = (
            f"{entry.value}, from {entry.dist.name} {entry.dist.version}"
            if entry.dist
            else entry.value
        )
        yield _tried(
            "entry points",
            f"command {entry.name}",
            lambda e=entry, o=owner: (e.load(), o)[1],  # type: ignore[misc]
        )
    if metadata.entry_points(group="ckptgate.rules"):
        yield _tried("entry points", "custom rules", _custom_rules)


def _message(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
