# SPDX-License-Identifier: Apache-2.0
"""What each algorithm puts on disk, roles, fused groups, and the dialects of configs and
exclusions.
"""

from verifier.schemes.declarations import (
    declared_formats,
    fitting,
    format_of,
    inline_declaration,
    parse,
    read_declarations,
)
from verifier.schemes.declared import (
    Declaration,
    Declarations,
    DeclaredFormat,
    Entry,
    Group,
    Scheme,
    classes_of,
    required_siblings,
)
from verifier.schemes.dialects.common import CLASS_NAME
from verifier.schemes.dialects.compressed_tensors import ROUTERS_BY_CONFIG
from verifier.schemes.engines import (
    ENGINE_NAMES,
    ENGINE_VERSIONS,
    ENGINES,
    READS,
    Engine,
    Reads,
    reading,
    refusal,
)
from verifier.schemes.exclusions import READERS, Exclusions, Reader
from verifier.schemes.formats import (
    FORMAT_OF_ALGO,
    FORMATS,
    KNOWN_ALGOS,
    Format,
    Role,
    Sibling,
    fusable,
    runtime_layout,
    same_layout,
    symmetric_zero,
)
from verifier.schemes.groups import PACKED, Fusion, engine_groups, fused_groups, packed_name
from verifier.schemes.modules import (
    CACHE_LEAVES,
    KV_LEAVES,
    SCALE_LEAVES,
    SIBLING_LEAVES,
    Module,
    Signature,
    canonical,
    gather,
    split,
)
from verifier.schemes.patterns import Names
from verifier.schemes.recognition import FLOATS
from verifier.schemes.roles import ROLES, ExpertKey, collapse, expert_key, layer_of, role
from verifier.schemes.scale_values import (
    SCALE_BITS,
    ScaleBits,
    ScaleFlaws,
    pattern_value,
    scale_flaws,
)

__all__ = [
    "CACHE_LEAVES",
    "CLASS_NAME",
    "ENGINES",
    "ENGINE_NAMES",
    "ENGINE_VERSIONS",
    "FLOATS",
    "FORMATS",
    "FORMAT_OF_ALGO",
    "KNOWN_ALGOS",
    "KV_LEAVES",
    "PACKED",
    "READERS",
    "READS",
    "ROLES",
    "ROUTERS_BY_CONFIG",
    "SCALE_BITS",
    "SCALE_LEAVES",
    "SIBLING_LEAVES",
    "Declaration",
    "Declarations",
    "DeclaredFormat",
    "Engine",
    "Entry",
    "Exclusions",
    "ExpertKey",
    "Format",
    "Fusion",
    "Group",
    "Module",
    "Names",
    "Reader",
    "Reads",
    "Role",
    "ScaleBits",
    "ScaleFlaws",
    "Scheme",
    "Sibling",
    "Signature",
    "canonical",
    "classes_of",
    "collapse",
    "declared_formats",
    "engine_groups",
    "expert_key",
    "fitting",
    "format_of",
    "fusable",
    "fused_groups",
    "gather",
    "inline_declaration",
    "layer_of",
    "packed_name",
    "parse",
    "pattern_value",
    "read_declarations",
    "reading",
    "refusal",
    "required_siblings",
    "role",
    "runtime_layout",
    "same_layout",
    "scale_flaws",
    "split",
    "symmetric_zero",
]
