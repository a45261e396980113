# SPDX-License-Identifier: Apache-2.0
"""What each algorithm puts on disk, roles, fused groups, and the dialects of configs and
exclusions.
"""

from verifier.schemes.declarations import (
    Cover,
    Declaration,
    Declarations,
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
    Look,
    Module,
    canonical,
    gather,
    split,
)
from verifier.schemes.roles import ROLES, ExpertKey, collapse, expert_key, layer_of, role
from verifier.schemes.stacks import (
    STACKINGS,
    Unstacked,
    expanded,
    place_in_file,
    restacked,
    split_shapes,
    stacking_of,
    unstacked,
)

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
    "STACKINGS",
    "Cover",
    "Declaration",
    "Declarations",
    "Entry",
    "Exclusions",
    "ExpertKey",
    "Format",
    "Look",
    "Module",
    "Reader",
    "Sibling",
    "Unstacked",
    "canonical",
    "collapse",
    "expanded",
    "expert_key",
    "fitting",
    "format_of",
    "fused_groups",
    "gather",
    "layer_of",
    "packed_name",
    "parse",
    "place_in_file",
    "read_declarations",
    "restacked",
    "role",
    "runtime_layout",
    "same_layout",
    "split",
    "split_shapes",
    "stacking_of",
    "unstacked",
]
