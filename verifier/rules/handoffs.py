# SPDX-License-Identifier: Apache-2.0
"""Which rule reports a case that another rule skips.

One defect is reported by one rule, so a rule may skip a tensor for a cause that another rule
reports. Each such cause is listed here, and a test makes it and looks for the finding of the other
rule at that tensor: a skipped comparison is never a gap between two rules.
"""

from __future__ import annotations

from typing import NamedTuple


class Handoff(NamedTuple):
    """A cause for which a rule skips what it would compare, and the rules of which one reports it.

    ``rule`` is ``reconstruction`` for what QC507, QC509 to QC512, QC515 and QC517 share.
    """

    rule: str
    cause: str
    reporters: tuple[str, ...]


RECONSTRUCTION = "reconstruction"
HANDOFFS = (
    Handoff("QC102", "a shard is missing", ("QC101",)),
    Handoff("QC102", "a header cannot be read", ("QC104",)),
    Handoff("QC107", "a header cannot be read", ("QC104",)),
    Handoff("QC109", "a header cannot be read", ("QC104",)),
    Handoff("QC301", "no module of the format has the scale", ("QC303",)),
    Handoff("QC302", "the missing scale is one of activations", ("QC301",)),
    Handoff("QC306", "scales follow a wrong declared group size", ("QC308",)),
    Handoff("QC306", "the scale is padded or swizzled", ("QC307",)),
    Handoff("QC401", "quantized_layers has no entry for the module", ("QC410",)),
    Handoff("QC402", "the layer belongs to an MTP head", ("QC403",)),
    Handoff("QC403", "a fused group of the MTP head has two formats", ("QC409",)),
    Handoff("QC404", "the exclusion has the name of a wrapper module", ("QC209",)),
    Handoff("QC405", "no engine excludes the layer", ("QC402",)),
    Handoff("QC405", "no engine excludes the layer of the MTP head", ("QC403",)),
    Handoff("QC408", "a packed format is declared for other weights", ("QC305",)),
    Handoff("QC408", "scales are next to a plain weight", ("QC313",)),
    Handoff("QC408", "quantized_layers has a different format", ("QC410",)),
    Handoff("QC409", "a packed format is declared for other weights", ("QC305",)),
    Handoff("QC409", "the declared format is not that of the tensors", ("QC408",)),
    Handoff("QC409", "quantized_layers has a different format", ("QC410",)),
    Handoff("QC411", "a list of the declaration has the wrong type", ("QC407",)),
    Handoff("QC504", "weight_scale_2 is not F32", ("QC315",)),
    Handoff("QC504", "weight_scale_2 is empty", ("QC306",)),
    Handoff("QC505", "the global scale is not a scalar", ("QC306",)),
    Handoff("QC505", "global scales have two dtypes", ("QC315",)),
    Handoff("QC506", "input_scale is zero", ("QC503",)),
    Handoff("QC506", "input_scale is not a scalar", ("QC306",)),
    Handoff("QC507", "the experts are zero", ("QC501", "QC502")),
    Handoff("QC509", "no scale of activations is finite and positive", ("QC503",)),
    Handoff("QC509", "the weight scale is NaN", ("QC502",)),
    Handoff("QC518", "the tensor has the wrong shape", ("QC306",)),
    Handoff("QC604", "formats differ in a fused group", ("QC409",)),
    Handoff("QC604", "experts are missing from a known layout", ("QC207",)),
    Handoff("QC604", "experts of an MTP layer differ in format", ("QC403",)),
    Handoff("QC604", "an expert is not quantized as declared", ("QC402",)),
    Handoff("QC604", "an expert is in a different format than declared", ("QC408",)),
    Handoff("QC604", "quantized_layers has a different format", ("QC410",)),
    Handoff("QC604", "a part has a different shape than a known layout", ("QC208",)),
    Handoff("QC604", "a part has no input_scale", ("QC301",)),
    Handoff("QC604", "a part has no weight scale", ("QC302",)),
    Handoff("QC604", "an expert has no pre_quant_scale", ("QC314",)),
    Handoff("QC604", "a weight scale has the wrong dtype", ("QC304",)),
    Handoff("QC604", "a scalar has the wrong dtype", ("QC315",)),
    Handoff("QC604", "a plain weight has a different dtype than the base", ("QC516",)),
    Handoff("QC604", "a scale does not fit its weight", ("QC306",)),
    Handoff("QC604", "scalars are 0-d and [1]", ("QC311",)),
    Handoff("QC604", "shards of tensor parallelism split a tile", ("QC309",)),
    Handoff(RECONSTRUCTION, "a scale is missing", ("QC302",)),
    Handoff(RECONSTRUCTION, "a scale does not fit its weight", ("QC306",)),
    Handoff(RECONSTRUCTION, "the weight has a different shape than the base", ("QC208",)),
    Handoff(RECONSTRUCTION, "a group index is out of range", ("QC518",)),
    Handoff(RECONSTRUCTION, "a scale is NaN", ("QC502",)),
    Handoff(RECONSTRUCTION, "a scale is negative", ("QC502",)),
    Handoff(RECONSTRUCTION, "E8M0 scales are zero", ("QC512",)),
)
