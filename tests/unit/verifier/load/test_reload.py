# SPDX-License-Identifier: Apache-2.0
"""Depth load: what transformers makes of a decoded checkpoint, and what QC606 and QC608 say of
it.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

transformers = pytest.importorskip("transformers")

import verifier  # noqa: E402
from tests import sparse  # noqa: E402
from tests.paths import ROOT, TESTS  # noqa: E402
from verifier.checkpoint import open_checkpoint, special_floats  # noqa: E402
from verifier.cli import cli  # noqa: E402
from verifier.errors import MissingExtra, UsageError  # noqa: E402
from verifier.findings import Report, rules_of  # noqa: E402
from verifier.load.reload import PROMPT, prompt, reload  # noqa: E402
from verifier.rules import all_rules  # noqa: E402
from verifier.selftest import CORRUPTORS, CheckpointEditor, Corruptor  # noqa: E402

DATA = TESTS / "data" / "modelopt"
GOLDEN = ROOT / "goldens" / "minimax-m3-tiny"
QWEN, QWEN_BASE = DATA / "qwen3moe_nvfp4_experts_max", DATA / "src_qwen3moe"
TWINS = {"golden": (GOLDEN / "mxfp8", GOLDEN / "bf16"), "qwen": (QWEN, QWEN_BASE)}
LOAD = [c for c in CORRUPTORS if all_rules()[c.rule].depth == "load"]
EXPERT = "model.layers.1.mlp.experts.3"


def check(path: Path, **options: object) -> Report:
    """Judge by the rules of depth load alone."""
    return verifier.check(path, depth="load", select="QC606,QC608", **options)  # type: ignore[arg-type]


def coverage(report: Report) -> tuple[int, int, str]:
    """Return what QC608 examined, of how much, and why not the rest."""
    (found,) = (c for c in report.coverage if c.rule == "QC608")
    return found.checked, found.of, found.reason


def copied(source: Path, target: Path) -> Path:
    """Copy a folder's files, writable whatever the source's mode."""
    target.mkdir(parents=True)
    for file in source.iterdir():
        shutil.copyfile(file, target / file.name)
    return target


@pytest.fixture
def qwen(tmp_path: Path) -> CheckpointEditor:
    """Return a copy of the NVFP4 export that NVIDIA ModelOpt wrote of a tiny Qwen3-MoE."""
    return CheckpointEditor(copied(QWEN, tmp_path / "ckpt"))


@pytest.mark.parametrize("name", TWINS)
def test_a_sound_checkpoint_loads(name: str) -> None:
    path, base = TWINS[name]
    report = check(path, base=base)
    assert report.verdict == "passed"
    assert rules_of(report.findings) <= {"QC606"}
    assert rules_of(report.findings, "error") == rules_of(report.findings, "warning") == set()
    checked, of, reason = coverage(report)
    assert (checked, reason) == (of, "")
    assert of > 20


def test_the_fixed_prompt_runs_and_is_near_the_base() -> None:
    found = reload(open_checkpoint(str(GOLDEN / "mxfp8")), open_checkpoint(str(GOLDEN / "bf16")))
    assert found.forward is not None
    assert (found.forward.positions, found.forward.broken) == (PROMPT, 0)
    assert found.forward.distance is not None and 0.001 < found.forward.distance < 0.1
    assert found.native
    same = reload(open_checkpoint(str(GOLDEN / "bf16")), open_checkpoint(str(GOLDEN / "bf16")))
    assert same.forward is not None and same.forward.distance == 0


@pytest.mark.parametrize("corruptor", LOAD, ids=lambda c: c.name)
def test_every_defect_of_depth_load_is_told(corruptor: Corruptor, tmp_path: Path) -> None:
    path, base = TWINS["golden"]
    broken = copied(path, tmp_path / "ckpt")
    place = corruptor.apply(broken)
    report = verifier.check(broken, base=base, depth="load")
    reported = [f for f in report.by_rule(corruptor.rule) if f.severity == corruptor.severity]
    assert reported
    assert place.tensor is None or place.tensor in {f.where.tensor for f in reported}
    assert rules_of(report.findings, "error") <= {corruptor.rule} | corruptor.also
    assert report.exit_code == (1 if corruptor.severity == "error" else 0)


def test_a_gate_without_its_expert_does_not_convert(qwen: CheckpointEditor) -> None:
    qwen.drop(qwen.siblings(f"{EXPERT}.gate_proj"))
    report = check(qwen.path)
    (finding,) = report.by_rule("QC608")
    assert finding.where.tensor == "model.layers.1.mlp.experts.gate_up_proj"
    assert finding.message.startswith("transformers cannot combine the parts")
    assert finding.observed.startswith("7 gate_proj.weight, 8 up_proj.weight; Concatenate: ")
    assert "Traceback" not in finding.observed
    assert coverage(report)[2] == "names and shapes do not fit the model"


def test_stacked_experts_in_a_layout_of_single_ones(tmp_path: Path) -> None:
    """In-memory names, as exporters write that save what they hold: here transformers loads them,
    and nothing is lost.
    """
    folder = CheckpointEditor(copied(QWEN_BASE, tmp_path / "ckpt"))
    for layer in range(2):
        head = f"model.layers.{layer}.mlp.experts"
        gate, up, down = (
            np.stack([folder.array(f"{head}.{i}.{leaf}.weight") for i in range(8)])
            for leaf in ("gate_proj", "up_proj", "down_proj")
        )
        folder.drop([n for n in folder.tensors() if n.startswith(f"{head}.")])
        folder.add(f"{head}.gate_up_proj", np.concatenate([gate, up], axis=1))
        folder.add(f"{head}.down_proj", down)
    found = reload(open_checkpoint(str(folder.path)), open_checkpoint(str(QWEN_BASE)))
    assert found.misfits == ()
    assert found.forward is not None and found.forward.distance == 0
    names = verifier.check(folder.path).findings
    assert {f.rule for f in names} == {"QC203"}  # vLLM does not read them


def test_gate_and_up_exchanged_throughout_is_far_from_the_base(tmp_path: Path) -> None:
    path, base = TWINS["golden"]
    folder = CheckpointEditor(copied(path, tmp_path / "ckpt"))
    modules = folder.modules()
    names = {}
    for module in modules:
        head, _, leaf = module.rpartition(".")
        other = {"w1": "w3", "w3": "w1", "gate_proj": "up_proj", "up_proj": "gate_proj"}.get(leaf)
        if other and "vision" not in module:
            names |= {t.name: f"{head}.{other}.{part}" for part, t in modules[module].items()}
    folder.rename(names)
    assert check(folder.path).findings == ()  # no loader sees it
    (finding,) = check(folder.path, base=base).by_rule("QC608")
    assert finding.message.startswith("the logits of the fixed prompt are far from the base's")
    assert finding.where.tensor is None


def test_what_the_base_leaves_over_is_not_the_exports(
    qwen: CheckpointEditor, tmp_path: Path
) -> None:
    base = CheckpointEditor(copied(QWEN_BASE, tmp_path / "base"))
    for folder in (qwen, base):
        folder.add("model.layers.0.self_attn.extra.weight", np.ones(4, np.float32))
    assert [f.rule for f in check(qwen.path).findings if f.severity == "error"] == ["QC608"]
    report = check(qwen.path, base=base.path)
    assert report.by_rule("QC608") == ()
    assert any("base's own load" in f.message for f in report.by_rule("QC606"))


def test_formats_that_transformers_does_not_read(qwen: CheckpointEditor) -> None:
    (finding,) = check(qwen.path).findings
    assert (finding.rule, finding.severity) == ("QC606", "info")
    assert "NVFP4: transformers has no quantizer" in finding.message
    (strict,) = check(qwen.path, profile="transformers").findings
    assert (strict.severity, strict.rule) == ("error", "QC606")


def as_compressed_tensors(folder: CheckpointEditor) -> None:
    """Write ModelOpt's NVFP4 as compressed-tensors does: other leaves, divisors for global
    scales.
    """
    for module, parts in folder.modules().items():
        if "weight_scale_2" not in parts:
            continue
        scales = {
            leaf: np.float32(1) / folder.array(f"{module}.{leaf}")
            for leaf in ("weight_scale_2", "input_scale")
        }
        codes, file = folder.array(f"{module}.weight"), parts["weight"].file
        folder.drop([f"{module}.{leaf}" for leaf in ("weight", *scales)])
        folder.add(f"{module}.weight_packed", codes, file=file)
        folder.add(f"{module}.weight_global_scale", scales["weight_scale_2"].reshape(1), file=file)
        folder.add(f"{module}.input_global_scale", scales["input_scale"].reshape(1), file=file)
    declared = {
        "quant_method": "compressed-tensors",
        "format": "nvfp4-pack-quantized",
        "ignore": ["lm_head"],
    }
    folder.edit_json("config.json", lambda c: c.update({"quantization_config": declared}))
    folder.remove("hf_quant_config.json")


def test_experts_that_transformers_reads_wrong_are_decoded_here(qwen: CheckpointEditor) -> None:
    before = reload(open_checkpoint(str(qwen.path)), open_checkpoint(str(QWEN_BASE)))
    as_compressed_tensors(qwen)
    found = reload(open_checkpoint(str(qwen.path)), open_checkpoint(str(QWEN_BASE)))
    assert found.native
    assert (found.misfits, found.forward is not None) == ((), True)
    assert found.forward is not None and before.forward is not None
    assert found.forward.distance == pytest.approx(before.forward.distance, rel=0.05)
    (finding,) = check(qwen.path, base=QWEN_BASE).findings
    assert (finding.rule, finding.severity) == ("QC606", "info")
    assert "loses the global scale of experts" in finding.message
    assert check(qwen.path, profile="transformers").findings[0].severity == "error"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"model_type": "unheard_of"}, "does not know the model_type"),
        (
            {"architectures": ["OwnForCausalLM"], "auto_map": {"AutoModel": "evil.Own"}},
            "no architecture OwnForCausalLM",
        ),
        ({"architectures": ["pipeline"]}, "no architecture pipeline"),
        ({"architectures": [7]}, "architecture"),
        (
            {"num_hidden_layers": 10**12},
            "config.json declares num_hidden_layers = 1,000,000,000,000",
        ),
        (
            {"text_config": {"vision": {"depth": 10**9}}},
            "config.json declares depth = 1,000,000,000",
        ),
        ({"hidden_size": "wide"}, "cannot read config.json"),
    ],
    ids=["family", "own code", "a function", "a number", "layers", "depth", "a text"],
)
def test_what_transformers_does_not_know_is_not_judged(
    qwen: CheckpointEditor, change: dict[str, object], why: str
) -> None:
    (qwen.path / "evil.py").write_text("raise SystemExit('run')\n")
    qwen.edit_json("config.json", lambda c: c.update(change))
    report = check(qwen.path)
    assert report.verdict == "inconclusive"
    checked, of, reason = coverage(report)
    assert checked == 0 < of
    assert why in reason and str(qwen.path) not in reason
    assert "evil" not in sys.modules


def test_values_that_do_not_fit_are_not_loaded() -> None:
    found = reload(open_checkpoint(str(QWEN)), memory=100_000)
    assert found.forward is None
    assert found.misfits == ()
    assert found.why_no_values.endswith("GB are free")


def test_the_real_release_on_the_meta_device(tmp_path: Path) -> None:
    """428 billion parameters: names and shapes of all 89,614 tensors, in a process of its own that
    stays below 4 GB.
    """
    vendor = sparse.rows()
    tensors = sparse.mixed(vendor)
    config = sparse.m3_config() | {"quantization_config": sparse.release_quantization(tensors)}
    path = sparse.write(tmp_path / "m3", tensors, config, 60)
    code = (
        "import json, resource, sys\n"
        "from verifier.checkpoint import open_checkpoint\nfrom verifier.load.reload import reload\n"
        "found = reload(open_checkpoint(sys.argv[1]), memory=0)\n"
        "peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "misfits = [str(m) for m in found.misfits]\n"
        "print(json.dumps([found.reason, found.keys, misfits, found.why_no_values, peak]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    reason, keys, misfits, why, peak = json.loads(done.stdout)
    assert (reason, misfits) == ("", [])
    assert keys > 1000
    assert "1,067" in why
    assert peak < 4 << 20


def test_the_prompt_avoids_tokens_with_a_meaning() -> None:
    config = {"image_token_id": 31, "text_config": {"eos_token_id": [(7919 + 31) % 100, 5]}}
    ids = prompt(100, config)
    assert len(ids) == PROMPT
    assert not {31, 50, 5} & set(ids)
    assert max(ids) < 100
    assert prompt(1, {}) == [0] * PROMPT


def test_command_and_options(qwen: CheckpointEditor) -> None:
    done = CliRunner().invoke(
        cli, ["check", str(qwen.path), "--depth", "load", "--select", "QC6", "--format", "json"]
    )
    assert done.exit_code == 0, done.output
    said = json.loads(done.output)
    assert {c["rule"] for c in said["coverage"] if c["ran"]} == {"QC604", "QC606", "QC608"}
    with pytest.raises(UsageError, match="one of header, payload, load"):
        verifier.check(qwen.path, depth="deep")  # type: ignore[arg-type]
    first, second = (
        verifier.check(qwen.path, depth="load", select="QC608", subset=f"{i}/2") for i in (1, 2)
    )
    assert coverage(first)[0] > 20
    assert "runs in subset 1/2" in coverage(second)[2]


@pytest.mark.parametrize("module", ["torch", "transformers"])
def test_without_the_extra(module: str) -> None:
    code = (
        f"import sys; sys.modules[{module!r}] = None\n"
        "from verifier.cli import run; sys.exit(run(sys.argv[1:]))"
    )
    arguments = [sys.executable, "-c", code, "check", str(QWEN), "--depth", "load"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "needs the extra 'load': pip install 'ckptgate[load]'" in done.stderr
    assert "Traceback" not in done.stderr
    payload = subprocess.run(
        [*arguments[:-1], "payload"], capture_output=True, text=True, check=False
    )
    assert payload.returncode == 0, payload.stderr
    assert issubclass(MissingExtra, UsageError)


def test_a_tower_without_the_attention_that_its_class_has(tmp_path: Path) -> None:
    """Gemma4's audio tower has no sdpa; the model is loaded with eager attention then."""
    if not hasattr(transformers, "Gemma4ForConditionalGeneration"):
        pytest.skip("this transformers has no Gemma4")
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
    config = transformers.AutoConfig.for_model(
        "gemma4",
        text_config={
            **heads,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "vocab_size": 128,
            "global_head_dim": 32,
            "hidden_size_per_layer_input": 0,
            "num_kv_shared_layers": 0,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        vision_config={**heads, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1},
        audio_config={"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
    )
    transformers.Gemma4ForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(tmp_path)
    found = reload(open_checkpoint(str(tmp_path)))
    assert (found.reason, found.misfits, found.why_no_values) == ("", (), "")
    assert found.forward is not None


def test_numbers_that_json_does_not_have_are_read_as_transformers_writes_them() -> None:
    raw = {
        "a": [0.0, {"__float__": "Infinity"}],
        "b": {"c": {"__float__": "-Infinity"}, "d": {"__float__": "seven"}},
    }
    assert special_floats(raw) == {
        "a": [0.0, float("inf")],
        "b": {"c": float("-inf"), "d": {"__float__": "seven"}},
    }
    assert raw["a"][1] == {"__float__": "Infinity"}  # type: ignore[index]
