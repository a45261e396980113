# SPDX-License-Identifier: Apache-2.0
"""Hub names and a training framework's native names, as data: one table for each family, no code.

Which tensors a family has comes from `verifier.layouts.family`; a table says only what the framework
calls them, which of them it stacks, and what releases may carry beside (MTP heads, which
transformers does not save and whose names are therefore not in the family data). ``{n}`` stands for
a layer number, ``{expert}`` for an expert's.

Source of MINIMAX_M3: NeMo AutoModel, ``MiniMaxM3StateDictAdapter`` and
``MiniMaxM3VLStateDictAdapter``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace


@dataclass(frozen=True, slots=True)
class Place:
    """A prefix of hub names and its native counterpart.

    ``hub`` may list spellings that are read alike; the first is written. In a ``block`` (a decoder
    layer), the table's ``inside`` and ``stacks`` apply to what follows the prefix; elsewhere it
    stays as it is.
    """

    hub: tuple[str, ...]
    native: str
    block: bool = False


@dataclass(frozen=True, slots=True)
class Stack:
    """Projections of all routed experts of a block that the framework keeps as one parameter.

    The pieces are joined along their output dimension, in the order of ``hub``; then the experts
    are stacked: [experts, pieces * out, in], or with ``transpose`` [experts, in, pieces * out].
    """

    native: str
    hub: tuple[str, ...]
    transpose: bool


@dataclass(frozen=True, slots=True)
class Mtp:
    """Multi-token-prediction heads: a decoder block each, and the tensors that join it to the
    trunk.

    ``count`` lists config paths, the first that is set counts. ``extra`` has each further tensor's
    name and shape, as products of config paths.
    """

    count: tuple[str, ...]
    place: Place
    block: str
    extra: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Table:
    """One family's names in one framework.

    ``family`` names the layout of `verifier.layouts.family`. ``nest`` and ``strip`` fit it to a text-only
    model: the config stands for the family's at ``nest``, and hub names lose the prefix ``strip``;
    names without it are not part. ``scale`` is the leaf of MXFP8 scales, None for the declaration's
    own custom.
    """

    family: str
    places: tuple[Place, ...]
    inside: Mapping[str, str] = field(default_factory=dict)
    stacks: tuple[Stack, ...] = ()
    mtp: Mtp | None = None
    scale: str | None = None
    nest: str = ""
    strip: str = ""


def _experts(container: str, gate: str, up: str, down: str) -> tuple[Stack, ...]:
    """Return the grouped stacks of NeMo AutoModel: gate and up joined, both with the input
    dimension first.
    """
    each = container + ".{expert}."
    return (
        Stack(
            "mlp.experts.gate_and_up_projs",
            (f"{each}{gate}.weight", f"{each}{up}.weight"),
            transpose=True,
        ),
        Stack("mlp.experts.down_projs", (f"{each}{down}.weight",), transpose=True),
    )


_HIDDEN = "text_config.hidden_size"
MINIMAX_M3 = Table(
    family="minimax_m3_vl",
    places=(
        Place(("language_model.model.layers.{n}.",), "model.layers.{n}.", block=True),
        Place(("language_model.model.embed_tokens.",), "model.embed_tokens."),
        Place(("language_model.model.norm.",), "model.norm."),
        Place(("language_model.lm_head.",), "lm_head."),
        Place(("vision_tower.vision_model.",), "vision_tower.vision_model."),
        Place(("multi_modal_projector.",), "vision_tower.multi_modal_projector."),
        Place(("patch_merge_mlp.",), "vision_tower.patch_merge_mlp."),
    ),
    inside={
        "block_sparse_moe.gate.": "mlp.gate.",
        "block_sparse_moe.e_score_correction_bias": "mlp.gate.e_score_correction_bias",
        "block_sparse_moe.shared_experts.": "shared_experts.",
        "self_attn.index_": "self_attn.indexer.index_",
    },
    stacks=_experts("block_sparse_moe.experts", "w1", "w3", "w2"),
    mtp=Mtp(
        count=("text_config.num_mtp_modules", "text_config.num_nextn_predict_layers"),
        place=Place(
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
    ),
    scale="weight_scale_inv",
)
"""The whole model: text, vision tower, projector. ``patch_merge_mlp`` and the projector move into
the vision tower."""

MINIMAX_M3_TEXT = replace(
    MINIMAX_M3,
    places=(
        Place(("model.layers.{n}.",), "model.layers.{n}.", block=True),
        Place(("model.embed_tokens.",), "model.embed_tokens."),
        Place(("model.norm.",), "model.norm."),
        Place(("lm_head.",), "lm_head."),
    ),
    mtp=replace(
        MINIMAX_M3.mtp,
        place=Place(("mtp.layers.{n}.", "model.mtp.layers.{n}."), "model.mtp.layers.{n}."),
    )
    if MINIMAX_M3.mtp
    else None,
    nest="text_config",
    strip="language_model.",
)
"""The text model alone, from the text config: hub names without ``language_model.``."""

QWEN3_MOE = Table(
    family="qwen3_moe",
    places=(
        Place(("model.layers.{n}.",), "model.layers.{n}.", block=True),
        Place(("model.embed_tokens.",), "model.embed_tokens."),
        Place(("model.norm.",), "model.norm."),
        Place(("lm_head.",), "lm_head."),
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
