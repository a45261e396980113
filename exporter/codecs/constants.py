# SPDX-License-Identifier: Apache-2.0
"""Numbers of the formats: OCP Microscaling Formats (MX) v1.0, section 5.3; NVFP4 as ModelOpt 0.47
writes it.
"""

from __future__ import annotations

E4M3_MAX = 448.0
"""Largest finite E4M3 (S.1111.110)."""
E4M3_ONE = 0x38
"""1.0 as E4M3."""
E2M1_MAX = 6.0
"""Largest E2M1 (S.11.1)."""
SCALE_FLOOR = 2.0**-9
"""Smallest positive E4M3 (S.0000.001): no block scale of a nonzero tensor goes below it."""
NVFP4_BLOCK = 16
MX_BLOCK = 32
FP8_TILE = 128
E8M0_BIAS = 127
NVFP4_RANGE = E2M1_MAX * E4M3_MAX
"""2688: what amax is divided by to give ``weight_scale_2``."""
HEADROOM = 100
"""Binary exponent that a tensor's scale does not exceed once the values of a block are brought near
1 (`exporter.weights.search.near_one`)."""
CHUNK = 1 << 18
"""Elements per chunk: the temporaries of a chunk fit in the second-level cache (measured for 2^17
to 2^19)."""
