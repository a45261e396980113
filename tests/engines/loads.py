# SPDX-License-Identifier: Apache-2.0
"""What vLLM's loader makes of our exports, of broken checkpoints and of reported ones, next to what
`check` says: the rows of results.json.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

import exporter
from exporter.recipes import names
from goldens.rebuild import GOLDENS
from goldens.rebuild import HERE as GOLDEN_FOLDER
from tests.zoo.families import FAMILIES, Family, model
from tests.zoo.run import RECIPES, filled, quiet
from verifier import check, open_checkpoint
from verifier.checkpoint import Checkpoint
from verifier.engines.loader import VllmSession
from verifier.errors import CkptgateError
from verifier.findings import Finding
from verifier.rules import Context, all_rules
from verifier.rules.context import Inputs
from verifier.rules.engine_loading import EngineLoad, EngineLoads
from verifier.selftest.corruptor import Corruptor, traits_of
from verifier.selftest.defects import CORRUPTORS
from verifier.selftest.editor import CheckpointEditor
from verifier.selftest.tiny import TINY, TinyCheckpoint, make

ACCEPTED, REFUSED, NOT_CHECKED = "accepted", "refused", "not checked"
REJECTED, UNWRITTEN, DEGRADED, WARNS = "rejected", "unwritten", "degraded", "warns"
FAILURES = (REJECTED, UNWRITTEN, DEGRADED)
"""Outcomes of a checkpoint that does not work in the engine."""
_KINDS = {"QC601": REJECTED, "QC602": UNWRITTEN, "QC603": DEGRADED}
CASES = Path(os.environ.get("CKPTGATE_TEST_DATA", "/nonexistent")) / "cases"


M3_TEXT: Mapping[str, Any] = {
    "hidden_act": "swigluoai",
    "n_shared_experts": 1,
    "num_mtp_modules": 0,
    "qk_norm_type": "per_head",
    "rotary_dim": 16,
    "scoring_func": "sigmoid",
    "swiglu_alpha": 1.702,
    "swiglu_limit": 7.0,
    "use_gemma_norm": True,
    "use_qk_norm": True,
    "use_routing_bias": True,
    "sparse_attention_config": {
        "sparse_block_size": 16,
        "sparse_disable_index_value": [0, 0, 1],
        "sparse_init_block": 0,
        "sparse_local_block": 1,
        "sparse_score_type": "max",
        "sparse_topk_blocks": 2,
    },
}
"""What tiny configs of MiniMax-M3 lack."""
COMPLETED: Mapping[str, Mapping[str, Any]] = {
    "afmoe": {
        "n_group": 1,
        "route_norm": True,
        "route_scale": 1.0,
        "score_func": "sigmoid",
        "topk_group": 1,
    },
    "deepseek_v3": {"topk_method": "noaux_tc"},
    "glm4_moe": {"head_dim": 16},
    "glm4_moe_lite": {"first_k_dense_replace": 1},
    "glm4v_moe": {"text_config": {"head_dim": 16, "use_qk_norm": False}},
    "hy_v3": {
        "expert_hidden_dim": 96,
        "first_k_dense_replace": 1,
        "qk_norm": True,
        "route_norm": True,
    },
    "longcat_flash": {
        "mla_scale_kv_lora": True,
        "mla_scale_q_lora": True,
        "zero_expert_type": "identity",
    },
    "mimo_v2_flash": {
        "add_swa_attention_sink_bias": True,
        "hybrid_layer_pattern": [0, 1],
        "layernorm_epsilon": 1e-5,
        "moe_layer_freq": [0, 1],
        "sliding_window_size": 32,
        "swa_head_dim": 32,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_v_head_dim": 32,
    },
    "minimax_m2": {"rotary_dim": 16, "scoring_func": "sigmoid", "use_routing_bias": True},
    "minimax_m3_vl": {
        "text_config": {
            **M3_TEXT,
            "moe_layer_freq": [0, 1, 1],
            "sparse_attention_config": {
                **M3_TEXT["sparse_attention_config"],
                "sparse_attention_freq": [0, 0, 1],
                "sparse_index_dim": 32,
                "sparse_num_index_heads": 2,
                "use_sparse_attention": True,
            },
        },
        "vision_config": {
            "img_token_compression_config": {"spatial_merge_size": 2, "temporal_patch_size": 2},
        },
    },
    "qwen3_vl_moe": {"text_config": {"norm_topk_prob": True}},
}
"""Keys of config.json that releases of a family have and that transformers does not write."""
NOT_RELEASED: Mapping[str, str] = {"longcat_flash": r"\.experts\.[45]\."}
"""Tensors that transformers saves and that no release has: its gate and up projections of LongCat's
zero experts, which have no weights.
"""


@dataclass(frozen=True)
class Row:
    """One checkpoint.

    Attributes:
        name: of the golden, the family, the case, or the rule and its defect.
        recipe: of the export, or the tiny checkpoint of a defect.
        check: our verdict, or `REFUSED`.
        engine: one of the outcomes above; '' where there is no checkpoint.
        why: the engine's message, or why there is no outcome.
        claim: the severity that the rule states for vLLM.
    """

    name: str
    recipe: str
    check: str
    engine: str = ""
    why: str = ""
    claim: str = ""

    @property
    def violates(self) -> bool:
        """Whether `check` passes what fails in the engine."""
        return self.check == "passed" and self.engine in FAILURES


class Engine:
    """A session that loads each base once."""

    def __init__(self, session: VllmSession) -> None:
        self._session = session
        self._bases: dict[str, EngineLoad] = {}

    def __call__(self, checkpoint: Checkpoint, base: Checkpoint | None = None) -> EngineLoads:
        """Load a checkpoint and its base."""
        candidate = self._session.load(checkpoint, checkpoint)
        if base is None or candidate.reason:
            return EngineLoads(candidate)
        if base.uri not in self._bases:
            self._bases[base.uri] = self._session.load(base, base)
        return EngineLoads(candidate, self._bases[base.uri])


def outcome(engine: Engine, path: Path, base: Path | None) -> tuple[str, str]:
    """Return an engine's outcome and its message."""
    reference = open_checkpoint(base) if base is not None else None
    ctx = Context.of(open_checkpoint(path), reference, inputs=Inputs(engine_loader=engine))
    found: list[Finding] = []
    for rule_id in _KINDS:
        own = ctx.for_rule(rule_id, all_rules()[rule_id].severity)
        found += all_rules()[rule_id].check(own)
        if rule_id == "QC601" and not own.tally.checked:
            return NOT_CHECKED, _text(own.tally.reason)
    worst = next((f for f in found if f.severity == "error"), next(iter(found), None))
    if worst is None:
        return ACCEPTED, ""
    kind = _KINDS[worst.rule] if worst.severity == "error" else WARNS
    return kind, _text(f"{worst.where.tensor or ''} {worst.observed}")


def _text(text: str) -> str:
    """Return a message in one line, without temporary folders."""
    return re.sub(r"/\S*/ckptgate-engines-[^/]+/", "", " ".join(text.split()))[:300]


def goldens(engine: Engine, home: Path) -> Iterator[Row]:
    """Yield a row for each golden and recipe, and for the mixed and merged exports."""
    for golden, builds in GOLDENS.items():
        source = GOLDEN_FOLDER / golden / "bf16"
        kind, why = outcome(engine, source, None)
        yield Row(golden, "as it is (BF16)", "", kind, why)
        for recipe in names():
            yield _exported(engine, golden, source, recipe, home)
        for build in builds:
            if build.onto or build.merged:
                out = home / f"{golden}.{build.name}"
                if build.merged:
                    needed = home / f"{golden}.{build.merged}"
                    shutil.rmtree(needed, ignore_errors=True)
                    (home / f"{golden}.nvfp4_experts_only").rename(needed)
                build.run(GOLDEN_FOLDER / golden, out)
                yield _row(engine, golden, build.name, out, source)


def zoo(engine: Engine, home: Path) -> Iterator[Row]:
    """Yield a row for each family of the zoo and recipe."""
    for family in FAMILIES:
        yield from _family(engine, family, home / family.name)
        shutil.rmtree(home / family.name, ignore_errors=True)


def _family(engine: Engine, family: Family, home: Path) -> Iterator[Row]:
    source = home / "source"
    try:
        with quiet():
            filled(model(family)).save_pretrained(source)
        _complete(source / "config.json", COMPLETED.get(family.name, {}))
        if family.name in NOT_RELEASED:
            _remove(source / "model.safetensors", NOT_RELEASED[family.name])
    except Exception as error:  # noqa: BLE001  (transformers raises anything)
        yield Row(family.name, "", "", NOT_CHECKED, _text(f"cannot be built: {error}"))
        return
    kind, why = outcome(engine, source, None)
    if kind in (REJECTED, NOT_CHECKED):  # the exports would not be blamed
        yield Row(family.name, "as it is (BF16)", "", kind, why)
        return
    for recipe in RECIPES:
        yield _exported(engine, family.name, source, recipe, home)


def _complete(file: Path, more: Mapping[str, Any]) -> None:
    """Add keys to a config.json, nested as it is."""
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(_merged(config, more)), encoding="utf-8")


def _merged(config: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    nested = {k: _merged(config.get(k, {}), v) for k, v in more.items() if isinstance(v, dict)}
    return {**config, **more, **nested}


def _remove(file: Path, pattern: str) -> None:
    """Remove the tensors whose names match a pattern."""
    tensors = load_file(file)
    kept = {name: tensor for name, tensor in tensors.items() if not re.search(pattern, name)}
    save_file(kept, file, metadata={"format": "pt"})


def _exported(engine: Engine, name: str, source: Path, recipe: str, home: Path) -> Row:
    """Export a source and return its row."""
    out = home / f"{name}.{recipe}"
    try:
        with quiet():
            exporter.export(source, out, recipe=recipe, input_scale="one", workers=1)
    except CkptgateError as error:
        return Row(name, recipe, REFUSED, "", _text(str(error)))
    return _row(engine, name, recipe, out, source)


def _row(engine: Engine, name: str, recipe: str, path: Path, base: Path) -> Row:
    report = check(path, base=base, depth="payload", workers=1)
    return Row(name, recipe, report.verdict, *outcome(engine, path, base))


def claims(engine: Engine, home: Path) -> Iterator[Row]:
    """Yield a row for each defect of a rule that says what vLLM does, in the first tiny checkpoint
    that vLLM loads and that the defect suits.
    """
    rules = {r.id: r.engines["vllm"][0] for r in all_rules().values() if "vllm" in r.engines}
    left = [c for c in CORRUPTORS if c.rule in rules]
    for spec in TINY:
        tiny = make(home, spec)
        if spec.family == "minimax_m3_vl":
            more = {"text_config": M3_TEXT, "vision_config": {"layer_norm_eps": 1e-5}}
            for folder in filter(None, (tiny.path, tiny.base)):
                _complete(folder / "config.json", more)
        kind, why = outcome(engine, tiny.path, tiny.base)
        if kind not in (ACCEPTED, WARNS):
            yield Row("valid", spec.name, "passed", kind, why)
            continue
        traits = traits_of(CheckpointEditor(tiny.path))
        for corruptor in [c for c in left if c.on.met_by(spec.kind, traits)]:
            row = _broken(engine, tiny, corruptor, rules[corruptor.rule])
            if row is not None:
                left.remove(corruptor)
                yield row


def _broken(engine: Engine, tiny: TinyCheckpoint, corruptor: Corruptor, claim: str) -> Row | None:
    broken = tiny.path.parent / "defect" / "checkpoint"
    shutil.rmtree(broken, ignore_errors=True)
    shutil.copytree(tiny.path, broken)
    try:
        corruptor.apply(broken)
        kind, why = outcome(engine, broken, tiny.base)
        report = check(broken, base=tiny.base, depth="payload", profile="vllm", workers=1)
    except (StopIteration, LookupError, ValueError, TypeError, OSError, CkptgateError):
        return None
    finally:
        shutil.rmtree(broken)
    name = f"{corruptor.rule} {corruptor.name}"
    return Row(name, tiny.spec.name, report.verdict, kind, why, claim)


def cases(engine: Engine, _home: Path) -> Iterator[Row]:
    """Yield a row for each reported checkpoint."""
    for folder in sorted(p for p in CASES.iterdir() if p.is_dir()) if CASES.is_dir() else ():
        case = json.loads((folder / "case.json").read_text(encoding="utf-8"))
        base = folder / "base" if (folder / "base").is_dir() else None
        report = check(folder / "checkpoint", base=base, depth="payload", profile="vllm", workers=1)
        kind, why = outcome(engine, folder / "checkpoint", base)
        yield Row(folder.name, case["kind"], report.verdict, kind, why)


SECTIONS = {"goldens": goldens, "zoo": zoo, "claims": claims, "cases": cases}
