# SPDX-License-Identifier: Apache-2.0
"""What calibration needs beyond the core install; the first import of this room, so that its
absence has one message.
"""

from __future__ import annotations

from verifier.errors import MissingExtra

try:
    import torch
    import transformers
except ImportError as error:  # pragma: no cover - the extra is there wherever coverage is measured
    raise MissingExtra("calibration", "load") from error

VERSIONS = {"torch": torch.__version__.partition("+")[0], "transformers": transformers.__version__}
