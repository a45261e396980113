# SPDX-License-Identifier: Apache-2.0
"""What one rule skips because another reports it is reported by the other, at that tensor."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import verifier
from tests.formats.files import BF16, E4M3, Array, Checkpoint
from tests.formats.formats import build
from tests.formats.table import FORMATS
from verifier.findings import Finding
from verifier.rules.handoffs import HANDOFFS, RECONSTRUCTION, Handoff

LAYER = "model.layers.0"
ATTENTION = f"{LAYER}.self_attn"
Q, K, V, OUT = (f"{ATTENTION}.{leaf}_proj" for leaf in "qkvo")
EXPERTS = f"{LAYER}.mlp.experts"
GATE, UP, DOWN = (f"{EXPERTS}.2.{leaf}_proj" for leaf in ("gate", "up", "down"))
SHARED = (
    "QC507",
    "QC509",
    "QC510",
    "QC511",
    "QC512",
    "QC515",
    "QC517",
)
"""The rules that share the comparison with the base."""
Edit = Callable[[Checkpoint], None]
OnDisk = Callable[[Path], None]


@dataclass(frozen=True)
class Case:
    """One cause: a clean checkpoint, the edit that makes it, and where the finding has to be."""

    format: str
    place: str
    edit: Edit | None = None
    base: bool = False
    on_disk: OnDisk | None = None
    tp: int | None = None


def replaced(name: str, change: Callable[[Array], Array]) -> Edit:
    """Return an edit of one tensor."""

    def edit(checkpoint: Checkpoint) -> None:
        checkpoint.tensors[name] = change(checkpoint.tensors[name])

    return edit


def removed(pattern: str) -> Edit:
    """Return an edit that removes every tensor whose name matches."""

    def edit(checkpoint: Checkpoint) -> None:
        names = [n for n in checkpoint.tensors if re.fullmatch(pattern, n)]
        assert names, pattern
        for name in names:
            del checkpoint.tensors[name]

    return edit


def every(*edits: Edit) -> Edit:
    """Return an edit that makes several."""

    def edit(checkpoint: Checkpoint) -> None:
        for one in edits:
            one(checkpoint)

    return edit


def declared(change: Callable[[dict[str, Any]], None]) -> Edit:
    """Return an edit of ModelOpt's declaration in each file that has it."""

    def edit(checkpoint: Checkpoint) -> None:
        bodies = [checkpoint.config.get("quantization_config")]
        bodies.append(checkpoint.json.get("hf_quant_config.json", {}).get("quantization"))
        for body in filter(None, bodies):
            change(body)

    return edit


def excluded(*patterns: str) -> Edit:
    """Return an edit that adds exclusions."""

    def change(body: dict[str, Any]) -> None:
        lists = [body[key] for key in ("ignore", "exclude_modules") if key in body]
        assert lists
        for names in lists:
            names += patterns

    return declared(change)


def plain(checkpoint: Checkpoint, module: str) -> None:
    """Store a module unquantized, with ordinary values."""
    out, in_ = checkpoint.tensors[f"{module}.weight"].shape
    packed = checkpoint.tensors[f"{module}.weight"].dtype == np.uint8
    for name in [n for n in checkpoint.tensors if n.startswith(f"{module}.")]:
        del checkpoint.tensors[name]
    values = np.linspace(-0.1, 0.1, out * in_ * (1 + packed), dtype=np.float32)
    checkpoint.tensors[f"{module}.weight"] = values.reshape(out, -1).astype(BF16)


def as_plain(*modules: str) -> Edit:
    """Return an edit that stores modules unquantized."""
    return lambda checkpoint: [plain(checkpoint, m) for m in modules] and None


def as_fp8(module: str) -> Edit:
    """Return an edit that stores a packed module in FP8 with one scale."""

    def edit(checkpoint: Checkpoint) -> None:
        plain(checkpoint, module)
        weight = checkpoint.tensors[f"{module}.weight"].astype(np.float32)
        checkpoint.tensors[f"{module}.weight"] = (weight * 4480).astype(E4M3)
        checkpoint.tensors[f"{module}.weight_scale"] = np.float32(1 / 4480).reshape(())
        checkpoint.tensors[f"{module}.input_scale"] = np.float32(0.01).reshape(())

    return edit


def behind_the_last(checkpoint: Checkpoint) -> None:
    """Add a layer behind the last one: a copy of the first, which is an MTP head."""
    for name in [n for n in checkpoint.tensors if n.startswith(LAYER)]:
        checkpoint.tensors[name.replace(".0.", ".1.", 1)] = checkpoint.tensors[name].copy()
    excluded("model.layers.1.mlp.gate")(checkpoint)


def in_the_head(edit: Edit) -> Edit:
    """Return an edit made in a checkpoint with an MTP head."""
    return every(behind_the_last, edit)


def in_two_shards(change: OnDisk) -> OnDisk:
    """Return what writes two shards and an index, and then a change of the folder."""

    def on_disk(folder: Path) -> None:
        name = "model.safetensors"
        data = (folder / name).read_bytes()
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        halves = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
        (folder / name).rename(folder / halves[0])
        empty = b'{"extra.weight":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'
        (folder / halves[1]).write_bytes(len(empty).to_bytes(8, "little") + empty)
        names = [n for n in header if n != "__metadata__"]
        weight_map = {n: halves[0] for n in names} | {"extra.weight": halves[1]}
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        change(folder / halves[1])

    return on_disk


def scrambled(file: Path) -> None:
    file.write_bytes((20).to_bytes(8, "little") + b"{not a header at all")


BROKEN = Case("modelopt_nvfp4", "00002-of", on_disk=in_two_shards(scrambled))


def mixed(module: str, algo: str | None) -> Edit:
    """Return an edit of an entry of ``quantized_layers``; None removes it."""

    def change(body: dict[str, Any]) -> None:
        layers = body["quantized_layers"]
        assert module in layers
        if algo is None:
            del layers[module]
        else:
            layers[module] = {"quant_algo": algo}

    return declared(change)


def no_algo_but(algo: str) -> Edit:
    return declared(lambda body: body.update(quant_algo=algo))


def is_zero(leaf: str) -> Edit:
    return every(
        *(
            replaced(f"{EXPERTS}.{n}.{p}_proj.{leaf}", np.zeros_like)
            for n in (1, 2)
            for p in ("gate", "up", "down")
        )
    )


def one(value: float) -> Callable[[Array], Array]:
    """Return a change of one value."""

    def change(array: Array) -> Array:
        changed = array.copy()
        changed.reshape(-1)[array.size // 2] = value
        return changed

    return change


NVFP4, FP8, CT = "modelopt_nvfp4", "modelopt_fp8", "ct_nvfp4"
CASES: dict[tuple[str, str], Case] = {
    ("QC102", "a shard is missing"): Case(
        NVFP4, "00002-of", on_disk=in_two_shards(lambda file: file.unlink())
    ),
    ("QC102", "a header cannot be read"): BROKEN,
    ("QC107", "a header cannot be read"): BROKEN,
    ("QC109", "a header cannot be read"): BROKEN,
    ("QC301", "no module of the format has the scale"): Case(
        NVFP4, "input_scale", removed(r".*input_scale")
    ),
    ("QC302", "the missing scale is one of activations"): Case(
        NVFP4, f"{DOWN}.input_scale", removed(re.escape(f"{DOWN}.input_scale"))
    ),
    ("QC306", "scales follow a wrong declared group size"): Case(
        NVFP4,
        f"{DOWN}.weight_scale",
        every(
            declared(lambda body: body.update(group_size=32)),
            replaced(f"{DOWN}.weight_scale", lambda a: a[:, ::2].copy()),
        ),
    ),
    ("QC306", "the scale is padded or swizzled"): Case(
        NVFP4,
        f"{OUT}.weight_scale",
        replaced(f"{OUT}.weight_scale", lambda a: a.reshape(a.shape[0] // 4, a.shape[1] * 4)),
    ),
    ("QC401", "quantized_layers has no entry for the module"): Case(
        "modelopt_mixed", OUT, mixed(OUT, None)
    ),
    ("QC402", "the layer belongs to an MTP head"): Case(
        NVFP4,
        "model.layers.1.self_attn.o_proj",
        in_the_head(as_plain("model.layers.1.self_attn.o_proj")),
    ),
    ("QC403", "a fused group of the MTP head has two formats"): Case(
        NVFP4,
        "model.layers.1.self_attn.",
        in_the_head(
            every(
                as_plain("model.layers.1.self_attn.k_proj"),
                excluded("model.layers.1.self_attn.k_proj"),
            )
        ),
    ),
    ("QC404", "the exclusion has the name of a wrapper module"): Case(
        NVFP4, "", every(as_plain(OUT), excluded(f"{OUT}.linear"))
    ),
    ("QC405", "no engine excludes the layer"): Case(NVFP4, OUT, as_plain(OUT)),
    ("QC405", "no engine excludes the layer of the MTP head"): Case(
        NVFP4,
        "model.layers.1.self_attn.o_proj",
        in_the_head(as_plain("model.layers.1.self_attn.o_proj")),
    ),
    ("QC408", "a packed format is declared for other weights"): Case(NVFP4, OUT, as_fp8(OUT)),
    ("QC408", "scales are next to a plain weight"): Case(
        FP8, OUT, replaced(f"{OUT}.weight", lambda a: a.astype(np.float32).astype(BF16))
    ),
    ("QC408", "quantized_layers has a different format"): Case(
        "modelopt_mixed", DOWN, mixed(DOWN, "FP8")
    ),
    ("QC409", "a packed format is declared for other weights"): Case(NVFP4, K, as_fp8(K)),
    ("QC409", "the declared format is not that of the tensors"): Case(
        FP8, K, every(replaced(f"{K}.weight", lambda a: np.zeros_like(a, np.int8)))
    ),
    ("QC409", "quantized_layers has a different format"): Case(
        "modelopt_mixed", GATE, mixed(GATE, "FP8")
    ),
    ("QC411", "a list of the declaration has the wrong type"): Case(
        NVFP4,
        "",
        declared(lambda body: body.update({k: "lm_head" for k in body if k in LISTS})),
    ),
    ("QC504", "weight_scale_2 is not F32"): Case(
        NVFP4,
        f"{UP}.weight_scale_2",
        replaced(f"{UP}.weight_scale_2", lambda a: a.astype(BF16)),
    ),
    ("QC504", "weight_scale_2 is empty"): Case(
        NVFP4,
        f"{UP}.weight_scale_2",
        replaced(f"{UP}.weight_scale_2", lambda _: np.zeros(0, np.float32)),
    ),
    ("QC505", "the global scale is not a scalar"): Case(
        NVFP4, f"{K}.weight_scale_2", replaced(f"{K}.weight_scale_2", lambda a: np.full(2, a))
    ),
    ("QC505", "global scales have two dtypes"): Case(
        NVFP4, f"{K}.weight_scale_2", replaced(f"{K}.weight_scale_2", lambda a: a.astype(BF16))
    ),
    ("QC506", "input_scale is zero"): Case(
        NVFP4, f"{K}.input_scale", replaced(f"{K}.input_scale", np.zeros_like)
    ),
    ("QC506", "input_scale is not a scalar"): Case(
        NVFP4, f"{K}.input_scale", replaced(f"{K}.input_scale", lambda a: np.full(2, a))
    ),
    ("QC507", "the experts are zero"): Case(
        NVFP4, f"{EXPERTS}.", every(is_zero("weight"), is_zero("weight_scale"))
    ),
    ("QC509", "no scale of activations is finite and positive"): Case(
        NVFP4,
        "input_scale",
        lambda checkpoint: checkpoint.tensors.update(
            {
                name: np.full_like(array, np.nan)
                for name, array in checkpoint.tensors.items()
                if name.endswith("input_scale")
            }
        ),
    ),
    ("QC509", "the weight scale is NaN"): Case(
        NVFP4, f"{OUT}.weight_scale_2", replaced(f"{OUT}.weight_scale_2", one(np.nan))
    ),
    ("QC518", "the tensor has the wrong shape"): Case(
        "gptq", f"{DOWN}.g_idx", replaced(f"{DOWN}.g_idx", lambda a: a[:-8].copy())
    ),
    ("QC604", "formats differ in a fused group"): Case(
        NVFP4, ATTENTION, every(as_plain(K), excluded(K))
    ),
    ("QC604", "experts are missing from a known layout"): Case(
        NVFP4, f"{EXPERTS}.2", removed(re.escape(f"{EXPERTS}.2.") + ".*")
    ),
    ("QC604", "experts of an MTP layer differ in format"): Case(
        NVFP4,
        "model.layers.1.mlp.experts.2.down_proj",
        in_the_head(
            every(
                as_plain("model.layers.1.mlp.experts.2.down_proj"),
                excluded("model.layers.1.mlp.experts.2.down_proj"),
            )
        ),
    ),
    ("QC604", "an expert is not quantized as declared"): Case(NVFP4, DOWN, as_plain(DOWN)),
    ("QC604", "an expert is in a different format than declared"): Case(
        FP8, DOWN, replaced(f"{DOWN}.weight", lambda a: np.zeros_like(a, np.int8))
    ),
    ("QC604", "quantized_layers has a different format"): Case(
        "modelopt_mixed", DOWN, mixed(DOWN, "FP8")
    ),
    ("QC604", "a part has a different shape than a known layout"): Case(
        "modelopt_w8a16",
        f"{DOWN}.weight",
        every(
            replaced(f"{DOWN}.weight", lambda a: a[:-8].copy()),
            replaced(f"{DOWN}.weight_scale", lambda a: a[:-8].copy()),
        ),
    ),
    ("QC604", "a part has no input_scale"): Case(
        NVFP4, f"{K}.input_scale", removed(re.escape(f"{K}.input_scale"))
    ),
    ("QC604", "a part has no weight scale"): Case(
        NVFP4, f"{K}.weight_scale", removed(re.escape(f"{K}.weight_scale"))
    ),
    ("QC604", "an expert has no pre_quant_scale"): Case(
        "modelopt_nvfp4_awq",
        f"{DOWN}.pre_quant_scale",
        removed(re.escape(f"{DOWN}.pre_quant_scale")),
    ),
    ("QC604", "a weight scale has the wrong dtype"): Case(
        NVFP4,
        f"{K}.weight_scale",
        replaced(f"{K}.weight_scale", lambda a: a.astype(np.float32)),
    ),
    ("QC604", "a scalar has the wrong dtype"): Case(
        NVFP4, f"{K}.weight_scale_2", replaced(f"{K}.weight_scale_2", lambda a: a.astype(BF16))
    ),
    ("QC604", "a plain weight has a different dtype than the base"): Case(
        NVFP4,
        f"{K}.weight",
        every(
            as_plain(Q, K, V),
            excluded(Q, K, V),
            replaced(f"{K}.weight", lambda a: a.astype(np.float16)),
        ),
        base=True,
    ),
    ("QC604", "a scale does not fit its weight"): Case(
        "deepseek_fp8",
        f"{K}.weight_scale_inv",
        replaced(f"{K}.weight_scale_inv", lambda a: a.reshape(-1)),
    ),
    ("QC604", "scalars are 0-d and [1]"): Case(
        NVFP4, f"{K}.input_scale", replaced(f"{K}.input_scale", lambda a: a.reshape(1))
    ),
    ("QC604", "shards of tensor parallelism split a tile"): Case(
        "deepseek_fp8", f"{K}.weight", lambda _: None, tp=2
    ),
    (RECONSTRUCTION, "a scale is missing"): Case(
        NVFP4, f"{OUT}.weight_scale", removed(re.escape(f"{OUT}.weight_scale")), base=True
    ),
    (RECONSTRUCTION, "a scale does not fit its weight"): Case(
        NVFP4,
        f"{OUT}.weight_scale",
        replaced(f"{OUT}.weight_scale", lambda a: a[:, :-1].copy()),
        base=True,
    ),
    (RECONSTRUCTION, "the weight has a different shape than the base"): Case(
        "modelopt_w8a16",
        f"{OUT}.weight",
        every(
            replaced(f"{OUT}.weight", lambda a: a[:-8].copy()),
            replaced(f"{OUT}.weight_scale", lambda a: a[:-8].copy()),
        ),
        base=True,
    ),
    (RECONSTRUCTION, "a group index is out of range"): Case(
        "gptq", f"{DOWN}.g_idx", replaced(f"{DOWN}.g_idx", one(99)), base=True
    ),
    (RECONSTRUCTION, "a scale is NaN"): Case(
        FP8, f"{OUT}.weight_scale", replaced(f"{OUT}.weight_scale", one(np.nan)), base=True
    ),
    (RECONSTRUCTION, "a scale is negative"): Case(
        FP8, f"{OUT}.weight_scale", replaced(f"{OUT}.weight_scale", np.negative), base=True
    ),
    (RECONSTRUCTION, "E8M0 scales are zero"): Case(
        "modelopt_mxfp8",
        f"{OUT}.weight_scale",
        replaced(f"{OUT}.weight_scale", np.zeros_like),
        base=True,
    ),
}
LISTS = ("ignore", "exclude_modules")


def findings(case: Case, folder: Path) -> list[Finding]:
    """Return the errors and warnings of a case."""
    checkpoint, base = build(FORMATS[case.format])
    if case.edit is not None:
        case.edit(checkpoint)
    path = checkpoint.write(folder / "ckpt")
    if case.on_disk is not None:
        case.on_disk(path)
    against = base.write(folder / "base") if case.base else None
    report = verifier.check(path, base=against, depth="payload", tp=case.tp)
    return [f for f in report.findings if f.severity != "info"]


def is_at(finding: Finding, place: str) -> bool:
    where = finding.where
    return place in f"{where.tensor or ''} {where.file or ''} {finding.message}"


@pytest.mark.parametrize("handoff", HANDOFFS, ids=lambda h: f"{h.rule}: {h.cause}")
def test_what_a_rule_skips_is_reported_by_the_other(handoff: Handoff, tmp_path: Path) -> None:
    case = CASES[handoff.rule, handoff.cause]
    found = findings(case, tmp_path)
    shown = [(f.rule, f.message, f.where.tensor) for f in found]
    assert any(f.rule in handoff.reporters and is_at(f, case.place) for f in found), shown
    silent = SHARED if handoff.rule == RECONSTRUCTION else (handoff.rule,)
    skipping = [r for r in silent if r not in handoff.reporters]
    assert not [f for f in found if f.rule in skipping and is_at(f, case.place)], shown


def test_every_cause_has_a_case() -> None:
    assert {(h.rule, h.cause) for h in HANDOFFS} == set(CASES)


ROOT = Path(verifier.__file__).parent
COMMENT = re.compile(r"#[^\n]*\bQC\d{3}\b[^\n]*")
MEASURED = ("QC702",)
"""Rules of depth eval, which need scores."""


def test_every_comment_that_names_another_rule_is_in_the_table() -> None:
    """A rule that skips a case names the other rule in a comment."""
    listed: dict[str, set[str]] = {}
    for handoff in HANDOFFS:
        listed.setdefault(handoff.rule, set()).update(handoff.reporters)
    missing = []
    for file in sorted([*ROOT.glob("rules/qc*/qc*.py"), ROOT / "reconstruction" / "cause.py"]):
        own = file.name[:5].upper() if file.name.startswith("qc") else RECONSTRUCTION
        for comment in COMMENT.findall(file.read_text(encoding="utf-8")):
            others = set(re.findall(r"QC\d{3}", comment)) - {own}
            if own not in MEASURED and not others <= listed.get(own, set()):
                missing.append((own, comment))
    assert missing == []
