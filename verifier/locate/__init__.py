# SPDX-License-Identifier: Apache-2.0
"""Which layer and module of a candidate explain its divergence from the base. Needs the extra
``gate``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from verifier.locate.options import LocateOptions
    from verifier.locate.result import LocateResult
    from verifier.locate.run import locate

__all__ = ["LocateOptions", "LocateResult", "locate"]
_HOME = {"LocateOptions": "options", "LocateResult": "result", "locate": "run"}


def __getattr__(name: str) -> Any:
    # torch costs seconds, and the command line imports this package for its help.
    import importlib  # noqa: PLC0415

    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
