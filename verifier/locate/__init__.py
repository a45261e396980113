# SPDX-License-Identifier: Apache-2.0
"""Which layer and module of a candidate explain its divergence from the base. Needs the extra
``gate``.
"""

from verifier.locate.locate import locate
from verifier.locate.options import LocateOptions
from verifier.locate.result import LocateResult

__all__ = ["LocateOptions", "LocateResult", "locate"]
