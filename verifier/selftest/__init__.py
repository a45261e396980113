# SPDX-License-Identifier: Apache-2.0
"""Defects on purpose: one corruptor or more for each rule, by hand on the bytes, with nothing of
the rules' code.
"""

from verifier.selftest.corruptor import Corruptor, kind_of, traits_of
from verifier.selftest.edit import Folder, Place
from verifier.selftest.table import CORRUPTORS

__all__ = ["CORRUPTORS", "Corruptor", "Folder", "Place", "kind_of", "traits_of"]
