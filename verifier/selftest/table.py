# SPDX-License-Identifier: Apache-2.0
"""Every corruptor. Each rule has one at least; ``selftest`` and the tests prove the rules with
them.
"""

from __future__ import annotations

from verifier.selftest.configs import CONFIGS
from verifier.selftest.container import CONTAINER
from verifier.selftest.contents import CONTENTS
from verifier.selftest.corruptor import Corruptor
from verifier.selftest.fused import FUSED
from verifier.selftest.names import NAMES
from verifier.selftest.policies import POLICIES
from verifier.selftest.reload import RELOAD
from verifier.selftest.scales import SCALES
from verifier.selftest.values import VALUES

CORRUPTORS: tuple[Corruptor, ...] = tuple(
    sorted(
        (*CONTAINER, *NAMES, *SCALES, *CONFIGS, *VALUES, *POLICIES, *CONTENTS, *FUSED, *RELOAD),
        key=lambda c: c.rule,
    )
)
