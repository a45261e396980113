# SPDX-License-Identifier: Apache-2.0
"""The loaders of depths load and engine and the scorer of depth eval, found by name: importing them
takes torch, transformers and seconds, which no other depth may cost.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from verifier.evaluation import Evaluate
from verifier.run.options import EngineOptions

if TYPE_CHECKING:
    from verifier.rules.engine_loading import EngineLoader
    from verifier.rules.loading import Loader

LOADER = "verifier.load.reload"
ENGINE_LOADER = "verifier.engines.loader"
SCORER = "verifier.gate.as_depth"


def default_loader() -> Loader:
    """Return transformers' loader.

    Raises:
        MissingExtra: torch or transformers is not installed.
    """
    loader: Loader = import_module(LOADER).reload
    return loader


def engine_loader(options: EngineOptions) -> EngineLoader:
    """Return the loader of an engine."""
    loader: EngineLoader = import_module(ENGINE_LOADER).VllmLoader(
        options.python, options.layers, options.timeout
    )
    return loader


def default_evaluate() -> Evaluate:
    """Return the gate's scorer with its defaults; where its extra is missing, it raises
    `MissingExtra` when it is called.
    """
    evaluate: Evaluate = import_module(SCORER).evaluator()
    return evaluate
