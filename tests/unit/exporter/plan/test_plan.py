# SPDX-License-Identifier: Apache-2.0
"""Plans: what is selected, that every tensor has one fate, and what is refused, by name."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

import exporter
import verifier
from exporter.plan import Copy, Encode, Plan, parse_layers
from exporter.recipes import Recipe, load, names
from tests import sparse
from verifier.cli import run
from verifier.errors import PlanError, UsageError
from verifier.schemes import expert_key, layer_of

NVFP4 = "nvfp4_experts_only"
EXPERT = "model.layers.1.mlp.experts.5.up_proj"


def recipe(*rules: dict[str, object]) -> Recipe:
    return Recipe.model_validate({"name": "test", "rules": rules})


def fates(plan: Plan) -> Counter[tuple[str, str]]:
    """Count the fates of each tensor that the plan reads, by origin and name."""
    found = Counter((origin, name) for origin, name, _ in plan.skipped)
    for action in plan.actions:
        if isinstance(action, Copy):
            found[action.origin, action.tensor.name] += 1
        elif isinstance(action, Encode):
            found.update(("source", w.name) for w in action.weights)
    return found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3", {3}),
        ("3-5", {3, 4, 5}),
        ("3,5", {3, 5}),
        ("0, 7-9 ,2", {0, 2, 7, 8, 9}),
        ("4-4", {4}),
        ("1,1-2", {1, 2}),
    ],
)
def test_layers_are_parsed(text: str, expected: set[int]) -> None:
    assert parse_layers(text) == expected


@pytest.mark.parametrize(
    "text",
    ["", ",", "3-", "-3", "5-3", "a", "3..5", "3;5", "1e3", "0-9999999", "3,,5", "x", "3\n-5"],
)
def test_layers_that_cannot_be_parsed_are_quoted(text: str) -> None:
    with pytest.raises(UsageError, match="is not a layer or a range"):
        parse_layers(text)


def test_every_tensor_of_the_source_has_exactly_one_fate(kit) -> None:
    plan = exporter.plan_export(kit.qwen, recipe=NVFP4, input_scale="one")
    found = fates(plan)
    assert set(found) == {("source", n) for n in kit.read(kit.qwen)}
    assert set(found.values()) == {1}
    assert plan.formats() == {"NVFP4": 48}


def test_every_tensor_of_both_checkpoints_has_exactly_one_fate(kit, vendor) -> None:
    plan = exporter.plan_export(kit.qwen, recipe=NVFP4, onto=vendor.path)
    found = fates(plan)
    owed = {("source", n) for n in kit.read(kit.qwen)} | {
        ("onto", n) for n in kit.read(vendor.path)
    }
    assert set(found) == owed
    assert set(found.values()) == {1}
    written = {s.name for s in plan.specs}
    kept = {n for n in kit.read(vendor.path) if ".experts." not in n}
    assert len(written) == len(plan.specs)
    assert {n for n in written if ".experts." not in n} == kept
    assert plan.options["input_scale"] == "one"


def test_a_merge_gives_every_tensor_exactly_one_fate(kit, vendor, tmp_path) -> None:
    from exporter.plan import merge

    for how in ("keep", "one"):
        plan = merge(
            verifier.open_checkpoint(kit.qwen_nvfp4),
            verifier.open_checkpoint(vendor.path),
            input_scale=how,
        )
        found = fates(plan)
        owed = {("source", n) for n in kit.read(kit.qwen_nvfp4)} | {
            ("onto", n) for n in kit.read(vendor.path)
        }
        assert set(found) == owed
        assert set(found.values()) == {1}


def test_the_members_of_a_fused_group_share_one_unit(kit) -> None:
    plan = exporter.plan_export(kit.qwen, recipe=NVFP4, input_scale="one")
    sizes = Counter(tuple(m.rpartition(".")[2] for m in e.modules) for e in plan.encodes)
    assert sizes == {("gate_proj", "up_proj"): 16, ("down_proj",): 16}
    for unit in plan.encodes:
        assert len({m.rpartition(".")[0] for m in unit.modules}) == 1
        assert [w.name for w in unit.weights] == [f"{m}.weight" for m in unit.modules]


def test_attention_in_nvfp4_shares_one_unit_for_q_k_v(kit) -> None:
    plan = exporter.plan_export(
        kit.llama, recipe=recipe({"roles": ["attention"], "format": "w4a16_nvfp4"})
    )
    sizes = Counter(tuple(m.rpartition(".")[2] for m in e.modules) for e in plan.encodes)
    assert sizes == {("q_proj", "k_proj", "v_proj"): 2, ("o_proj",): 2}


def test_a_group_with_two_formats_is_refused_by_name(kit) -> None:
    two = recipe(
        {"roles": ["mlp"], "format": "w4a16_nvfp4"},
        {"modules": ["model.layers.0.mlp.up_proj"], "format": "mxfp8"},
    )
    with pytest.raises(
        PlanError, match=r"one format for all: .*\.0\.mlp\.gate_proj w4a16_nvfp4, .*up_proj mxfp8"
    ):
        exporter.plan_export(kit.llama, recipe=two)


@pytest.mark.parametrize("fmt", ["w4a16_nvfp4", "mxfp8"])
def test_a_group_of_which_a_part_is_selected_is_refused(kit, fmt: str) -> None:
    """Engines build one parameter from gate_proj and up_proj; they cannot load half of it
    quantized.
    """
    with pytest.raises(PlanError, match="up_proj"):
        exporter.plan_export(kit.llama, recipe=recipe({"modules": ["*.gate_proj"], "format": fmt}))


def test_the_last_rule_that_matches_decides(kit) -> None:
    rules = recipe(
        {"roles": ["attention", "mlp"], "format": "mxfp8"},
        {"modules": ["model.layers.0.*"], "format": None},
    )
    plan = exporter.plan_export(kit.llama, recipe=rules)
    assert {layer_of(m) for e in plan.encodes for m in e.modules} == {1}
    assert plan.formats() == {"MXFP8": 7}


def test_nothing_selected_names_the_nearest_names(kit) -> None:
    with pytest.raises(
        PlanError, match="nothing matches routed_expert; the nearest names are"
    ) as caught:
        exporter.plan_export(kit.llama, recipe=NVFP4, input_scale="one")
    near = str(caught.value).rpartition(" are ")[2].split(", ")
    known = {
        n.removesuffix(".weight").replace(".0.", ".*.").replace(".1.", ".*.")
        for n in kit.read(kit.llama)
    }
    assert near
    assert set(near) <= known


def test_a_layer_without_experts_is_listed(kit) -> None:
    with pytest.raises(
        PlanError, match=r"--layers: 2, 3, 7 hold no routed experts \(layers that do: 0, 1\)"
    ):
        exporter.plan_export(kit.qwen, recipe=NVFP4, input_scale="one", layers="1-3,7")
    with pytest.raises(PlanError, match=r"layers that do: none"):
        exporter.plan_export(kit.llama, recipe="mxfp8_default", layers="0")


def test_layers_restrict_what_is_quantized(kit) -> None:
    plan = exporter.plan_export(kit.qwen, recipe=NVFP4, input_scale="one", layers="1")
    assert {layer_of(m) for e in plan.encodes for m in e.modules} == {1}
    assert plan.formats() == {"NVFP4": 24}
    assert set(fates(plan).values()) == {1}


def test_a_recipe_of_which_the_layers_leave_nothing_is_refused(kit) -> None:
    """Zero targets is an error, whichever option left none."""
    only = recipe({"modules": ["model.layers.0.*.down_proj"], "format": "mxfp8"})
    with pytest.raises(PlanError):
        exporter.plan_export(kit.qwen, recipe=only, layers="1")


@pytest.mark.parametrize("side", ["source", "onto"])
def test_unequal_expert_sets_are_refused_and_named(kit, vendor, tmp_path: Path, side: str) -> None:
    def drop(tensors: dict) -> None:
        for name in [n for n in tensors if n.startswith(f"{EXPERT}.")]:
            del tensors[name]

    whole = {"source": kit.qwen, "onto": vendor.path}
    folders = whole | {side: kit.edit(whole[side], tmp_path / "less", drop)}
    other = "onto" if side == "source" else "the source"
    with pytest.raises(
        PlanError, match=rf"expert sets differ: .*{EXPERT} is in {other} only \(1 of 1\)"
    ):
        exporter.plan_export(folders["source"], recipe=NVFP4, onto=folders["onto"])
    with pytest.raises(PlanError, match=f"expert sets differ: .*{EXPERT}"):
        exporter.merge(folders["source"], tmp_path / "out", onto=folders["onto"])
    assert not (tmp_path / "out").exists()


def test_onto_of_other_shapes_is_refused_by_name(kit, tmp_path: Path) -> None:
    def shorten(tensors: dict) -> None:
        raw = tensors[f"{EXPERT}.weight"]
        tensors[f"{EXPERT}.weight"] = raw._replace(shape=(32, 128), data=raw.data[: 32 * 128 * 2])

    onto = kit.edit(kit.qwen, tmp_path / "onto", shorten)
    with pytest.raises(
        PlanError, match=rf"{EXPERT} is \[64, 128\] in the source and \[32, 128\] in"
    ):
        exporter.plan_export(kit.qwen, recipe=NVFP4, onto=onto)


@pytest.mark.parametrize("recipe_name", [NVFP4, "mxfp8_default"])
@pytest.mark.parametrize("suffix", ["", ".weight"])
def test_stacked_experts_are_refused_by_name(
    kit, tmp_path: Path, recipe_name: str, suffix: str
) -> None:
    name = f"model.layers.0.mlp.experts.gate_up_proj{suffix}"
    tensors = {
        name: kit.bf16(4, 64, 32),
        "model.layers.0.self_attn.o_proj.weight": kit.bf16(32, 32),
    }
    source = kit.folder(tmp_path / "stacked", tensors, {"model_type": "stacked_moe"})
    with pytest.raises(PlanError, match=rf"{name} holds all experts .* \[4, 64, 32\].*stacked_moe"):
        exporter.plan_export(source, recipe=recipe_name, input_scale="one")
    with pytest.raises(PlanError, match=name):
        exporter.plan_export(kit.qwen, recipe=recipe_name, onto=source)


def test_a_source_that_is_what_the_recipe_makes_is_refused(kit) -> None:
    with pytest.raises(
        PlanError,
        match="recipe nvfp4_experts_only: all 48 modules that it selects are nvfp4 already",
    ):
        exporter.plan_export(kit.qwen_nvfp4, recipe=NVFP4, input_scale="one")
    with pytest.raises(PlanError, match="all 14 modules that it selects are mxfp8 already"):
        exporter.plan_export(kit.llama_mxfp8, recipe="mxfp8_default")


def test_w4a4_needs_a_source_of_input_scales(
    kit, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError, match="--input-scale one, or --stats"):
        exporter.plan_export(kit.qwen, recipe=NVFP4)
    assert run(["export", str(kit.qwen), str(tmp_path / "out"), "--recipe", NVFP4]) == 2
    assert not list(tmp_path.iterdir())
    assert "--input-scale one, or --stats" in capsys.readouterr().err


def test_weight_only_needs_none(kit) -> None:
    plan = exporter.plan_export(
        kit.qwen, recipe=recipe({"roles": ["routed_expert"], "format": "w4a16_nvfp4"})
    )
    assert plan.formats() == {"W4A16_NVFP4": 48}
    assert not any(s.name.endswith("input_scale") for s in plan.specs)


def test_input_scale_options_that_contradict(
    kit, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stats = kit.stats(tmp_path / "stats.safetensors", {EXPERT: 1.0})
    args = ["export", str(kit.qwen), str(tmp_path / "out"), "--recipe", NVFP4, "--input-scale"]
    assert run([*args, "one", "--stats", str(stats)]) == 2
    assert "contradict" in capsys.readouterr().err
    assert run([*args, "stats"]) == 2
    assert "--stats" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("fmt", "width", "block"), [("nvfp4", 24, 16), ("w4a16_nvfp4", 40, 16), ("mxfp8", 48, 32)]
)
def test_a_width_that_the_block_does_not_divide_is_refused(
    kit, tmp_path: Path, fmt: str, width: int, block: int
) -> None:
    name = "model.layers.0.mlp.experts.0.down_proj"
    source = kit.folder(
        tmp_path / "odd", {f"{name}.weight": kit.bf16(16, width)}, {"model_type": "qwen3_moe"}
    )
    with pytest.raises(
        PlanError, match=rf"{name}\.weight: the input dimension {width} is not a multiple .*{block}"
    ):
        exporter.plan_export(
            source, recipe=recipe({"roles": ["routed_expert"], "format": fmt}), input_scale="one"
        )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("truncated", "ends .* early"),
        ("index", "names model-9.safetensors, which is not in the directory"),
        ("config", "config.json is missing"),
        ("twice", "is in .* and in"),
    ],
)
def test_a_broken_source_is_refused(kit, tmp_path: Path, damage: str, message: str) -> None:
    source = kit.edit(kit.qwen, tmp_path / "source", lambda _t: None)
    shard = source / "model.safetensors"
    if damage == "truncated":
        shard.write_bytes(shard.read_bytes()[:-100])
    elif damage == "index":
        (source / "model.safetensors.index.json").write_text(
            '{"weight_map": {"x": "model-9.safetensors"}}'
        )
    elif damage == "config":
        (source / "config.json").unlink()
    else:
        (source / "copy.safetensors").write_bytes(shard.read_bytes())
    with pytest.raises(PlanError, match=message):
        exporter.plan_export(source, recipe=NVFP4, input_scale="one")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: x\nrules: [{roles: [mlp], format: mxfp8}]\nextra: 1\n", "extra"),
        ("name: x\nrules: [{roles: [mlp], format: mxfp8, scale: 1}]\n", "rules.0.scale"),
        ("name: x\nrules: [{roles: [teapot], format: mxfp8}]\n", 'unknown role "teapot"'),
        ("name: x\nrules: [{format: mxfp8}]\n", "needs roles, modules or both"),
        ("name: x\nrules: [{roles: [mlp]}]\n", "rules.0.format"),
        ("name: x\nrules: [{roles: [mlp], format: int3}]\n", "rules.0.format"),
        ("name: x\nrules: []\n", "rules"),
        ("name: x\n", "rules"),
        ("name: ''\nrules: [{roles: [mlp], format: mxfp8}]\n", "name"),
        ("- 1\n- 2\n", "top level"),
        ("", "top level"),
        ("name: [x\n", "invalid YAML"),
        ("name: \x00\n", "invalid YAML"),
        ("name: !!python/object/apply:os.system ['touch pwned']\nrules: []\n", "python/object"),
        ("name: 2024-99-99\n", ""),
        ("[" * 3000, ""),
    ],
    ids=[
        "unknown key",
        "unknown key of a rule",
        "unknown role",
        "rule that selects nothing",
        "no format",
        "unknown format",
        "empty rules",
        "no rules",
        "empty name",
        "a list",
        "empty file",
        "bad YAML",
        "control character",
        "python tag",
        "impossible date",
        "nested too deeply",
    ],
)
def test_a_recipe_that_the_schema_refuses(
    kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(UsageError) as caught:
        exporter.plan_export(kit.llama, recipe=str(file))
    assert str(file) in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    "name",
    ["nvfp4_expert_only", "missing.yaml", "../recipes/mxfp8_default", "", "recipe.json", "."],
)
def test_a_recipe_that_does_not_exist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.json").write_text("{}")
    assert {"mxfp8_default", "nvfp4_experts_only"} <= set(names())
    with pytest.raises(UsageError, match=f"unknown recipe .*, or one of {', '.join(names())}"):
        load(name)


def test_a_recipe_from_a_file_plans_as_the_one_in_the_package(kit, tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("name: own\nrules:\n  - {roles: [routed_expert], format: nvfp4}\n")
    own = exporter.plan_export(kit.qwen, recipe=file, input_scale="one")
    assert own.specs == exporter.plan_export(kit.qwen, recipe=NVFP4, input_scale="one").specs
    assert own.name == "own"


def test_a_plan_says_how_large_the_result_is(kit, nvfp4) -> None:
    plan = exporter.plan_export(kit.qwen, recipe=NVFP4, input_scale="one")
    tensors = kit.read(nvfp4.path)
    assert {s.name: (s.dtype, s.shape, s.nbytes) for s in plan.specs} == {
        n: (r.dtype, r.shape, len(r.data)) for n, r in tensors.items()
    }
    assert plan.nbytes == sum(len(r.data) for r in tensors.values()) == nvfp4.manifest.bytes


def test_stats_give_the_plan_its_input_scales(kit, tmp_path: Path) -> None:
    maxima = {
        n.removesuffix(".weight"): 1.0 + i
        for i, n in enumerate(kit.read(kit.qwen))
        if ".experts." in n
    }
    plan = exporter.plan_export(
        kit.qwen, recipe=NVFP4, stats=kit.stats(tmp_path / "s.safetensors", maxima)
    )
    for unit in plan.encodes:
        largest = max(maxima[m] for m in unit.modules)
        assert unit.input_scales == pytest.approx([largest / 2688] * len(unit.modules), rel=1e-6)


@pytest.fixture(scope="session")
def m3(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Write the real MiniMax-M3 as sparse files: BF16 base, the vendor's MXFP8, the published
    mix.
    """
    root = tmp_path_factory.mktemp("m3")
    rows = sparse.rows()
    release = sparse.mixed(rows)
    config = sparse.m3_config()
    return {
        "base": sparse.write(root / "bf16", sparse.bf16(rows), config, 59),
        "vendor": sparse.write(
            root / "vendor",
            rows,
            config | {"quantization_config": sparse.vendor_quantization()},
            31,
        ),
        "mixed": sparse.write(
            root / "mixed",
            release,
            config | {"quantization_config": sparse.release_quantization(release)},
            31,
        ),
    }


def test_minimax_m3_in_nvfp4(m3: dict[str, Path]) -> None:
    plan = exporter.plan_export(m3["base"], recipe=NVFP4, input_scale="one")
    assert (len(plan.specs), plan.nbytes) == (89_080, 260_310_019_072)
    assert plan.formats() == {"NVFP4": 21_888}


def test_minimax_m3_mixed(m3: dict[str, Path]) -> None:
    plan = exporter.plan_export(m3["base"], recipe=NVFP4, onto=m3["vendor"])
    assert (len(plan.specs), plan.nbytes) == (89_614, 250_091_244_544)
    modules = [m for e in plan.encodes for m in e.modules]
    assert len(modules) == len(set(modules)) == 21_888
    assert all(expert_key(m) for m in modules)
    assert {layer_of(m) for m in modules} == set(range(3, 60))
    assert Counter(len(e.modules) for e in plan.encodes) == {2: 7_296, 1: 7_296}
    published = {n: (d, s) for n, d, s in sparse.mixed(sparse.rows())}
    assert {s.name: (s.dtype, s.shape) for s in plan.specs} == published


def test_minimax_m3_layers_without_experts(m3: dict[str, Path]) -> None:
    with pytest.raises(
        PlanError, match=r"--layers: 0, 1, 2 hold no routed experts \(layers that do: 3, 4, "
    ):
        exporter.plan_export(m3["base"], recipe=NVFP4, onto=m3["vendor"], layers="0-59")


def test_the_published_mix_of_minimax_m3_passes(m3: dict[str, Path]) -> None:
    report = verifier.check(m3["mixed"])
    # Shared experts in MXFP8 beside routed ones in NVFP4 are information.
    assert (report.verdict, {(f.rule, f.severity) for f in report.findings}) == (
        "passed",
        {("QC414", "info")},
    )
    assert report.summary.contents.tensors == 89_614
    assert report.summary.contents.formats["NVFP4"] == 21_888


def test_the_published_mix_of_minimax_m3_passes_against_its_sources(m3: dict[str, Path]) -> None:
    report = verifier.check(m3["mixed"], base=m3["base"], merged_from=m3["vendor"])
    # Shared experts in MXFP8 beside routed ones in NVFP4 are information.
    assert (report.verdict, {(f.rule, f.severity) for f in report.findings}) == (
        "passed",
        {("QC414", "info")},
    )
    ran = {c.rule: c for c in report.coverage if c.ran}
    assert ran["QC516"].checked == ran["QC516"].of > 1000


def test_what_is_planned_does_not_depend_on_the_order_of_tensors(kit, tmp_path: Path) -> None:
    def reverse(tensors: dict) -> None:
        for name in list(tensors)[::-1]:
            tensors[name] = tensors.pop(name)

    shuffled = exporter.plan_export(
        kit.edit(kit.qwen, tmp_path / "s", reverse), recipe=NVFP4, input_scale="one"
    )
    plain = exporter.plan_export(kit.qwen, recipe=NVFP4, input_scale="one")
    assert set(shuffled.specs) == set(plain.specs)
    assert {e.modules for e in shuffled.encodes} == {e.modules for e in plain.encodes}
