# SPDX-License-Identifier: Apache-2.0
"""Proof of the rules where they are installed: tiny valid checkpoints, and known defects made in
them byte by byte, without any code of the rules.
"""

from verifier.selftest.corruptor import Corruptor, kind_of, traits_of
from verifier.selftest.defects import CORRUPTORS
from verifier.selftest.editor import CheckpointEditor

__all__ = ["CORRUPTORS", "CheckpointEditor", "Corruptor", "kind_of", "traits_of"]
