# SPDX-License-Identifier: Apache-2.0
"""The optional dependencies of calibration; imported first, so that their absence has one
message.
"""

from __future__ import annotations

from verifier.errors import MissingExtra

try:
    import torch
    import transformers
except ImportError as error:  # pragma: no cover - installed wherever coverage is measured
    raise MissingExtra("calibration", "load") from error

VERSIONS = {"torch": torch.__version__.partition("+")[0], "transformers": transformers.__version__}
