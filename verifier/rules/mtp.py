# SPDX-License-Identifier: Apache-2.0
"""The linear layers of a multi-token prediction head."""

from __future__ import annotations

import re

from verifier.rules.context import Context

_HEAD = re.compile(r"^(.*?(?:^|\.)(?:mtp|nextn)(?:\.layers\.\d+)?|.*?layers\.\d+)\.")
_INNER = re.compile(r"^(transformer_layer|mtp_block)\.")


def mtp_modules(ctx: Context) -> frozenset[str]:
    """Return the linear layers of the MTP head: ``mtp.…``, or layers numbered from
    ``num_hidden_layers`` on (DeepSeek, GLM).
    """
    linears = ctx.candidate.linears
    stems = {stem for stem in {m.stem for m in linears} if ctx.expectations.is_mtp(stem)}
    return frozenset(m.name for m in linears if m.stem in stems)


def head_and_tail(module: str) -> tuple[str, str]:
    """Split a name after its layer, as in ``mtp.layers.0`` and ``self_attn.q_proj``; without a
    layer the head is ''.
    """
    match = _HEAD.match(module)
    if match is None:
        return "", module
    return match[1], _INNER.sub("", module[match.end() :])
