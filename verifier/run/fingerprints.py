# SPDX-License-Identifier: Apache-2.0
"""Fingerprints: what stays the same about a finding from one run to the next.

A fingerprint identifies a rule, a kind of defect and a kind of place. The kind is the rule's own
cause, so that a message may be reworded. Shard names, layer and expert numbers, counts and offsets
are not part of it: they change with the sharding, with the order in a header, and with other
findings. Nor is the severity, so that a profile does not turn a known finding into a new one.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import replace

from verifier.findings import FINGERPRINT_VERSION, Finding
from verifier.schemes import collapse

BUILT_IN = "QC"
"""What the ids of ckptgate's own rules begin with."""
MAX_MESSAGE = 2_000
_SHARD = re.compile(r"[^\s'\"]*\.safetensors\b")
_SHARDS = re.compile(r"<shard>(, <shard>)+")
# A number by itself: those in NVFP4, F8_E4M3, w13 and weight_scale_2 distinguish kinds.
_NUMBER = re.compile(r"(?<![A-Za-z0-9_])[-+]?\d[\d,]*(\.\d+)?(e[-+]?\d+)?(?![A-Za-z0-9_])")


def kind(finding: Finding) -> str:
    """Return the finding's cause, or the message of a plugin's finding that states none; the first
    `MAX_MESSAGE` characters, without file names of shards and without numbers.
    """
    # They contain names, and a hostile one can be as long as a header: the patterns below are not
    # linear.
    own = finding.rule.startswith(BUILT_IN)
    text = (finding.cause or ("" if own else finding.message))[:MAX_MESSAGE]
    if finding.where.file and finding.where.file.endswith(".safetensors"):
        text = text.replace(finding.where.file, "<shard>")
    return _NUMBER.sub("#", _SHARDS.sub("<shard>", _SHARD.sub("<shard>", text)))


def place(finding: Finding) -> str:
    """Return the tensor's name with layer and expert numbers as ``*``; without a tensor the file,
    unless it is a shard.
    """
    if finding.where.tensor:
        return collapse(finding.where.tensor)
    file = finding.where.file or ""
    return "" if file.endswith(".safetensors") else file


def fingerprint(finding: Finding) -> str:
    """Return 32 hexadecimal digits: of the SHA-256 of version, rule, kind and place."""
    text = "\0".join((FINGERPRINT_VERSION, finding.rule, kind(finding), place(finding)))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def fingerprinted(findings: Iterable[Finding]) -> list[Finding]:
    """Return the findings with their fingerprints."""
    return [replace(f, fingerprint=fingerprint(f)) for f in findings]
