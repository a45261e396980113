# SPDX-License-Identifier: Apache-2.0
"""Which modules belong to a multi-token prediction head."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from verifier.rules.context import Context
from verifier.schemes import role

_NUMBERED = re.compile(r"^(?:language_model\.)?(?:model\.)?(?:language_model\.)?layers\.(\d+)\.")
_HEAD = re.compile(r"^(.*?(?:^|\.)(?:mtp|nextn)(?:\.layers\.\d+)?|.*?layers\.\d+)\.")
_INNER = re.compile(r"^(transformer_layer|mtp_block)\.")


def text_layers(config: Mapping[str, Any] | None) -> int | None:
    """Return the number of text layers that config.json states at either level, or None."""
    for node in (config or {}, (config or {}).get("text_config"), (config or {}).get("llm_config")):
        value = node.get("num_hidden_layers") if isinstance(node, Mapping) else None
        if type(value) is int:
            return value
    return None


def mtp_modules(ctx: Context) -> frozenset[str]:
    """Return the linears of the MTP head: ``mtp.…``, or layers numbered from ``num_hidden_layers`` on (DeepSeek, GLM)."""
    layers = text_layers(ctx.checkpoint.config)
    found = set()
    for module in ctx.linears:
        if role(module.name) == "mtp":
            found.add(module.name)
        elif layers is not None and (match := _NUMBERED.match(module.name)) and int(match[1]) >= layers:
            found.add(module.name)
    return frozenset(found)


def head_and_tail(module: str) -> tuple[str, str]:
    """Split a name behind its layer: ``mtp.layers.0`` and ``self_attn.q_proj``; the head is '' without a layer."""
    match = _HEAD.match(module)
    if match is None:
        return "", module
    return match[1], _INNER.sub("", module[match.end() :])
