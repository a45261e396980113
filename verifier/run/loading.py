# SPDX-License-Identifier: Apache-2.0
"""Where the loader of depth load and the scorer of depth eval come from."""

from __future__ import annotations

from importlib import import_module

from verifier.evaluation import Evaluate
from verifier.rules.loading import Loader

HOME = "verifier.load.reload"
SCORING = "verifier.gate.as_depth"


def loading() -> Loader:
    """Return transformers' loader; the one place below depth load that knows where it is.

    It is found by name: importing it takes torch, transformers and seconds, which no other depth
    may cost.

    Raises:
        MissingExtra: torch or transformers is not installed.
    """
    found: Loader = import_module(HOME).reload
    return found


def scoring() -> Evaluate:
    """Return what scores text at depth eval with its defaults, found by name as the loader is.

    Raises:
        MissingExtra: what the gate needs is not installed, which it says when it is called.
    """
    found: Evaluate = import_module(SCORING).evaluator()
    return found
