# SPDX-License-Identifier: Apache-2.0
"""Source, header, index and configs of a checkpoint. Hostile input ends here."""

from verifier.checkpoint.download import local_directory
from verifier.checkpoint.header import DTYPE_BITS, MAX_HEADER, Problem, Shard, Tensor, strict_json
from verifier.checkpoint.index import INDEX, Index
from verifier.checkpoint.kinds import require_checkpoint
from verifier.checkpoint.model import NUMPY_DTYPES, Checkpoint, open_checkpoint, special_floats
from verifier.checkpoint.opening import open_source
from verifier.checkpoint.source import Bytes, Source

__all__ = [
    "DTYPE_BITS",
    "INDEX",
    "MAX_HEADER",
    "NUMPY_DTYPES",
    "Bytes",
    "Checkpoint",
    "Index",
    "Problem",
    "Shard",
    "Source",
    "Tensor",
    "local_directory",
    "open_checkpoint",
    "open_source",
    "require_checkpoint",
    "special_floats",
    "strict_json",
]
