# SPDX-License-Identifier: Apache-2.0
"""The loader of depth load and the scorer of depth eval, found by name: importing them takes torch,
transformers and seconds, which no other depth may cost.
"""

from __future__ import annotations

from importlib import import_module

from verifier.evaluation import Evaluate
from verifier.rules.loading import Loader

LOADER = "verifier.load.reload"
SCORER = "verifier.gate.as_depth"


def default_loader() -> Loader:
    """Return transformers' loader.

    Raises:
        MissingExtra: torch or transformers is not installed.
    """
    loader: Loader = import_module(LOADER).reload
    return loader


def default_evaluate() -> Evaluate:
    """Return the gate's scorer with its defaults; where its extra is missing, it raises
    `MissingExtra` when it is called.
    """
    evaluate: Evaluate = import_module(SCORER).evaluator()
    return evaluate
