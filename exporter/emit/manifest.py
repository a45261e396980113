# SPDX-License-Identifier: Apache-2.0
"""The manifest of an export: what it was made from, how, and the digest of every file."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from exporter.emit.configs import needs_of
from exporter.layout import unstacked
from exporter.plan import Plan, header_digest
from exporter.stream import Written
from verifier import __version__
from verifier.checkpoint import Checkpoint, open_checkpoint
from verifier.errors import PlanError
from verifier.manifest import File, Manifest, SourceRecord, digest
from verifier.schemes import Format, gather, read_declarations, split

Role = Literal["source", "onto", "experts", "base"]


def declares_kv_cache(plan: Plan) -> bool:
    """Return whether the result declares an FP8 KV cache: as requested, or as the kept checkpoint
    does.

    Raises:
        PlanError: the kept checkpoint declares a different KV cache, which would be lost.
    """
    described = plan.source if plan.kind == "repair" else plan.kept
    declaration = read_declarations(described).effective
    kv = declaration.kv if declaration is not None and declaration.modelopt else None
    if plan.options.get("kv_cache") is not None:
        return True
    if kv is not None and kv.upper() != "FP8":
        raise PlanError(
            f"{described.uri}: declares a KV cache in {kv}, and ckptgate writes FP8 only: use --kv "
            "fp8_cast"
        )
    return kv is not None


def adaptations(plan: Plan) -> list[str]:
    """Return what a plan and the declaration of its result change so that engines load it."""
    modules = {split(spec.name)[0]: None for spec in plan.specs if len(spec.shape) >= 2}
    formats = {**_kept_formats(plan), **plan.modules}
    unquantized = [name for name in modules if name not in formats]
    needs = needs_of(formats, unquantized, plan.kept.config, plan.engines)
    return [*plan.adapted, *needs.notes]


def _kept_formats(plan: Plan) -> dict[str, Format]:
    """Return the formats of the quantized modules that a plan copies."""
    dtypes = {spec.name: spec.dtype for spec in plan.specs}
    return {
        module.name: module.inferred_format
        for module in gather(plan.kept.tensors.values()).values()
        if module.inferred_format is not None
        and module.weight is not None
        and dtypes.get(module.weight.name) == module.weight.dtype
    }


def manifest_of(
    plan: Plan, name: str, folder: Path, written: Written, others: Iterable[str]
) -> Manifest:
    """Return the manifest of what was written.

    Args:
        plan: what was written.
        name: of the result.
        folder: where it is now.
        written: its shards.
        others: its other files.
    """
    result = unstacked(open_checkpoint(folder))
    modules = gather(result.tensors.values()).values()
    formats = (m.inferred_format for m in modules if m.quantized)
    files = {
        file: File(bytes=size, sha256=sha256)
        for file, (sha256, size) in sorted(written.digests.items())
    }
    files |= {file: digest(folder / file) for file in others}
    return Manifest(
        kind=plan.kind,
        name=name,
        made_by={"tool": "ckptgate", "version": __version__, "python": sys.version.split()[0]},
        sources=sources_of(plan),
        options=plan.options,
        formats=dict(Counter(fmt.algo for fmt in formats if fmt is not None)),
        tensors=len(plan.specs),
        bytes=result.nbytes,
        files=files,
        notes=_notes(plan, written),
    )


def sources_of(plan: Plan) -> list[SourceRecord]:
    """Return what identifies the checkpoints that a plan reads."""
    roles: list[tuple[Role, Checkpoint]] = [
        ("experts" if plan.kind == "merge" else "source", plan.source)
    ]
    if plan.onto is not None:
        roles.append(("base" if plan.kind == "repair" else "onto", plan.onto))
    return [
        SourceRecord(
            role=role,
            uri=_address(ckpt),
            tensors=sum(len(s.tensors) for s in ckpt.shards),
            header_sha256=header_digest(ckpt),
        )
        for role, ckpt in roles
    ]


def _notes(plan: Plan, written: Written) -> dict[str, Any]:
    planned, fused = plan.formats(), plan.fused()
    encoded = dict(sorted(written.encoded.items()))
    return {
        "quantized_here": dict(planned),
        "scale_range": {a: [f"{e.low:.2e}", f"{e.high:.2e}"] for a, e in encoded.items()},
        "linears": {a: [e.linears, planned[a], fused[a]] for a, e in encoded.items()},
        "requantized": {f"{a} to {b}": n for (a, b), n in sorted(plan.requantized().items())},
        "mxfp4_blocks": {
            a: [e.blocks - e.changed, e.blocks] for a, e in encoded.items() if e.blocks
        },
        "adapted": adaptations(plan),
    }


def _address(ckpt: Checkpoint) -> str:
    """Return where a checkpoint is, whatever the current directory."""
    return os.path.abspath(ckpt.uri) if os.path.exists(ckpt.uri) else ckpt.uri
