# SPDX-License-Identifier: Apache-2.0
"""What each algorithm puts on disk, roles, fused groups, and the dialects of configs and
exclusions.
"""

from verifier.schemes.declarations import (
    Declaration,
    Declarations,
    DeclaredFormat,
    Entry,
    fitting,
    format_of,
    parse,
    read_declarations,
)
from verifier.schemes.exclusions import READERS, Exclusions, Reader
from verifier.schemes.formats import (
    FORMAT_OF_ALGO,
    FORMATS,
    KNOWN_ALGOS,
    Format,
    Sibling,
    runtime_layout,
    same_layout,
)
from verifier.schemes.groups import PACKED, fused_groups, packed_name
from verifier.schemes.modules import (
    FLOATS,
    KV_LEAVES,
    SCALE_LEAVES,
    Module,
    Signature,
    canonical,
    gather,
    split,
)
from verifier.schemes.roles import ROLES, ExpertKey, collapse, expert_key, layer_of, role

__all__ = [
    "FLOATS",
    "FORMATS",
    "FORMAT_OF_ALGO",
    "KNOWN_ALGOS",
    "KV_LEAVES",
    "PACKED",
    "READERS",
    "ROLES",
    "SCALE_LEAVES",
    "Declaration",
    "Declarations",
    "DeclaredFormat",
    "Entry",
    "Exclusions",
    "ExpertKey",
    "Format",
    "Module",
    "Reader",
    "Sibling",
    "Signature",
    "canonical",
    "collapse",
    "expert_key",
    "fitting",
    "format_of",
    "fused_groups",
    "gather",
    "layer_of",
    "packed_name",
    "parse",
    "read_declarations",
    "role",
    "runtime_layout",
    "same_layout",
    "split",
]
