# SPDX-License-Identifier: Apache-2.0
"""``python -m tests.engines``: our exports, broken checkpoints and reported ones in vLLM's own
loader on a CPU, and our declarations in SGLang's; ``--write`` writes results.json and
docs/engines.md.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from tests.engines import page
from tests.engines.environment import default_version, interpreter, sglang_interpreter
from tests.engines.loads import SECTIONS, Engine, Row
from tests.engines.matching import sglang
from tests.engines.scores import RECIPES, refused_speculation, scores
from verifier.engines.loader import VllmLoader, VllmSession

SCORES = "scores"
DOCUMENTS = 8


def main(argv: list[str]) -> int:
    """Run the sections; 1 if `check` passes an export that fails in the engine."""
    parser = argparse.ArgumentParser(prog="python -m tests.engines", description=__doc__)
    parser.add_argument(
        "sections", nargs="*", metavar="SECTION", help=", ".join((*SECTIONS, page.SGLANG, SCORES))
    )
    parser.add_argument("--vllm", default=default_version(), help="the version to install")
    parser.add_argument("--home", type=Path, default=Path(".tox/engines"), help="where")
    parser.add_argument("--write", action="store_true", help="write results.json and the page")
    options = parser.parse_args(argv)
    python = interpreter(options.vllm, options.home)
    results = page.read()
    with closing(VllmSession(VllmLoader(python))) as session:
        results["engine"] = session.engine.partition(" (")[0]
        engine = Engine(session)
        for name in [s for s in SECTIONS if s in (options.sections or SECTIONS)]:
            results[name] = _run(name, partial(SECTIONS[name], engine))
            if options.write:
                page.write(results)
    if not options.sections or page.SGLANG in options.sections:
        python_of_sglang = sglang_interpreter(options.home)
        results[page.SGLANG] = _run(page.SGLANG, partial(sglang, python_of_sglang))
        if options.write:
            page.write(results)
    if not options.sections or SCORES in options.sections:
        results[SCORES] = [_scored(python, recipe) for recipe in RECIPES]
        with tempfile.TemporaryDirectory(prefix="ckptgate-engines-") as home:
            results["speculation"] = refused_speculation(python, Path(home))
        if options.write:
            page.write(results)
    wrong = page.violations(results)
    for row in wrong:
        print(f"passes check and fails in an engine: {row.name} {row.recipe}: {row.why}")
    return bool(wrong)


def _scored(python: str, recipe: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="ckptgate-engines-") as home:
        return scores(python, recipe, Path(home), DOCUMENTS)


def _run(name: str, section: Callable[[Path], Iterator[Row]]) -> list[Row]:
    started, rows = time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="ckptgate-engines-") as home:
        for row in section(Path(home)):
            rows.append(row)
            print(
                f"{name}: {row.name} {row.recipe}: {row.check} / {row.engine} {row.why}", flush=True
            )
    print(f"{name}: {len(rows)} rows in {time.monotonic() - started:.0f} s", flush=True)
    return rows


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
