# SPDX-License-Identifier: Apache-2.0
"""Hub names and a training framework's native names, as data: one table per family, no code.

`verifier.layouts.family` defines which tensors a family has; a table only states what the framework
calls them, which of them it stacks, and which further tensors releases may have (MTP heads, which
transformers does not save, so the family data does not list them). ``{n}`` is a layer number,
``{expert}`` the number of an expert.

Source of MINIMAX_M3: NeMo AutoModel, ``MiniMaxM3StateDictAdapter`` and
``MiniMaxM3VLStateDictAdapter``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace


@dataclass(frozen=True, slots=True)
class NativePrefix:
    """A prefix of hub names and its native counterpart.

    ``hub`` may list several spellings, all of which are read; the first is written. In a ``block``
    (a decoder layer), the table's ``inside`` and ``stacks`` apply to the rest of the name;
    elsewhere the rest does not change.
    """

    hub: tuple[str, ...]
    native: str
    block: bool = False


@dataclass(frozen=True, slots=True)
class NativeStack:
    """Projections of all routed experts of a block that the framework keeps as one parameter.

    The projections are joined along their output dimension, in the order of ``hub``; then the
    experts are stacked: [experts, projections * out, in], or with ``transpose`` [experts, in,
    projections * out].
    """

    native: str
    hub: tuple[str, ...]
    transpose: bool


@dataclass(frozen=True, slots=True)
class Mtp:
    """Multi-token-prediction modules: a decoder block each, and the tensors that join it to the
    trunk.

    ``count`` lists config paths; the first that is set has the number of modules. ``extra`` maps
    each further tensor's name to its shape, as products of config paths.
    """

    count: tuple[str, ...]
    place: NativePrefix
    block: str
    extra: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Table:
    """One family's names in one framework.

    ``family`` names the layout of `verifier.layouts.family`. ``nest`` and ``strip`` adapt it to a
    text-only model: its config is the one at the path ``nest`` of the family's config, and hub
    names lose the prefix ``strip``; names without that prefix are not part of it. ``scale`` is the
    leaf of MXFP8 scales, None for the leaf that the declaration's own format uses.
    """

    family: str
    places: tuple[NativePrefix, ...]
    inside: Mapping[str, str] = field(default_factory=dict)
    stacks: tuple[NativeStack, ...] = ()
    mtp: Mtp | None = None
    scale: str | None = None
    nest: str = ""
    strip: str = ""


def _experts(container: str, gate: str, up: str, down: str) -> tuple[NativeStack, ...]:
    """Return the grouped experts of NeMo AutoModel: gate and up joined, the input dimension
    first.
    """
    each = container + ".{expert}."
    return (
        NativeStack(
            "mlp.experts.gate_and_up_projs",
            (f"{each}{gate}.weight", f"{each}{up}.weight"),
            transpose=True,
        ),
        NativeStack("mlp.experts.down_projs", (f"{each}{down}.weight",), transpose=True),
    )


_HIDDEN = "text_config.hidden_size"
_MTP = Mtp(
    count=("text_config.num_mtp_modules", "text_config.num_nextn_predict_layers"),
    place=NativePrefix(
        (
            "mtp.layers.{n}.",
            "language_model.mtp.layers.{n}.",
            "language_model.model.mtp.layers.{n}.",
        ),
        "model.mtp.layers.{n}.",
    ),
    block="transformer_layer.",
    extra={
        "enorm.weight": (_HIDDEN,),
        "hnorm.weight": (_HIDDEN,),
        "final_layernorm.weight": (_HIDDEN,),
        "eh_proj.weight": (_HIDDEN, f"2*{_HIDDEN}"),
    },
)
MINIMAX_M3 = Table(
    family="minimax_m3_vl",
    places=(
        NativePrefix(("language_model.model.layers.{n}.",), "model.layers.{n}.", block=True),
        NativePrefix(("language_model.model.embed_tokens.",), "model.embed_tokens."),
        NativePrefix(("language_model.model.norm.",), "model.norm."),
        NativePrefix(("language_model.lm_head.",), "lm_head."),
        NativePrefix(("vision_tower.vision_model.",), "vision_tower.vision_model."),
        NativePrefix(("multi_modal_projector.",), "vision_tower.multi_modal_projector."),
        NativePrefix(("patch_merge_mlp.",), "vision_tower.patch_merge_mlp."),
    ),
    inside={
        "block_sparse_moe.gate.": "mlp.gate.",
        "block_sparse_moe.e_score_correction_bias": "mlp.gate.e_score_correction_bias",
        "block_sparse_moe.shared_experts.": "shared_experts.",
        "self_attn.index_": "self_attn.indexer.index_",
    },
    stacks=_experts("block_sparse_moe.experts", "w1", "w3", "w2"),
    mtp=_MTP,
    scale="weight_scale_inv",
)
"""The whole model: text, vision tower, projector. The framework keeps ``patch_merge_mlp`` and the
projector in its vision tower."""

MINIMAX_M3_TEXT = replace(
    MINIMAX_M3,
    places=(
        NativePrefix(("model.layers.{n}.",), "model.layers.{n}.", block=True),
        NativePrefix(("model.embed_tokens.",), "model.embed_tokens."),
        NativePrefix(("model.norm.",), "model.norm."),
        NativePrefix(("lm_head.",), "lm_head."),
    ),
    mtp=replace(
        _MTP,
        place=NativePrefix(("mtp.layers.{n}.", "model.mtp.layers.{n}."), "model.mtp.layers.{n}."),
    ),
    nest="text_config",
    strip="language_model.",
)
"""The text model alone, from the text config: hub names without ``language_model.``."""

QWEN3_MOE = Table(
    family="qwen3_moe",
    places=(
        NativePrefix(("model.layers.{n}.",), "model.layers.{n}.", block=True),
        NativePrefix(("model.embed_tokens.",), "model.embed_tokens."),
        NativePrefix(("model.norm.",), "model.norm."),
        NativePrefix(("lm_head.",), "lm_head."),
    ),
    stacks=_experts("mlp.experts", "gate_proj", "up_proj", "down_proj"),
)

TABLES: Mapping[str, Table] = {
    "minimax_m3": MINIMAX_M3_TEXT,
    "minimax_m3_vl": MINIMAX_M3,
    "minimax_m3_vl_text": MINIMAX_M3_TEXT,
    "qwen3_moe": QWEN3_MOE,
}
"""By the ``model_type`` of a config."""
