# SPDX-License-Identifier: Apache-2.0
"""Every corruptor. Each rule has one at least; ``selftest`` and the tests prove the rules with
them.
"""

from __future__ import annotations

from verifier.corrupt.configs import CONFIGS
from verifier.corrupt.container import CONTAINER
from verifier.corrupt.contents import CONTENTS
from verifier.corrupt.corruptor import Corruptor
from verifier.corrupt.fused import FUSED
from verifier.corrupt.names import NAMES
from verifier.corrupt.policies import POLICIES
from verifier.corrupt.reload import RELOAD
from verifier.corrupt.scales import SCALES
from verifier.corrupt.values import VALUES

CORRUPTORS: tuple[Corruptor, ...] = tuple(
    sorted(
        (*CONTAINER, *NAMES, *SCALES, *CONFIGS, *VALUES, *POLICIES, *CONTENTS, *FUSED, *RELOAD),
        key=lambda c: c.rule,
    )
)
