# SPDX-License-Identifier: Apache-2.0
"""Where the loader of depth load comes from."""

from __future__ import annotations

from importlib import import_module

from verifier.rules.loading import Loader

HOME = "verifier.load.reload"


def loading() -> Loader:
    """Return transformers' loader; the one place below depth load that knows where it is.

    It is found by name: importing it takes torch, transformers and seconds, which no other depth may cost.

    Raises:
        MissingExtra: torch or transformers is not installed.
    """
    found: Loader = import_module(HOME).reload
    return found
