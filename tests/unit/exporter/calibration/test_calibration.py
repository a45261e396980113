# SPDX-License-Identifier: Apache-2.0
"""Calibration: what it reads against an eager loop watched at F.linear, what it writes, refuses,
and leaves behind.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors import safe_open
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import exporter
import verifier
from exporter.calibration import CalibrationReport, calibrate, render_text
from exporter.calibration.experts import reading
from exporter.calibration.hooks import observing
from exporter.calibration.model import load_source
from exporter.calibration.names import OUTSIDE, Target, kv_targets, targets
from exporter.calibration.report import Fallback
from exporter.calibration.sites import Site, SiteStatistics, collect, problem
from exporter.calibration.stats import DEAD as NO_TOKENS
from exporter.calibration.stats import Statistics, apply_fallbacks, require_called
from exporter.calibration.texts import TextFile, batches, choose, read_texts
from exporter.cli.calibrate import calibrate as command
from exporter.recipes import Recipe, RecipeRule
from tests.paths import ROOT
from verifier.checkpoint import open_checkpoint
from verifier.errors import MachineError, NotACheckpointError, PlanError, UsageError
from verifier.load.model import load_model

NVFP4 = "nvfp4_experts_only"
GOLDEN = ROOT / "goldens" / "minimax-m3-tiny" / "bf16"
LENGTH = 24
golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"{GOLDEN} is absent")


def documents(
    vocabulary: int, count: int = 6, length: int = LENGTH, seed: int = 3
) -> list[list[int]]:
    return np.random.default_rng(seed).integers(5, vocabulary, (count, length)).tolist()


def ids_file(path: Path, rows: list[list[int]]) -> Path:
    path.write_text("".join(json.dumps({"ids": r}) + "\n" for r in rows))
    return path


def stats_of(file: Path) -> tuple[dict[str, Any], dict[str, str]]:
    with safe_open(file, "np") as opened:
        return {n: opened.get_tensor(n) for n in opened.keys()}, opened.metadata()


def maxima(file: Path, leaf: str = "input_amax") -> dict[str, float]:
    found = {}
    for name, value in stats_of(file)[0].items():
        module, _, last = name.rpartition(".")
        if last == leaf:
            assert value.shape == () and value.dtype == (
                np.int64 if leaf == "tokens" else np.float32
            )
            found[module] = value.item()
    return found


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ids_file(tmp_path_factory.mktemp("texts") / "ids.jsonl", documents(512))


def run(source: Path | str, out: Path, file: Path, **options: Any) -> CalibrationReport:
    given = {"recipe": NVFP4, "texts": [file], "samples": [6], "seq_len": LENGTH} | options
    return calibrate(source, out, **given)


@pytest.fixture(scope="module")
def qwen(
    kit, ids: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, CalibrationReport]:
    """Calibrate every linear of the Qwen3-MoE source."""
    out = tmp_path_factory.mktemp("qwen") / "stats.safetensors"
    return out, run(kit.qwen, out, ids, recipe="nvfp4_default")


# against another opinion: the eager loop, watched where every linear layer ends


def watch(
    model: Any, rows: list[list[int]], names: dict[int, list[str]], monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """Return (input maximum, tokens) by hub name; weights are told apart by their address."""
    found: dict[str, Any] = {n: (0.0, 0) for group in names.values() for n in group}
    true = torch.nn.functional.linear

    def linear(
        x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        for name in names.get(weight.data_ptr(), []):
            amax, tokens = found[name]
            found[name] = (
                max(amax, x.abs().max().float().item()),
                tokens + x.numel() // x.shape[-1],
            )
        return true(x, weight, bias)

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(torch.nn.functional, "linear", linear)
        for row in rows:
            model(input_ids=torch.tensor([row]), use_cache=False)
    return found


def qwen_names(model: Any) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters():
        if name.endswith("experts.gate_up_proj") or name.endswith("experts.down_proj"):
            stem, _, leaf = name.rpartition(".")
            for e in range(parameter.shape[0]):
                leaves = ["gate_proj", "up_proj"] if leaf == "gate_up_proj" else ["down_proj"]
                found[parameter[e].data_ptr()] = [f"{stem}.{e}.{x}" for x in leaves]
        elif "_proj." in name:
            found[parameter.data_ptr()] = [name.removesuffix(".weight")]
    return found


def m3_names(model: Any) -> dict[int, list[str]]:
    """Return hub names by address, written from the layout of the release and not from
    transformers' mapping.
    """
    found: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters():
        if (
            not name.startswith("model.language_model.layers.")
            or "_proj" not in name
            or ".indexer." in name
        ):
            continue
        hub = name.removesuffix(".weight").replace(
            "model.language_model.", "language_model.model.", 1
        )
        stem, _, leaf = hub.rpartition(".")
        if stem.endswith(".mlp.experts"):
            stem = stem.replace(".mlp.", ".block_sparse_moe.")
            for e in range(parameter.shape[0]):
                leaves = ["w1", "w3"] if leaf == "gate_up_proj" else ["w2"]
                found[parameter[e].data_ptr()] = [f"{stem}.{e}.{x}" for x in leaves]
            continue
        stem = stem.replace(".mlp.shared_experts", ".block_sparse_moe.shared_experts")
        leaves = ["gate_proj", "up_proj"] if leaf == "gate_up_proj" else [leaf]
        found[parameter.data_ptr()] = [f"{stem}.{x}" for x in leaves]
    return found


def test_qwen_equals_the_eager_loop(kit, qwen, monkeypatch: pytest.MonkeyPatch) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        kit.qwen, dtype=torch.bfloat16, experts_implementation="eager"
    )
    seen = watch(model, documents(512), qwen_names(model), monkeypatch)
    out, report = qwen
    assert maxima(out) == {n: a for n, (a, _) in seen.items()}
    assert maxima(out, "tokens") == {n: t for n, (_, t) in seen.items()}
    assert report.modules == len(seen) == 2 * (4 + 8 * 3)
    assert sum(report.layers[0].tokens) == 2 * 6 * LENGTH == 2 * report.tokens


@golden
def test_m3_equals_the_eager_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = documents(2048, count=4, length=48)
    out = tmp_path / "stats.safetensors"
    report = run(
        GOLDEN,
        out,
        ids_file(tmp_path / "t.jsonl", rows),
        recipe="nvfp4_default",
        samples=[4],
        seq_len=48,
    )
    loaded = load_model(str(GOLDEN)).model
    loaded.set_experts_implementation("eager")
    seen = watch(loaded, rows, m3_names(loaded), monkeypatch)
    assert maxima(out) == {n: a for n, (a, t) in seen.items() if t} | {
        f.name: f.value for f in report.fallbacks
    }
    assert maxima(out, "tokens") == {n: t for n, (_, t) in seen.items()}
    assert {n for n in seen if n.endswith(".w1")} == {
        f"{x.container}.{e}.w1" for x in report.layers for e in range(8)
    }


def test_mixtral_equals_the_eager_loop(
    ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = transformers.AutoConfig.for_model(
        "mixtral",
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        num_local_experts=4,
        vocab_size=512,
    )
    torch.manual_seed(7)
    model = transformers.MixtralForCausalLM(config).to(torch.bfloat16).eval()
    model.save_pretrained(tmp_path / "source")
    model.set_experts_implementation("eager")
    experts = model.model.layers[0].mlp.experts
    hub = "model.layers.0.block_sparse_moe.experts"
    names = {
        experts.gate_up_proj[e].data_ptr(): [f"{hub}.{e}.w1", f"{hub}.{e}.w3"] for e in range(4)
    }
    names |= {experts.down_proj[e].data_ptr(): [f"{hub}.{e}.w2"] for e in range(4)}
    run(tmp_path / "source", tmp_path / "stats", ids)
    seen = watch(model, documents(512), names, monkeypatch)
    assert maxima(tmp_path / "stats") == {n: a for n, (a, _) in seen.items()}
    assert maxima(tmp_path / "stats", "tokens") == {n: t for n, (_, t) in seen.items()}


def test_kv_maxima_are_those_of_what_the_cache_holds(kit, qwen) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        kit.qwen, dtype=torch.bfloat16, experts_implementation="eager"
    )
    expected: dict[tuple[str, str], float] = {}
    with torch.no_grad():
        for row in documents(512):
            cache = model(input_ids=torch.tensor([row]), use_cache=True).past_key_values
            for i, layer in enumerate(cache.layers):
                for kind, states in (("k", layer.keys), ("v", layer.values)):
                    key = f"model.layers.{i}.self_attn.{kind}_proj", kind
                    expected[key] = max(expected.get(key, 0.0), states.abs().max().item())
    out, report = qwen
    assert maxima(out, "k_amax") == {n: v for (n, k), v in expected.items() if k == "k"}
    assert maxima(out, "v_amax") == {n: v for (n, k), v in expected.items() if k == "v"}
    assert report.kv == 4


def tiny(name: str, **more: Any) -> Any:
    """Build one experts module of a family, float32, with weights that its forward can tell
    apart.
    """
    config = transformers.AutoConfig.for_model(name, hidden_size=32, num_hidden_layers=1, **more)
    found = transformers.AutoModel.from_config(config.get_text_config(), dtype=torch.float32)
    module = next(m for n, m in found.named_modules() if n.endswith(".experts"))
    generator = torch.Generator().manual_seed(5)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    module.config._experts_implementation = "eager"
    return module


FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {
        "intermediate_size": 48,
        "num_local_experts": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    },
    "gpt_oss": {
        "intermediate_size": 48,
        "num_local_experts": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
    },
    "nemotron_h": {
        "n_routed_experts": 4,
        "moe_intermediate_size": 48,
        "layers_block_type": ["moe"],
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "moe_shared_expert_intermediate_size": 48,
        "intermediate_size": 48,
    },
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_reading_implementation_computes_what_the_eager_one_does(family: str) -> None:
    module = tiny(family, **FAMILIES[family])
    generator = torch.Generator().manual_seed(9)
    hidden = torch.randn(
        (7, module.down_proj.shape[-1 if module.is_transposed else 1]), generator=generator
    )
    chosen = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(7)])
    weights = torch.rand((7, 2), generator=generator)
    sites = (Site(4), Site(4))
    with torch.no_grad():
        expected = module(hidden, chosen, weights)
        ours = reading({module: sites})(module, hidden, chosen, weights)
        unread = reading({})(module, hidden, chosen, weights)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(ours, unread)
    seen = collect(sites)[sites[0]]
    for e in range(4):
        rows = hidden[(chosen == e).any(-1)]
        assert seen.tokens[e] == len(rows)
        assert seen.amax[e] == (rows.abs().max().item() if len(rows) else 0.0)


def test_a_choice_beyond_the_last_expert_is_no_expert() -> None:
    module = tiny("mixtral", **FAMILIES["mixtral"])
    hidden, chosen = torch.ones((2, 32)), torch.tensor([[0, 4], [4, 3]])
    site = Site(4)
    with torch.no_grad():
        reading({module: (site, Site(4))})(module, hidden, chosen, torch.ones((2, 2)))
    assert collect([site])[site].tokens == (1, 0, 0, 1)


# from stats to a checkpoint that passes


@pytest.mark.parametrize("recipe", [NVFP4, "nvfp4_default"])
def test_stats_export_and_check(kit, qwen, ids: Path, tmp_path: Path, recipe: str) -> None:
    out = qwen[0]
    if recipe == NVFP4:
        out = tmp_path / "stats.safetensors"
        report = run(kit.qwen, out, ids)
        assert (
            [x.seen for x in report.layers] == [8, 8]
            and report.modules == 48
            and not report.fallbacks
        )
        assert maxima(out) == {n: v for n, v in maxima(qwen[0]).items() if ".experts." in n}
    made = exporter.export(kit.qwen, tmp_path / "made", recipe=recipe, stats=out)
    assert made.formats == {"NVFP4": len(maxima(out))}
    judged = verifier.check(tmp_path / "made", base=kit.qwen, depth="payload")
    assert (judged.verdict, judged.findings) == ("passed", ())
    written, given = kit.read(tmp_path / "made"), maxima(out)
    pair = "model.layers.1.mlp.experts.5."
    largest = np.float32(max(given[f"{pair}gate_proj"], given[f"{pair}up_proj"]) / 2688.0)
    assert (
        written[f"{pair}up_proj.input_scale"].array()
        == written[f"{pair}gate_proj.input_scale"].array()
        == largest
    )


def test_llama_has_no_experts(kit, ids: Path, tmp_path: Path) -> None:
    out = tmp_path / "stats.safetensors"
    report = run(kit.llama, out, ids, recipe="nvfp4_mlp_only")
    assert (report.modules, report.layers, report.dead, report.kv) == (6, (), (), 4)
    assert maxima(out)["model.layers.0.mlp.gate_proj"] == maxima(out)["model.layers.0.mlp.up_proj"]
    exporter.export(kit.llama, tmp_path / "made", recipe="nvfp4_mlp_only", stats=out)
    assert verifier.check(tmp_path / "made", base=kit.llama, depth="payload").verdict == "passed"


@golden
def test_m3_stats_export_and_check(tmp_path: Path) -> None:
    file, out = tmp_path / "a.txt", tmp_path / "stats.safetensors"
    rng = np.random.default_rng(1)
    words = [
        "river",
        "the",
        "of",
        "castle",
        "1914",
        "music",
        "in",
        "and",
        "was",
        "season",
        "game",
        "album",
    ]
    file.write_text("\n\n".join(" ".join(rng.choice(words, 40)) for _ in range(40)))
    report = run(GOLDEN, out, file, samples=[12], seq_len=64, batch_size=4, min_tokens=4)
    assert [len(x.tokens) for x in report.layers] == [8, 8, 8]
    assert report.modules == 72 and report.tokens == 12 * 64
    made = exporter.export(GOLDEN, tmp_path / "made", recipe=NVFP4, stats=out)
    assert made.formats["NVFP4"] == 72
    assert verifier.check(tmp_path / "made", base=GOLDEN, depth="payload").verdict == "passed"


@golden
def test_kv_is_that_of_the_language_model_and_of_what_was_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, where = load_source(open_checkpoint(GOLDEN), "cpu")
    found = kv_targets(model, where)
    assert len(found) == 8 and all(
        n.startswith("language_model.model.layers.") and ".self_attn." in n for n in found
    )
    monkeypatch.setattr(
        "exporter.calibration.run.kv_targets", lambda *_: {"vision.k_proj.k_amax": (99, "k")}
    )
    report = run(
        GOLDEN, tmp_path / "stats", ids_file(tmp_path / "t.jsonl", documents(2048, 2)), samples=[2]
    )
    assert report.kv == 0 and maxima(tmp_path / "stats", "k_amax") == {}


@golden
def test_m3_routes_by_the_float32_values_of_the_file() -> None:
    model, _ = load_source(open_checkpoint(GOLDEN), "cpu")
    held = {n: t for n, t in model.state_dict().items() if ".gate." in n}
    assert held and {t.dtype for t in held.values()} == {torch.float32}


def test_a_router_that_cannot_run_in_float32_keeps_the_models_dtype(
    kit, ids: Path, tmp_path: Path
) -> None:
    def widen(tensors: dict) -> None:
        for name in [n for n in tensors if n.endswith("mlp.gate.weight")]:
            tensors[name] = kit.raw(tensors[name].array().astype(np.float32))

    source = kit.edit(kit.qwen, tmp_path / "source", widen)
    run(source, tmp_path / "stats.safetensors", ids)
    model, _ = load_source(open_checkpoint(source), "cpu")
    assert model.model.layers[0].mlp.gate.weight.dtype == torch.bfloat16


# dead experts, bad values, fallbacks

DEAD = "model.layers.1.mlp.experts.5"


@pytest.fixture(scope="module")
def with_dead(kit, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Edit layer 1's router: of two rows and their negatives two are above zero, so expert 5 (zero)
    is never chosen.
    """

    def edit(tensors: dict) -> None:
        rows = tensors["model.layers.1.mlp.gate.weight"].array().copy()
        rows[2], rows[3], rows[5] = -rows[0], -rows[1], 0
        tensors["model.layers.1.mlp.gate.weight"] = kit.raw(rows)

    return kit.edit(kit.qwen, tmp_path_factory.mktemp("dead") / "source", edit)


def test_a_dead_expert_is_listed_and_gets_the_largest_of_the_others(
    with_dead: Path, ids: Path, tmp_path: Path
) -> None:
    out = tmp_path / "stats.safetensors"
    report = run(with_dead, out, ids, min_tokens=100)
    values, tokens = maxima(out), maxima(out, "tokens")
    assert report.dead == (DEAD,) and report.layers[1].seen == 7 and report.layers[1].tokens[5] == 0
    assert {f.name for f in report.fallbacks} == {
        f"{DEAD}.{x}" for x in ("gate_proj", "up_proj", "down_proj")
    }
    for f in report.fallbacks:
        leaf = f.name.rpartition(".")[2]
        others = {e: values[f"model.layers.1.mlp.experts.{e}.{leaf}"] for e in range(8) if e != 5}
        assert values[f.name] == f.value == max(others.values())
        assert values[f.taken_from] == f.value and tokens[f.name] == 0 and f.condition == NO_TOKENS
    assert (
        dict(report.few)
        == {
            f"{x.container}.{e}": t
            for x in report.layers
            for e, t in enumerate(x.tokens)
            if 0 < t < 100
        }
        != {}
    )
    text = render_text(report)
    for said in (
        "dead      1 expert without tokens: " + DEAD,
        "fallback  3 statistics (expert without tokens",
        "warning",
    ):
        assert said in text
    assert "7 of 8 with tokens" in text
    metadata = stats_of(out)[1]
    assert json.loads(metadata["dead_experts"]) == {"model.layers.1.mlp.experts": [5]}
    assert {f[0] for f in json.loads(metadata["fallbacks"])} == {f.name for f in report.fallbacks}
    exporter.export(with_dead, tmp_path / "made", recipe=NVFP4, stats=out)
    assert verifier.check(tmp_path / "made", base=with_dead, depth="payload").verdict == "passed"


def test_a_recipe_that_takes_some_experts_names_them_right(
    with_dead: Path, ids: Path, tmp_path: Path
) -> None:
    rule = RecipeRule(modules=("model.layers.1.mlp.experts.[4-6].*",), format="nvfp4")
    report = run(with_dead, tmp_path / "stats", ids, recipe=Recipe(name="some", rules=(rule,)))
    (layer,) = report.layers
    assert (layer.experts, layer.seen, report.dead, report.modules) == ((4, 5, 6), 2, (DEAD,), 9)
    assert json.loads(stats_of(tmp_path / "stats")[1]["dead_experts"]) == {
        "model.layers.1.mlp.experts": [5]
    }
    taken = maxima(tmp_path / "stats")
    assert taken[f"{DEAD}.up_proj"] == max(
        taken[f"model.layers.1.mlp.experts.{e}.up_proj"] for e in (4, 6)
    )


def test_a_dead_expert_can_be_refused(with_dead: Path, ids: Path, tmp_path: Path) -> None:
    with pytest.raises(
        PlanError, match=rf"1 expert without tokens: {DEAD}; .*--on-dead-expert fallback"
    ):
        run(with_dead, tmp_path / "stats.safetensors", ids, on_dead_expert="error")
    assert list(tmp_path.iterdir()) == []


def test_a_layer_whose_input_is_zero(kit, ids: Path, tmp_path: Path) -> None:
    name = "model.layers.0.post_attention_layernorm.weight"
    source = kit.edit(
        kit.llama,
        tmp_path / "source",
        lambda t: t.update({name: kit.raw(np.zeros(128, ml_dtypes.bfloat16))}),
    )
    out = tmp_path / "stats.safetensors"
    with pytest.raises(
        PlanError, match=r"3 statistics without a valid scale: .*layers\.0\.mlp\.gate_proj \(zero\)"
    ):
        run(source, out, ids, recipe="nvfp4_mlp_only")
    report = run(source, out, ids, recipe="nvfp4_mlp_only", on_bad_stat="fallback")
    zero = [
        f
        for f in report.fallbacks
        if f.condition == "zero: the largest of the same projection in other layers"
    ]
    assert [f.name.rpartition(".")[2] for f in zero] == ["down_proj", "gate_proj", "up_proj"]
    assert all(
        f.taken_from == f.name.replace(".0.", ".1.") and f.value == maxima(out)[f.taken_from]
        for f in zero
    )


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (float("nan"), "NaN"),
        (float("inf"), "infinite"),
        (float("-inf"), "infinite"),
        (-1.0, "negative"),
        (0.0, "zero"),
        (1e-36, "tiny"),
        (2688 * 2.0**-126 * 0.999, "tiny"),
        (1e39, "huge"),
    ],
)
def test_every_bad_value_has_its_name(value: float, said: str) -> None:
    assert problem(value) == said
    name = "model.layers.0.mlp.experts.{}.down_proj".format
    amax, tokens = {name(0): 2.0, name(1): value, name(2): 3.0}, {name(e): 9 for e in range(3)}
    with pytest.raises(
        PlanError, match=rf"1 statistic without a valid scale: .*experts\.1\.down_proj \({said}\)"
    ):
        apply_fallbacks(Statistics(amax, tokens), on_bad="error", on_dead="fallback")
    settled = apply_fallbacks(Statistics(amax, tokens), on_bad="fallback", on_dead="error")
    assert settled.amax == {name(0): 2.0, name(1): 3.0, name(2): 3.0}
    assert settled.fallbacks == [
        Fallback(name(1), f"{said}: the largest of the layer's other experts", 3.0, name(2))
    ]


@pytest.mark.parametrize("value", [2688 * 2.0**-126, 1e-30, 1.0, 3.4e38])
def test_values_that_give_a_normal_scale_are_good(value: float) -> None:
    assert problem(value) is None
    assert np.float32(value / 2688.0) >= np.finfo(np.float32).tiny


def test_a_fallback_with_nothing_to_take_from_is_refused() -> None:
    name = "model.layers.{}.mlp.experts.{}.down_proj".format
    amax = {name(0, 0): 0.0, name(0, 1): float("nan"), name(1, 0): 1.0}
    tokens = {name(0, 0): 0, name(0, 1): 5, name(1, 0): 5}
    with pytest.raises(
        PlanError,
        match=r"layers\.0.*: expert without tokens, and the layer's other experts have no valid",
    ):
        apply_fallbacks(Statistics(amax, tokens), on_bad="fallback", on_dead="fallback")


def test_kv_values_are_judged_too() -> None:
    name = "model.layers.{}.self_attn.k_proj.k_amax".format
    kv = {name(0): float("inf"), name(1): 2.0}
    with pytest.raises(PlanError, match=r"k_amax \(infinite\)"):
        apply_fallbacks(Statistics(kv=kv), on_bad="error", on_dead="fallback")
    assert apply_fallbacks(Statistics(kv=kv), on_bad="fallback", on_dead="fallback").kv == {
        name(0): 2.0,
        name(1): 2.0,
    }


def test_a_module_without_any_call_is_an_error() -> None:
    alone, expert = "model.visual.fc1", "model.layers.0.mlp.experts.{}.down_proj".format
    with pytest.raises(PlanError, match=r"1 module without any input: model\.visual\.fc1"):
        require_called([alone], {alone: 0})
    with pytest.raises(PlanError, match="2 modules without any input"):
        require_called([expert(0), expert(1)], {expert(0): 0, expert(1): 0})
    require_called([expert(0)], {expert(0): 0, expert(1): 4})


@golden
def test_a_module_that_text_never_reaches_is_named(tmp_path: Path) -> None:
    rule = RecipeRule(modules=("vision_tower.*.fc1", "*.experts.*"), format="nvfp4")
    file = ids_file(tmp_path / "t.jsonl", documents(2048, 2))
    with pytest.raises(PlanError, match=r"modules? without any input: vision_tower.*\.fc1"):
        run(
            GOLDEN,
            tmp_path / "stats.safetensors",
            file,
            recipe=Recipe(name="v", rules=(rule,)),
            samples=[2],
        )


# nothing stays behind


def traces(model: Any) -> dict[str, Any]:
    hooks = {n: len(m._forward_hooks) + len(m._forward_pre_hooks) for n, m in model.named_modules()}
    configs = {n: m.config for n, m in model.named_modules() if hasattr(m, "config")}
    implementations = {n: c._experts_implementation for n, c in configs.items()}
    return {
        "hooks": hooks,
        "implementations": implementations,
        "registry": sorted(ALL_EXPERTS_FUNCTIONS),
    }


@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
@pytest.mark.parametrize("fails", [True, False])
def test_everything_is_as_before(kit, implementation: str, fails: bool) -> None:
    checkpoint = open_checkpoint(kit.qwen)
    model, where = load_source(checkpoint, "cpu")
    model.set_experts_implementation(implementation)
    wanted = [n.removesuffix(".weight") for n in checkpoint.tensors if "_proj." in n]
    spots, kv = targets(model, where, wanted), kv_targets(model, where)
    given = torch.tensor(documents(512, 1))
    with torch.inference_mode():
        output = model(input_ids=given).logits
    before, state = traces(model), {n: t.clone() for n, t in model.state_dict().items()}

    def boom(*_: Any) -> None:
        raise ZeroDivisionError("in the middle")

    bomb = model.model.layers[1].register_forward_pre_hook(boom) if fails else None
    with observing(model, spots, kv.values()) as readers, torch.inference_mode():
        inside = traces(model)
        assert sum(inside["hooks"].values()) == 8 + fails and inside["implementations"][
            ""
        ].startswith("ckptgate_")
        if fails:
            with pytest.raises(ZeroDivisionError):
                model(input_ids=given)
        else:
            model(input_ids=given)
    if bomb is not None:
        bomb.remove()
    assert sum(s.called for s in {*readers.inputs.values()}) == (6 if fails else 12)
    assert traces(model) == before
    after = model.state_dict()
    assert list(after) == list(state) and all(torch.equal(after[n], t) for n, t in state.items())
    with torch.inference_mode():
        assert torch.equal(model(input_ids=given).logits, output)


def test_the_context_cleans_up_when_the_body_raises(kit) -> None:
    checkpoint = open_checkpoint(kit.qwen)
    model, where = load_source(checkpoint, "cpu")
    spots = targets(
        model, where, ["model.layers.0.mlp.experts.0.up_proj", "model.layers.0.self_attn.q_proj"]
    )
    before = traces(model)
    with pytest.raises(ZeroDivisionError), observing(model, spots, ()):
        raise ZeroDivisionError
    assert traces(model) == before
    lost = Target("x", "model.no.such", "linear", 0)
    with pytest.raises(AttributeError), observing(model, [*spots, lost], ()):
        pass
    assert traces(model) == before


def test_a_full_disk_leaves_nothing(
    kit, ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("verifier.files.os.fsync", full)
    with pytest.raises(MachineError, match="No space"):
        run(kit.llama, tmp_path / "stats", ids, recipe="nvfp4_mlp_only")
    assert list(tmp_path.iterdir()) == []


def test_progress_counts_sequences_and_no_gradient_is_kept(kit, ids: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int, bool]] = []
    run(
        kit.llama,
        tmp_path / "stats",
        ids,
        recipe="nvfp4_mlp_only",
        batch_size=4,
        progress=lambda done, total: calls.append((done, total, torch.is_inference_mode_enabled())),
    )
    assert calls == [(4, 6, True), (6, 6, True)]


def test_an_interruption_leaves_no_file_and_no_registration(kit, ids: Path, tmp_path: Path) -> None:
    registry = sorted(ALL_EXPERTS_FUNCTIONS)

    def stop(_done: int, _total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(kit.qwen, tmp_path / "stats.safetensors", ids, progress=stop)
    assert list(tmp_path.iterdir()) == [] and sorted(ALL_EXPERTS_FUNCTIONS) == registry


# the statistics


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("percentile", [1.0, 37.0, 99.0, 99.9, 100.0])
def test_percentile_is_that_of_all_magnitudes(dtype: torch.dtype, percentile: float) -> None:
    rng = np.random.default_rng(11)
    parts = [
        torch.from_numpy(rng.standard_normal((n, 40)) * 10.0 ** rng.integers(-3, 4)).to(dtype)
        for n in (3, 50, 7)
    ]
    site = Site(2, percentile)
    for part in parts:
        site.update(1, part)
    everything = torch.cat(parts).abs().double().numpy()
    expected = np.quantile(everything, percentile / 100, method="inverted_cdf")
    found = collect([site])[site]
    assert found.tokens == (0, 60) and found.amax[0] == 0.0
    if dtype == torch.bfloat16:
        assert found.amax[1] == expected
    else:
        assert expected <= found.amax[1] <= min(expected * (1 + 2**-7), everything.max())


def test_percentile_at_the_ends_of_the_histogram() -> None:
    site = Site(4, 50.0)
    site.update(0, torch.tensor([[0.0, 0.0, 1.0]]))
    site.update(1, torch.tensor([[2.0**30, 2.0**31, 2.0**31]]))
    site.update(2, torch.tensor([[1.0, float("inf"), 1.0]]))
    site.update(3, torch.tensor([[1.0, float("nan"), 1.0]]))
    found = collect([site])[site].amax
    assert found[:3] == (0.0, 2.0**31, float("inf")) and np.isnan(found[3])


def test_a_maximum_keeps_nan_and_infinity_and_takes_any_shape() -> None:
    sites = [Site(1) for _ in range(3)]
    sites[0].update(0, torch.tensor([[[1.0, -3.0]], [[2.0, 0.5]]], dtype=torch.bfloat16))
    sites[0].update(0, torch.zeros((0, 2)))
    for value in (1.0, float("nan"), 2.0):
        sites[1].update(0, torch.tensor([[value]]))
    unseen = sites[2]
    found = collect(sites)
    assert found[sites[0]] == SiteStatistics((3.0,), (2,)) and np.isnan(found[sites[1]].amax[0])
    assert found[unseen] == SiteStatistics((0.0,), (0,)) and not unseen.called


def test_percentile_of_a_model(kit, qwen, ids: Path, tmp_path: Path) -> None:
    full, part = tmp_path / "100.safetensors", tmp_path / "99.safetensors"
    run(kit.qwen, full, ids, method="percentile", percentile=100)
    report = run(kit.qwen, part, ids, method="percentile", percentile=99)
    most, less = maxima(full), maxima(part)
    assert most == {n: v for n, v in maxima(qwen[0]).items() if ".experts." in n}
    assert all(less[n] < most[n] for n in most)
    assert stats_of(part)[1]["method"] == report.method == "percentile 99"
    assert maxima(part, "k_amax") == maxima(qwen[0], "k_amax"), "KV is always the maximum"


def test_the_result_depends_on_the_seed_and_hardly_on_the_batch(kit, tmp_path: Path) -> None:
    file = ids_file(tmp_path / "t.jsonl", documents(512, 20, 12))
    made = {}
    for name, more in {"a": {}, "b": {}, "c": {"batch_size": 4}, "d": {"seed": 1}}.items():
        made[name] = tmp_path / name
        run(kit.qwen, made[name], file, seq_len=12, samples=[4], **more)
    assert made["a"].read_bytes() == made["b"].read_bytes()
    one, other = maxima(made["a"]), maxima(made["c"])
    assert all(abs(one[n] - other[n]) <= 0.05 * one[n] for n in one)
    assert maxima(made["d"]) != one


def test_metadata_says_what_was_done(kit, qwen, ids: Path) -> None:
    import hashlib

    metadata = stats_of(qwen[0])[1]
    said = {
        "tool": "ckptgate",
        "recipe": "nvfp4_default",
        "method": "max",
        "seed": "0",
        "batch_size": "1",
    }
    assert {k: metadata[k] for k in said} == said
    assert metadata["tokens"] == str(6 * LENGTH) and metadata["seq_len"] == str(LENGTH)
    (text,) = json.loads(metadata["texts"])
    expected = {
        "file": "ids.jsonl",
        "sha256": hashlib.sha256(ids.read_bytes()).hexdigest(),
        "samples": 6,
        "asked": 6,
    }
    assert text == expected | {"tokens": 6 * LENGTH}
    from exporter.plan import header_digest

    assert metadata["source_header_sha256"] == header_digest(open_checkpoint(kit.qwen))
    assert json.loads(metadata["dead_experts"]) == {} and json.loads(metadata["fallbacks"]) == []


# texts


def text_file(*rows: tuple[int, ...] | str) -> TextFile:
    return TextFile("t", "", rows)


def test_sequences_are_cut_joined_and_never_padded() -> None:
    file = text_file(tuple(range(10)), (20, 21), (30, 31), (40, 41))
    found = choose(file, 9, 4, "0", None)
    assert [0, 1, 2, 3] in found and [4, 5, 6, 7] in found and [8, 9] in found
    assert all(len(s) == 4 for s in found[:-2]) and sorted(map(len, found)) == [2, 2, 4, 4, 4]
    joined = next(s for s in found if s[0] >= 20 and len(s) == 4)
    assert joined[1] == joined[0] + 1 and joined[3] == joined[2] + 1
    assert choose(file, 2, 4, "0", None) == found[:2]
    assert choose(file, 9, 4, "0", None) == found


def test_long_documents_give_their_first_window_before_their_second() -> None:
    file = text_file(tuple(range(8)), tuple(range(10, 18)))
    assert sorted(choose(file, 2, 4, "0", None)) == [[0, 1, 2, 3], [10, 11, 12, 13]]
    assert len(choose(file, 99, 4, "0", None)) == 4


def test_different_seeds_choose_differently() -> None:
    file = text_file(*[(i, i) for i in range(50)])
    assert len({str(choose(file, 5, 2, str(seed), None)) for seed in range(5)}) == 5


def test_text_is_tokenized_as_far_as_needed() -> None:
    seen: list[str] = []

    def encode(text: str) -> list[int]:
        seen.append(text)
        return [len(text)] * 4

    assert choose(text_file("a", "bb", "ccc"), 1, 4, "0", encode) == [[len(seen[0])] * 4]
    assert len(seen) == 1
    with pytest.raises(ValueError, match="tokenizer"):
        choose(text_file("a"), 1, 4, "0", None)


def test_batches_hold_one_length() -> None:
    assert list(batches([[1], [2, 2], [3], [4], [5, 5]], 2)) == [
        [[2, 2], [5, 5]],
        [[1], [3]],
        [[4]],
    ]


def test_documents_of_files(tmp_path: Path) -> None:
    plain, one, rows = tmp_path / "a.txt", tmp_path / "b.md", tmp_path / "c.jsonl"
    plain.write_text("first\nline\n\n \t\n second\n\r\nthird\n")
    one.write_text("all\nof it")
    rows.write_text('{"text": "a\\n\\nb"}\n\n{"ids": [1, 2]}\n')
    assert read_texts(plain).documents == ("first\nline", " second", "third")
    assert read_texts(one).documents == ("all\nof it",)
    assert read_texts(rows).documents == ("a\n\nb", (1, 2)) and read_texts(rows).needs_tokenizer


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("a.txt", b"\n \n", "holds no document"),
        ("a.txt", b"ab\xff", "not UTF-8 at byte 2"),
        ("a.jsonl", b'{"text": "a"}\n{', "line 2: not JSON"),
        ("a.jsonl", b"[1]", "line 1: neither"),
        ("a.jsonl", b'{"ids": []}', "neither"),
        ("a.jsonl", b'{"ids": [1, true]}', "neither"),
        ("a.jsonl", b'{"ids": [-1]}', "neither"),
        ("a.jsonl", b'{"ids": "x", "text": "a"}', "neither"),
        ("a.jsonl", b"[" * 100_000, "not JSON"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, name: str, data: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(PlanError, match=said):
        read_texts(tmp_path / name)


@pytest.fixture
def with_tokenizer(kit, tmp_path: Path) -> Path:
    """Give the Llama source a tokenizer of eight words that begins every text with token 1."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    source = kit.edit(kit.llama, tmp_path / "source", lambda _: None)
    words = {w: i for i, w in enumerate(["?", "<s>", "a", "b", "c", "d", "e", "f"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="?"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer.save(str(source / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"}
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    return source


def test_text_goes_through_the_sources_tokenizer(with_tokenizer: Path, tmp_path: Path) -> None:
    text, tokens = tmp_path / "a.txt", tmp_path / "b.jsonl"
    text.write_text("a b c d\n\ne f a b")
    ids_file(tokens, [[1, 2, 3, 4, 5], [1, 6, 7, 2, 3]])
    for file in (text, tokens):
        report = run(
            with_tokenizer,
            tmp_path / f"{file.name}.st",
            file,
            recipe="nvfp4_mlp_only",
            samples=[2],
            seq_len=5,
        )
        assert report.tokens == 10
    assert maxima(tmp_path / "a.txt.st") == maxima(tmp_path / "b.jsonl.st")
    assert maxima(tmp_path / "a.txt.st", "k_amax") == maxima(tmp_path / "b.jsonl.st", "k_amax")


def test_two_files_and_fewer_samples_than_asked(kit, ids: Path, tmp_path: Path) -> None:
    short = ids_file(tmp_path / "s.jsonl", documents(512, 3, 10))
    report = run(kit.qwen, tmp_path / "stats", ids, texts=[ids, short], samples=[2, 50])
    assert [(t.asked, t.samples, t.tokens) for t in report.texts] == [
        (2, 2, 2 * LENGTH),
        (50, 1, LENGTH),
    ]
    assert "1 sample (50 requested; the file holds no more), 24 tokens" in render_text(report)


# what is refused


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"samples": [1, 2]}, "1 --texts and 2 numbers in --samples"),
        ({"texts": [], "samples": []}, "0 --texts"),
        ({"samples": [0]}, "at least 1"),
        ({"seq_len": 1}, "--seq-len at least 2"),
        ({"batch_size": 0}, "at least 1"),
        ({"min_tokens": -1}, "--min-tokens"),
        ({"method": "entropy"}, "--method entropy: use max"),
        ({"percentile": 0}, "--percentile 0"),
        ({"percentile": 100.5}, "--percentile 100.5"),
        ({"percentile": float("nan")}, "--percentile nan"),
        ({"on_bad_stat": "x"}, "--on-bad-stat x"),
        ({"on_dead_expert": "x"}, "--on-dead-expert x"),
        ({"texts": ["/no/such"]}, "/no/such: no such text file"),
        ({"recipe": "nvfp4_expert"}, "unknown recipe"),
        ({"device": "cuda:99"}, "cuda:99: this machine has no such device"),
    ],
)
def test_wrong_options(kit, ids: Path, tmp_path: Path, more: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        run(kit.qwen, tmp_path / "stats.safetensors", ids, **more)
    assert caught.value.exit_code == 2 and list(tmp_path.iterdir()) == []


def test_wrong_paths(kit, ids: Path, tmp_path: Path) -> None:
    source = kit.edit(kit.qwen, tmp_path / "source", lambda _: None)
    out = tmp_path / "stats"
    out.write_text("mine")
    for where, target, said in (
        (source, out, "already exists; use --overwrite"),
        (source, tmp_path, "is a directory"),
        (source, tmp_path / "no" / "x", "does not exist"),
        (tmp_path / "none", tmp_path / "s", "no such directory"),
        (source, source / "stats.safetensors", "in the source's directory"),
        ("memory://x", tmp_path / "s", "memory://x: not found"),
    ):
        with pytest.raises(UsageError, match=said):
            run(where, target, ids)
    assert out.read_text() == "mine"
    run(source, out, ids, overwrite=True)
    assert maxima(out) and sorted(p.name for p in tmp_path.iterdir()) == ["source", "stats"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotACheckpointError, match="is empty"):
        run(tmp_path / "empty", tmp_path / "s", ids)


@pytest.mark.parametrize("recipe", ["w4a16_nvfp4_experts_only", "mxfp8_default"])
def test_a_recipe_without_static_activations(kit, ids: Path, tmp_path: Path, recipe: str) -> None:
    with pytest.raises(
        PlanError, match=rf"{recipe} gives no module a static activation scale .*: nothing to"
    ):
        run(kit.qwen, tmp_path / "stats", ids, recipe=recipe)


def test_a_quantized_source_is_calibrated_by_its_values(kit, ids: Path, tmp_path: Path) -> None:
    """The same maxima as from a BF16 checkpoint of the values that verifier's decoder gives."""
    source = kit.llama_mxfp8
    parts, tensors = kit.read(source), {}
    for name, raw in parts.items():
        if raw.dtype == "F8_E4M3":
            scale = parts[f"{name}_scale"].array()
            values = verifier.decode({"weight": raw.array(), "weight_scale": scale}, "mxfp8")
            tensors[name] = kit.raw(values.astype(ml_dtypes.bfloat16))
        elif not name.endswith("_scale"):
            tensors[name] = raw
    config = {k: v for k, v in kit.config(source).items() if k != "quantization_config"}
    plain = kit.folder(tmp_path / "plain", tensors, config)
    for path in (source, plain):
        run(path, tmp_path / f"{path.name}.stats", ids, recipe="fp8_default")
    for leaf in ("input_amax", "k_amax", "v_amax"):
        found = maxima(tmp_path / f"{source.name}.stats", leaf)
        assert found and found == maxima(tmp_path / "plain.stats", leaf)


Change = Callable[[dict[str, Any]], object]


def edited_config(kit, path: Path, change: Change) -> Path:
    source = kit.edit(kit.qwen, path, lambda _: None)
    config = kit.config(source)
    change(config)
    (source / "config.json").write_text(json.dumps(config))
    return source


@pytest.mark.parametrize("family", OUTSIDE)
def test_families_outside_the_interface_are_refused_by_name(
    kit, ids: Path, tmp_path: Path, family: str
) -> None:
    source = edited_config(kit, tmp_path / "source", lambda c: c.update(model_type=family))
    with pytest.raises(PlanError, match=f"{family} does not use transformers' experts interface"):
        run(source, tmp_path / "stats", ids)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.update(architectures=["NoSuchModel"]), "has no architecture NoSuchModel"),
        (lambda c: c.update(model_type="no_such"), "does not know the model_type"),
        (
            lambda c: c.update(num_hidden_layers=3),
            "keys of the model missing or with a different shape, model.layers.2",
        ),
        (lambda c: c.update(hidden_size=64), "with a different shape, "),
        (
            lambda c: c.update(max_position_embeddings=8),
            "--seq-len 24 is more than the model's 8 positions",
        ),
    ],
)
def test_configs_that_do_not_fit(kit, ids: Path, tmp_path: Path, change: Change, said: str) -> None:
    source = edited_config(kit, tmp_path / "source", change)
    with pytest.raises(PlanError, match=said):
        run(source, tmp_path / "stats", ids)


def test_a_module_that_the_model_does_not_have(kit, ids: Path, tmp_path: Path) -> None:
    name = "mtp.layers.0.mlp.up_proj"
    source = kit.edit(
        kit.qwen, tmp_path / "source", lambda t: t.update({f"{name}.weight": kit.bf16(64, 128)})
    )
    recipe = Recipe(name="m", rules=(RecipeRule(modules=("mtp.*", "*.experts.*"), format="nvfp4"),))
    with pytest.raises(
        PlanError, match=rf"{name} is in the source and not in transformers' Qwen3MoeForCausalLM"
    ):
        run(source, tmp_path / "stats", ids, recipe=recipe)


def test_a_module_that_is_neither_linear_nor_experts(kit, ids: Path, tmp_path: Path) -> None:
    recipe = Recipe(name="r", rules=(RecipeRule(modules=("*.mlp.gate",), format="nvfp4"),))
    with pytest.raises(
        PlanError,
        match=r"mlp\.gate is .* of a Qwen3MoeTopKRouter in transformers: neither a linear layer",
    ):
        run(kit.qwen, tmp_path / "stats", ids, recipe=recipe)


def test_expert_numbers_with_a_gap_are_refused(kit, ids: Path, tmp_path: Path) -> None:
    def rename(tensors: dict) -> None:
        for name in [n for n in tensors if "layers.0.mlp.experts.7." in n]:
            tensors[name.replace("experts.7.", "experts.9.")] = tensors.pop(name)

    source = kit.edit(kit.qwen, tmp_path / "source", rename)
    with pytest.raises(
        PlanError, match=r"model\.layers\.0\.mlp\.experts: its expert numbers are not 0 to 7"
    ):
        run(source, tmp_path / "stats", ids)


def test_the_head_is_read_at_every_position(kit, ids: Path, tmp_path: Path) -> None:
    recipe = Recipe(name="h", rules=(RecipeRule(modules=("lm_head",), format="nvfp4"),))
    run(kit.llama, tmp_path / "stats", ids, recipe=recipe)
    assert maxima(tmp_path / "stats", "tokens") == {"lm_head": 6 * LENGTH}


def test_texts_that_do_not_fit_the_model(kit, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="token id 512, and the vocabulary has 512 entries"):
        run(kit.qwen, tmp_path / "stats", ids_file(tmp_path / "a.jsonl", [[1, 512]]))
    with pytest.raises(PlanError, match="gives no sequence of at least two tokens"):
        run(kit.qwen, tmp_path / "stats", ids_file(tmp_path / "b.jsonl", [[1]]))
    (tmp_path / "c.txt").write_text("words")
    with pytest.raises(PlanError, match="has no tokenizer; give token ids"):
        run(kit.qwen, tmp_path / "stats", tmp_path / "c.txt")


def test_stats_of_another_model_are_refused_at_export(kit, ids: Path, tmp_path: Path) -> None:
    run(kit.llama, tmp_path / "stats", ids, recipe="nvfp4_default")
    with pytest.raises(
        PlanError, match=r"no input maximum for .*; were they measured on this model"
    ):
        exporter.export(
            kit.qwen, tmp_path / "out", recipe="nvfp4_default", stats=tmp_path / "stats"
        )


# the command


def invoke(*args: object) -> tuple[str, BaseException | None]:
    done = CliRunner().invoke(command, [str(a) for a in args])
    return done.output, done.exception


def test_the_command_prints_the_report(kit, ids: Path, tmp_path: Path, qwen) -> None:
    out = tmp_path / "stats.safetensors"
    given = [
        "--recipe",
        "nvfp4_default",
        "--texts",
        ids,
        "--samples",
        "6",
        "--seq-len",
        LENGTH,
        "-o",
        out,
    ]
    text, error = invoke(kit.qwen, *given)
    assert error is None, error
    assert out.read_bytes() == qwen[0].read_bytes()
    assert f"calibrated 56 modules of {kit.qwen} (recipe nvfp4_default, method max)\n" in text
    fewest = min(qwen[1].layers[0].tokens)
    assert f"experts   model.layers.0.mlp.experts: 8 of 8 with tokens, {fewest} to " in text
    assert (
        "amax      " in text
        and "kv        4 statistics" in text
        and text.endswith(f"wrote {out}\n")
    )


def test_the_command_refuses_as_the_function_does(kit, ids: Path, tmp_path: Path) -> None:
    given = [kit.qwen, "--recipe", NVFP4, "--texts", ids, "-o", tmp_path / "s"]
    for samples, said in (
        ("1,2", "1 --texts and 2 numbers"),
        ("1,x", "--samples 1,x: use integers"),
    ):
        error = invoke(*given, "--samples", samples)[1]
        assert isinstance(error, UsageError) and said in str(error)
    assert isinstance(invoke(*given, "--samples", "1", "--seq-len", "1")[1], SystemExit)


def probe(script: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout


def test_help_needs_no_torch() -> None:
    script = (
        "import sys, exporter.cli.calibrate; "
        "print([m for m in ('torch', 'numpy', 'transformers') if m in sys.modules])"
    )
    assert probe(script) == "[]\n"


@pytest.fixture
def without() -> Iterator[Callable[[str], str]]:
    yield lambda module: probe(
        f"import sys; sys.modules['{module}'] = None\n"
        "from verifier.errors import MissingExtra\n"
        "try:\n    import exporter.calibration\nexcept MissingExtra as error:\n    print(error)"
    )


@pytest.mark.parametrize("module", ["torch", "transformers"])
def test_a_missing_extra_is_named(without: Callable[[str], str], module: str) -> None:
    assert without(module) == "calibration needs the extra 'load': pip install 'ckptgate[load]'\n"
