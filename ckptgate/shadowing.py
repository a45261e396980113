# SPDX-License-Identifier: Apache-2.0
"""Detect another ``verifier`` or ``exporter`` on the module path, which Python would import instead
of ckptgate's.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

PACKAGES = ("verifier", "exporter")


def shadowing_package() -> str:
    """Return one sentence that names the package which shadows one of ckptgate's, or ''."""
    parent = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    for name in PACKAGES:
        expected = os.path.join(parent, name, "__init__.py")
        actual = _location(name)
        if os.path.realpath(actual) != expected:
            return (
                f"{actual or 'nothing'} is imported as '{name}' instead of {expected}; "
                f"rename it, or remove its directory from PYTHONPATH"
            )
    return ""


def _location(name: str) -> str:
    """Return the file that ``import name`` runs, or its directory; '' if there is none."""
    try:
        spec = find_spec(name)
    except ValueError:  # a module put into sys.modules by hand, without a __spec__
        return f"a module '{name}' without a file"
    if spec is None:
        return ""
    return spec.origin or next(iter(spec.submodule_search_locations or ()), "")
