# SPDX-License-Identifier: Apache-2.0
"""Export and merge: the bytes, the declarations, the files around them, and what is refused with
nothing left.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest

import exporter
import verifier
from verifier.cli import run
from verifier.errors import EncodeError, PlanError, UsageError
from verifier.manifest import Manifest

NVFP4 = "nvfp4_experts_only"
EXPERT = "model.layers.1.mlp.experts.5"
WEIGHT_LEAVES = ("weight", "weight_scale", "weight_scale_2")
INDEX = "model.safetensors.index.json"


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def split(name: str) -> tuple[str, str]:
    head, _, leaf = name.rpartition(".")
    return head, leaf


# bytes


def test_nvfp4_is_byte_for_byte_what_modelopt_writes(kit, nvfp4) -> None:
    ours, theirs = kit.read(nvfp4.path), kit.read(kit.qwen_nvfp4)
    assert set(ours) == set(theirs)
    same = [n for n in theirs if not n.endswith(".input_scale")]
    assert sum(split(n)[1] in WEIGHT_LEAVES and ".experts." in n for n in same) == 3 * 48
    assert [n for n in same if ours[n] != theirs[n]] == []


def test_mxfp8_is_byte_for_byte_what_modelopt_writes(kit, llama_mxfp8) -> None:
    ours, theirs = kit.read(llama_mxfp8.path), kit.read(kit.llama_mxfp8)
    assert set(ours) == set(theirs)
    assert [n for n in theirs if ours[n] != theirs[n]] == []


def test_input_scale_one_is_one_everywhere(kit, nvfp4) -> None:
    scales = [r for n, r in kit.read(nvfp4.path).items() if n.endswith(".input_scale")]
    assert len(scales) == 48
    assert {(r.dtype, r.shape, r.array().item()) for r in scales} == {("F32", (), 1.0)}


def test_untouched_tensors_keep_bytes_and_dtype(kit, tmp_path: Path) -> None:
    extra = {
        "model.layers.0.mlp.gate.e_score_correction_bias": kit.raw(
            np.linspace(-1, 1, 8, dtype=np.float32)
        ),
        "model.layers.0.self_attn.q_norm.weight": kit.raw(np.float32([np.nan, -0.0] * 16)),
        "model.counter": kit.raw(np.arange(3, dtype=np.int64)),
        "model.scalar": kit.raw(np.array(0.1, np.float32)),
        "model.empty": kit.raw(np.zeros((0, 4), np.float32)),
        "model.layers.0.mlp.experts.3.down_proj.bias": kit.bf16(128),
    }
    source = kit.edit(kit.qwen, tmp_path / "source", lambda t: t.update(extra))
    exporter.export(source, tmp_path / "out", recipe=NVFP4, input_scale="one")
    before, after = kit.read(source), kit.read(tmp_path / "out")
    untouched = [n for n in before if ".experts." not in n or n.endswith(".bias")]
    assert len(untouched) == len(kit.read(kit.qwen)) - 48 + 5
    assert [n for n in untouched if after.get(n) != before[n]] == []


def test_a_mixed_export_takes_experts_from_the_source_and_the_rest_from_onto(
    kit, nvfp4, vendor, mixed
) -> None:
    result, experts, kept = kit.read(mixed.path), kit.read(nvfp4.path), kit.read(vendor.path)
    assert {n for n in result if ".experts." in n} == {n for n in experts if ".experts." in n}
    assert {n for n in result if ".experts." not in n} == {n for n in kept if ".experts." not in n}
    assert [n for n, r in result.items() if r != (experts if ".experts." in n else kept)[n]] == []


def test_a_mixed_export_of_some_layers(kit, nvfp4, vendor, tmp_path: Path) -> None:
    exporter.export(kit.qwen, tmp_path / "out", recipe=NVFP4, onto=vendor.path, layers="1")
    result, experts, kept = kit.read(tmp_path / "out"), kit.read(nvfp4.path), kit.read(vendor.path)
    new = "model.layers.1.mlp.experts."
    assert {n for n in result if n.startswith(new)} == {n for n in experts if n.startswith(new)}
    assert [n for n, r in result.items() if r != (experts if n.startswith(new) else kept)[n]] == []
    report = verifier.check(
        tmp_path / "out", base=kit.qwen, merged_from=vendor.path, depth="payload"
    )
    assert (report.verdict, report.findings) == ("passed", ())
    assert report.summary.contents.formats == {"NVFP4": 24, "MXFP8": 32}


def test_mixed_by_recipe_names_mxfp8_scales_as_onto_does(kit, tmp_path: Path) -> None:
    def rename(tensors: dict) -> None:
        for name in [n for n in tensors if n.endswith(".weight_scale")]:
            tensors[f"{name}_inv"] = tensors.pop(name)

    made = tmp_path / "made"
    exporter.export(kit.llama, made, recipe="mxfp8_default")
    onto = kit.edit(made, tmp_path / "onto", rename)
    (tmp_path / "r.yaml").write_text(
        "name: r\nrules: [{modules: [model.layers.0.mlp.*], format: mxfp8}]\n"
    )
    exporter.export(kit.llama, tmp_path / "out", recipe=tmp_path / "r.yaml", onto=onto)
    assert kit.read(tmp_path / "out") == kit.read(onto)


def test_the_result_depends_neither_on_workers_nor_on_shards(kit, nvfp4, tmp_path: Path) -> None:
    expected = kit.read(nvfp4.path)
    for i, options in enumerate(
        ({"workers": 1}, {"workers": 3, "shard_bytes": 60_000}, {"workers": 8, "shard_bytes": 1})
    ):
        manifest = exporter.export(
            kit.qwen, tmp_path / str(i), recipe=NVFP4, input_scale="one", **options
        )
        assert kit.read(tmp_path / str(i)) == expected
        assert manifest.formats == {"NVFP4": 48}
    one, many = tmp_path / "a" / "out", tmp_path / "b" / "out"
    for out, workers in ((one, 1), (many, 4)):
        out.parent.mkdir()
        exporter.export(
            kit.qwen, out, recipe=NVFP4, input_scale="one", workers=workers, shard_bytes=100_000
        )
    assert digests(one) == digests(many)


def test_progress_counts_every_byte(kit, nvfp4, tmp_path: Path) -> None:
    seen: list[int] = []
    exporter.export(
        kit.qwen,
        tmp_path / "out",
        recipe=NVFP4,
        input_scale="one",
        workers=1,
        shard_bytes=100_000,
        progress=seen.append,
    )
    assert sum(seen) == nvfp4.manifest.bytes


# shards and index


def test_shards_index_and_metadata(kit, tmp_path: Path) -> None:
    out = tmp_path / "out"
    exporter.export(kit.qwen, out, recipe=NVFP4, input_scale="one", shard_bytes=150_000)
    files = sorted(p.name for p in out.glob("*.safetensors"))
    assert len(files) > 3
    assert files == [
        f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)
    ]
    index = kit.config(out, INDEX)
    holds: dict[str, str] = {}
    for name in files:
        header = kit.header(out / name)
        assert header.pop("__metadata__") == {"format": "pt"}
        size = sum(e["data_offsets"][1] - e["data_offsets"][0] for e in header.values())
        assert size <= 150_000 or len(header) == 1
        start = 8 + int.from_bytes((out / name).read_bytes()[:8], "little")
        assert start % 8 == 0
        assert (out / name).stat().st_size == start + size
        for tensor, entry in header.items():
            item = {"F32": 4, "BF16": 2}.get(entry["dtype"], 1)
            assert entry["data_offsets"][0] % item == 0, f"{tensor} is not aligned"
            holds[tensor] = name
    assert index["weight_map"] == holds
    assert list(index["weight_map"]) == sorted(holds)
    assert index["metadata"]["total_size"] == sum(len(r.data) for r in kit.read(out).values())
    report = verifier.check(out, base=kit.qwen, depth="payload")
    assert (report.verdict, report.findings) == ("passed", ())


def test_safetensors_itself_reads_the_shards(nvfp4, kit) -> None:
    import torch
    from safetensors.torch import load_file

    loaded = load_file(next(nvfp4.path.glob("*.safetensors")))
    expected = kit.read(nvfp4.path)
    assert {n: t.reshape(-1).view(torch.uint8).numpy().tobytes() for n, t in loaded.items()} == {
        n: r.data for n, r in expected.items()
    }


# declarations


def test_a_mixed_checkpoint_is_declared_module_by_module(kit, mixed) -> None:
    tensors = kit.read(mixed.path)
    inline = kit.config(mixed.path)["quantization_config"]
    nested = kit.config(mixed.path, "hf_quant_config.json")
    body = nested["quantization"]
    shared = (
        "quant_algo",
        "quant_method",
        "kv_cache_quant_algo",
        "exclude_modules",
        "quantized_layers",
    )
    assert {k: inline[k] for k in shared} == {k: body[k] for k in shared} == body
    assert [inline[k] for k in shared[:3]] == ["MIXED_PRECISION", "modelopt", None]
    assert (
        inline["producer"]
        == nested["producer"]
        == {"name": "ckptgate", "version": verifier.__version__}
    )
    assert nested["quant_method"] == "modelopt"

    codes = {
        split(n)[0]: r.dtype
        for n, r in tensors.items()
        if n.endswith(".weight") and r.dtype in ("U8", "F8_E4M3")
    }
    entry = {"U8": {"quant_algo": "NVFP4", "group_size": 16}, "F8_E4M3": {"quant_algo": "MXFP8"}}
    assert inline["quantized_layers"] == {m: entry[d] for m, d in codes.items()}
    assert set(codes.values()) == {"U8", "F8_E4M3"}
    plain = {
        split(n)[0] for n, r in tensors.items() if n.endswith(".weight") and len(r.shape) >= 2
    } - set(codes)
    assert inline["exclude_modules"] == inline["ignore"] == sorted(plain)
    assert {"lm_head", "model.embed_tokens", "model.layers.0.mlp.gate"} <= plain


def test_exclusions_name_bare_and_higher_dimensional_parameters(kit, tmp_path: Path) -> None:
    extra = {
        "vision_tower.patch.weight": kit.bf16(4, 3, 2, 2),
        "model.bare": kit.bf16(4, 4),
        "model.vector": kit.bf16(4),
    }
    source = kit.edit(kit.qwen, tmp_path / "source", lambda t: t.update(extra))
    exporter.export(source, tmp_path / "out", recipe=NVFP4, input_scale="one")
    ignored = kit.config(tmp_path / "out")["quantization_config"]["ignore"]
    assert {"vision_tower.patch", "model.bare"} <= set(ignored)
    assert not any("vector" in name or name.endswith("norm") for name in ignored)


@pytest.mark.parametrize("which", ["nvfp4", "llama_mxfp8"])
def test_a_uniform_checkpoint_is_declared_as_modelopt_declares_it(
    kit, which: str, request: pytest.FixtureRequest
) -> None:
    ours = request.getfixturevalue(which).path
    theirs = {"nvfp4": kit.qwen_nvfp4, "llama_mxfp8": kit.llama_mxfp8}[which]
    inline, reference = (kit.config(f)["quantization_config"] for f in (ours, theirs))
    assert list(inline) == list(reference)
    for key in set(reference) - {"ignore", "producer"}:
        assert inline[key] == reference[key]
    nested, reference = (kit.config(f, "hf_quant_config.json") for f in (ours, theirs))
    assert list(nested) == list(reference)
    assert list(nested["quantization"]) == list(reference["quantization"])
    for key in set(reference["quantization"]) - {"exclude_modules"}:
        assert nested["quantization"][key] == reference["quantization"][key]
    assert nested["quantization"]["exclude_modules"] == inline["ignore"]
    assert not any(c in name for name in inline["ignore"] for c in "*?[")


def test_weight_only_nvfp4_is_declared_without_activations(kit, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(
        "name: r\nrules: [{roles: [routed_expert], format: w4a16_nvfp4}]\n"
    )
    exporter.export(kit.qwen, tmp_path / "out", recipe=tmp_path / "r.yaml")
    inline = kit.config(tmp_path / "out")["quantization_config"]
    assert inline["quant_algo"] == "W4A16_NVFP4"
    assert inline["config_groups"]["group_0"]["input_activations"] is None
    assert inline["config_groups"]["group_0"]["weights"]["group_size"] == 16
    assert not any(n.endswith("input_scale") for n in kit.read(tmp_path / "out"))
    assert verifier.check(tmp_path / "out", base=kit.qwen, depth="payload").verdict == "passed"


def test_config_is_otherwise_unchanged(kit, nvfp4, vendor, mixed, tmp_path: Path) -> None:
    for made, source in ((nvfp4.path, kit.qwen), (mixed.path, vendor.path)):
        before, after = kit.config(source), kit.config(made)
        before.pop("quantization_config", None)
        after.pop("quantization_config")
        assert list(after.items()) == list(before.items())
        assert after.pop("rms_norm_eps") == 1e-06
    # A declaration of the source that stands in text_config would contradict the new one.
    source = kit.edit(kit.qwen, tmp_path / "source", lambda _t: None)
    config = kit.config(source) | {
        "text_config": {"quantization_config": {"quant_method": "fp8"}, "x": "é"}
    }
    (source / "config.json").write_text(json.dumps(config))
    exporter.export(source, tmp_path / "out", recipe=NVFP4, input_scale="one")
    assert kit.config(tmp_path / "out")["text_config"] == {"x": "é"}


# files around the tensors


def test_side_files_are_copied_and_the_kept_checkpoints_win(kit, vendor, tmp_path: Path) -> None:
    source = kit.edit(kit.qwen, tmp_path / "source", lambda _t: None)
    onto = kit.edit(vendor.path, tmp_path / "onto", lambda _t: None)
    for name, text in (
        ("tokenizer.json", '{"a": "é"}'),
        ("vocab.txt", "source"),
        ("modeling_x.py", "x = 1\n"),
    ):
        (source / name).write_text(text)
    for name in ("vocab.txt", "chat_template.jinja", "tokenizer.model", "LICENSE", "LICENSE.md"):
        (onto / name).write_text("onto")
    for name in ("README.md", ".secret.json", "pytorch_model.bin", "ckptgate_manifest.json"):
        (source / name).write_text("{}")
    (source / "folder.json").mkdir()
    manifest = exporter.export(source, tmp_path / "out", recipe=NVFP4, onto=onto)
    out = tmp_path / "out"
    for name in ("tokenizer.json", "modeling_x.py"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    for name in (
        "vocab.txt",
        "chat_template.jinja",
        "tokenizer.model",
        "LICENSE",
        "LICENSE.md",
        "generation_config.json",
    ):
        assert (out / name).read_bytes() == (onto / name).read_bytes()
    assert {p.name for p in out.iterdir()} == set(manifest.files) | {"ckptgate_manifest.json"}
    assert not {"README.md", ".secret.json", "pytorch_model.bin", "folder.json"} & set(
        manifest.files
    )


def test_the_index_of_another_format_is_not_copied(kit, tmp_path: Path) -> None:
    """Copied, it would name shards that are not there."""
    source = kit.edit(kit.qwen, tmp_path / "source", lambda _t: None)
    (source / "pytorch_model.bin.index.json").write_text(
        '{"weight_map": {"x": "pytorch_model.bin"}}'
    )
    exporter.export(source, tmp_path / "out", recipe=NVFP4, input_scale="one")
    assert not (tmp_path / "out" / "pytorch_model.bin.index.json").exists()


@pytest.mark.parametrize("which", ["nvfp4", "mixed"])
def test_the_manifest_is_the_file_and_its_digests_are_true(
    which: str, request: pytest.FixtureRequest, kit
) -> None:
    made = request.getfixturevalue(which)
    written = Manifest.model_validate_json((made.path / "ckptgate_manifest.json").read_text())
    assert written == made.manifest
    actual = digests(made.path)
    actual.pop("ckptgate_manifest.json")
    assert {n: f.sha256 for n, f in written.files.items()} == actual
    assert all((made.path / n).stat().st_size == f.bytes for n, f in written.files.items())
    tensors = kit.read(made.path)
    assert (written.tensors, written.bytes) == (
        len(tensors),
        sum(len(r.data) for r in tensors.values()),
    )
    assert (written.kind, written.name) == ("export", made.path.name)
    assert written.made_by["tool"] == "ckptgate"


def test_the_manifest_names_its_sources(kit, vendor, mixed, nvfp4) -> None:
    assert [(s.role, s.uri) for s in mixed.manifest.sources] == [
        ("source", str(kit.qwen)),
        ("onto", str(vendor.path)),
    ]
    assert [s.tensors for s in mixed.manifest.sources] == [
        len(kit.read(kit.qwen)),
        len(kit.read(vendor.path)),
    ]
    assert mixed.manifest.formats == {"NVFP4": 48, "MXFP8": 8}
    assert mixed.manifest.notes["quantized_here"] == {"NVFP4": 48}
    low, high = (float(x) for x in nvfp4.manifest.notes["scale_range"]["NVFP4"])
    assert 0 < low < high < 1


def test_an_export_checks_clean_against_its_sources(kit, nvfp4, llama_mxfp8, vendor, mixed) -> None:
    for made, base, kept in (
        (nvfp4, kit.qwen, None),
        (llama_mxfp8, kit.llama, None),
        (mixed, kit.qwen, vendor.path),
    ):
        report = verifier.check(made.path, base=base, merged_from=kept, depth="payload")
        assert (report.verdict, report.findings) == ("passed", ())


# weights that are no numbers, or all zero


@pytest.mark.parametrize(
    ("value", "word"), [(np.nan, "NaN"), (np.inf, "infinity"), (-np.inf, "infinity")]
)
@pytest.mark.parametrize("leaf", ["down_proj", "up_proj"])
def test_a_weight_that_is_no_number_is_named_and_nothing_is_left(
    kit, tmp_path: Path, leaf: str, value: float, word: str
) -> None:
    def spoil(tensors: dict) -> None:
        name = f"{EXPERT}.{leaf}.weight"
        values = tensors[name].array().copy()
        values[3, 7] = value
        tensors[name] = kit.raw(values)

    source = kit.edit(kit.qwen, tmp_path / "source", spoil)
    with pytest.raises(EncodeError) as caught:
        exporter.export(source, tmp_path / "out", recipe=NVFP4, input_scale="one")
    message = str(caught.value)
    assert f"{EXPERT}.{leaf}.weight" in message
    assert f"{word} at index [3, 7]" in message
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("*.safetensors"))


def test_of_a_fused_group_only_the_bad_weight_is_named(kit, tmp_path: Path) -> None:
    def spoil(tensors: dict) -> None:
        values = tensors[f"{EXPERT}.up_proj.weight"].array().copy()
        values[0, 0] = np.nan
        tensors[f"{EXPERT}.up_proj.weight"] = kit.raw(values)

    source = kit.edit(kit.qwen, tmp_path / "source", spoil)
    with pytest.raises(EncodeError) as caught:
        exporter.export(source, tmp_path / "out", recipe=NVFP4, input_scale="one")
    assert f"{EXPERT}.up_proj.weight" in str(caught.value)
    assert "gate_proj" not in str(caught.value)


def test_a_source_that_was_mended_is_exported_as_it_now_is(kit, nvfp4, tmp_path: Path) -> None:
    """Shards that a failed export finished are not those of the mended source, though its headers
    are the same.
    """
    first, last = "model.embed_tokens.weight", "model.layers.1.mlp.experts.7.up_proj.weight"

    def spoil(tensors: dict) -> None:
        for name, value in ((first, 1.0), (last, np.nan)):
            values = tensors[name].array().copy()
            values[0, 0] = value
            tensors[name] = kit.raw(values)

    source = kit.edit(kit.qwen, tmp_path / "source", spoil)
    options = {"recipe": NVFP4, "input_scale": "one", "shard_bytes": 100_000, "workers": 1}
    with pytest.raises(EncodeError, match="NaN"):
        exporter.export(source, tmp_path / "out", progress=lambda _n: time.sleep(0.01), **options)
    shutil.rmtree(source)
    kit.edit(kit.qwen, source, lambda _t: None)
    exporter.export(source, tmp_path / "out", **options)
    assert kit.read(tmp_path / "out") == kit.read(nvfp4.path)


def test_an_expert_of_zeros_exports_and_checks(kit, tmp_path: Path) -> None:
    def zero(tensors: dict) -> None:
        for leaf in ("gate_proj", "up_proj", "down_proj"):
            raw = tensors[f"{EXPERT}.{leaf}.weight"]
            tensors[f"{EXPERT}.{leaf}.weight"] = raw._replace(data=bytes(len(raw.data)))

    source = kit.edit(kit.qwen, tmp_path / "source", zero)
    exporter.export(source, tmp_path / "out", recipe=NVFP4, input_scale="one")
    tensors = kit.read(tmp_path / "out")
    for leaf in ("gate_proj", "up_proj", "down_proj"):
        module = f"{EXPERT}.{leaf}"
        assert set(tensors[f"{module}.weight"].data) == {0}
        assert set(tensors[f"{module}.weight_scale"].data) == {0x38}
        assert tensors[f"{module}.weight_scale_2"].array().item() == 1.0
    report = verifier.check(tmp_path / "out", base=source, depth="payload")
    assert report.verdict == "passed"
    assert report.count("error") == 0


def test_a_weight_of_negative_zeros_and_zero_blocks(kit, tmp_path: Path) -> None:
    def edit(tensors: dict) -> None:
        values = tensors[f"{EXPERT}.down_proj.weight"].array().copy()
        values[:, :16] = -0.0
        tensors[f"{EXPERT}.down_proj.weight"] = kit.raw(values)

    source = kit.edit(kit.qwen, tmp_path / "source", edit)
    exporter.export(source, tmp_path / "out", recipe=NVFP4, input_scale="one")
    tensors = kit.read(tmp_path / "out")
    assert set(tensors[f"{EXPERT}.down_proj.weight_scale"].array().view(np.uint8)[:, 0]) == {0x38}
    report = verifier.check(tmp_path / "out", base=source, depth="payload")
    assert (report.verdict, report.findings) == ("passed", ())


# activation scales from statistics


def experts_of(kit) -> list[str]:
    return [n.removesuffix(".weight") for n in kit.read(kit.qwen) if ".experts." in n]


def test_input_scales_come_from_the_stats(kit, tmp_path: Path) -> None:
    maxima = {m: float(np.float32(0.5 + 0.37 * i)) for i, m in enumerate(experts_of(kit))}
    stats = kit.stats(tmp_path / "stats.safetensors", maxima | {"not.in.the.model": 3.0})
    exporter.export(kit.qwen, tmp_path / "out", recipe=NVFP4, stats=stats)
    tensors = kit.read(tmp_path / "out")
    for module in maxima:
        head, leaf = split(module)
        group = ("gate_proj", "up_proj") if leaf in ("gate_proj", "up_proj") else (leaf,)
        largest = max(maxima[f"{head}.{g}"] for g in group)
        assert tensors[f"{module}.input_scale"].array().item() == np.float32(largest / 2688)
    assert verifier.check(tmp_path / "out", base=kit.qwen, depth="payload").verdict == "passed"


def test_stats_are_read_from_any_shape(kit, tmp_path: Path) -> None:
    maxima = {f"{m}.input_amax": kit.raw(np.float32([[0.25, 2.5]])) for m in experts_of(kit)}
    kit.write(
        tmp_path / "stats.safetensors", maxima | {"other.entry": kit.raw(np.float32([np.nan]))}
    )
    plan = exporter.plan_export(
        kit.qwen, recipe=NVFP4, input_scale="stats", stats=tmp_path / "stats.safetensors"
    )
    assert {s for e in plan.encodes for s in e.input_scales} == {2.5 / 2688}


def test_stats_without_a_module_are_refused_by_name(kit, tmp_path: Path) -> None:
    maxima = dict.fromkeys(experts_of(kit), 1.0)
    del maxima[f"{EXPERT}.down_proj"]
    stats = kit.stats(tmp_path / "stats.safetensors", maxima)
    with pytest.raises(PlanError, match=rf"no input maximum for {EXPERT}\.down_proj"):
        exporter.export(kit.qwen, tmp_path / "out", recipe=NVFP4, stats=stats)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan, np.inf, 1e-38])
def test_stats_that_are_no_maxima_are_refused_by_name(kit, tmp_path: Path, value: float) -> None:
    maxima = dict.fromkeys(experts_of(kit), 1.0) | {f"{EXPERT}.down_proj": value}
    stats = kit.stats(tmp_path / "stats.safetensors", maxima)
    with pytest.raises(
        PlanError, match=rf"{EXPERT}\.down_proj\.input_amax is .*finite number above zero"
    ):
        exporter.export(kit.qwen, tmp_path / "out", recipe=NVFP4, stats=stats)


@pytest.mark.parametrize(
    "content",
    [b"", b"not safetensors", bytes(4096), b"\x02\0\0\0\0\0\0\0{}", b"\x02\0\0\0\0\0\0\0[]"],
)
def test_stats_that_are_no_safetensors(kit, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "stats.safetensors").write_bytes(content)
    with pytest.raises(PlanError, match=r"stats\.safetensors: "):
        exporter.export(
            kit.qwen, tmp_path / "out", recipe=NVFP4, stats=tmp_path / "stats.safetensors"
        )


def test_stats_in_bfloat16_are_read_or_refused_with_a_message(kit, tmp_path: Path) -> None:
    import ml_dtypes

    value = kit.raw(np.array(2.0, ml_dtypes.bfloat16))
    kit.write(tmp_path / "stats.safetensors", {f"{m}.input_amax": value for m in experts_of(kit)})
    try:
        plan = exporter.plan_export(kit.qwen, recipe=NVFP4, stats=tmp_path / "stats.safetensors")
    except PlanError:
        return
    assert {s for e in plan.encodes for s in e.input_scales} == {2.0 / 2688}


def test_a_checkpoint_given_as_stats_is_refused(kit, tmp_path: Path) -> None:
    for folder in (kit.qwen, kit.qwen_nvfp4, kit.llama_mxfp8):
        with pytest.raises(PlanError, match=r"model\.safetensors: "):
            exporter.export(
                kit.qwen, tmp_path / "out", recipe=NVFP4, stats=folder / "model.safetensors"
            )


def test_stats_that_do_not_exist(kit, tmp_path: Path) -> None:
    for path in (tmp_path / "missing.safetensors", tmp_path):
        with pytest.raises(UsageError, match="no such stats file"):
            exporter.export(kit.qwen, tmp_path / "out", recipe=NVFP4, stats=path)


# OUT


@pytest.fixture
def qwen_args(kit) -> list[str]:
    return ["--recipe", NVFP4, "--input-scale", "one"]


def test_an_out_that_exists_is_a_usage_error(
    kit, tmp_path: Path, qwen_args, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("folder", "file", "dangling"):
        assert run(["export", str(kit.qwen), str(tmp_path / name), *qwen_args]) == 2
        assert "exists" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "x"
    assert not list((tmp_path / "folder").iterdir())


@pytest.mark.parametrize("trailing", ["", "/"])
def test_an_out_whose_parent_is_missing(
    kit, tmp_path: Path, qwen_args, trailing: str, capsys
) -> None:
    out = tmp_path / "missing" / "out"
    assert run(["export", str(kit.qwen), f"{out}{trailing}", *qwen_args]) == 2
    assert "parent directory" in capsys.readouterr().err
    assert not (tmp_path / "missing").exists()


def test_overwrite_swaps_a_checkpoint_whole(kit, llama_mxfp8, nvfp4, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(llama_mxfp8.path, out)
    (out / "left-over.safetensors").write_bytes(
        (out / "model-00001-of-00001.safetensors").read_bytes()
    )
    (out / "nested").mkdir()
    exporter.export(kit.qwen, out, recipe=NVFP4, input_scale="one", overwrite=True)
    assert {p.name for p in out.iterdir()} == {p.name for p in nvfp4.path.iterdir()}
    assert kit.read(out) == kit.read(nvfp4.path)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_overwrite_takes_an_empty_or_a_new_folder(kit, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("empty", "new"):
        exporter.export(kit.qwen, tmp_path / name, recipe=NVFP4, input_scale="one", overwrite=True)
        assert (tmp_path / name / "config.json").is_file()


def test_overwrite_leaves_the_old_folder_where_the_export_fails(
    kit, llama_mxfp8, tmp_path: Path
) -> None:
    def spoil(tensors: dict) -> None:
        values = tensors[f"{EXPERT}.up_proj.weight"].array().copy()
        values[0, 0] = np.nan
        tensors[f"{EXPERT}.up_proj.weight"] = kit.raw(values)

    shutil.copytree(llama_mxfp8.path, tmp_path / "out")
    source = kit.edit(kit.qwen, tmp_path / "source", spoil)
    with pytest.raises(EncodeError):
        exporter.export(source, tmp_path / "out", recipe=NVFP4, input_scale="one", overwrite=True)
    assert digests(tmp_path / "out") == digests(llama_mxfp8.path)


def test_overwrite_refuses_what_is_no_checkpoint(kit, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("ten years")
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(kit.llama_mxfp8, target_is_directory=True)
    for name, why in (
        ("home", "not a checkpoint"),
        ("file", "not a directory"),
        ("link", "not a directory"),
    ):
        with pytest.raises(UsageError, match=why):
            exporter.export(
                kit.qwen, tmp_path / name, recipe=NVFP4, input_scale="one", overwrite=True
            )
    assert (tmp_path / "home" / "thesis.txt").read_text() == "ten years"


def test_overwrite_refuses_an_input(kit, vendor, tmp_path: Path) -> None:
    source = tmp_path / "models" / "source"
    onto = tmp_path / "onto"
    shutil.copytree(kit.qwen, source)
    shutil.copytree(vendor.path, onto)
    (tmp_path / "models" / "x.safetensors").write_bytes(b"")
    (tmp_path / "alias").symlink_to(source, target_is_directory=True)
    before = digests(source) | digests(onto)
    for out in (
        source,
        onto,
        tmp_path / "models",
        tmp_path / "alias",
        source / "..",
        source / "." / ".." / "source",
    ):
        with pytest.raises(UsageError, match=r"is the directory of an input|not a directory"):
            exporter.export(source, out, recipe=NVFP4, onto=onto, overwrite=True)
    with pytest.raises(UsageError, match="is the directory of an input"):
        exporter.merge(onto, source, onto=source, overwrite=True)
    assert digests(source) | digests(onto) == before


def test_a_relative_out_and_source(
    kit, nvfp4, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(kit.qwen, tmp_path / "source")
    monkeypatch.chdir(tmp_path)
    exporter.export("source", "out", recipe=NVFP4, input_scale="one")
    assert kit.read(tmp_path / "out") == kit.read(nvfp4.path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]


def test_a_source_behind_an_fsspec_address(kit, nvfp4, tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(f"{kit.qwen}/", "/export-source/", recursive=True)
    try:
        exporter.export("memory://export-source", tmp_path / "out", recipe=NVFP4, input_scale="one")
    finally:
        memory.rm("/export-source", recursive=True)
    assert kit.read(tmp_path / "out") == kit.read(nvfp4.path)


# merge


@pytest.fixture(scope="session")
def merged(kit, vendor, exports: Path) -> tuple[Path, Manifest]:
    """Merge ModelOpt's experts onto the vendor's checkpoint."""
    return exports / "merged", exporter.merge(kit.qwen_nvfp4, exports / "merged", onto=vendor.path)


def test_merge_moves_bytes(kit, vendor, merged) -> None:
    out, manifest = merged
    result, experts, kept = kit.read(out), kit.read(kit.qwen_nvfp4), kit.read(vendor.path)
    assert {n for n in result if ".experts." in n} == {n for n in experts if ".experts." in n}
    assert {n for n in result if ".experts." not in n} == {n for n in kept if ".experts." not in n}
    assert [n for n, r in result.items() if r != (experts if ".experts." in n else kept)[n]] == []
    assert manifest.kind == "merge"
    assert [(s.role, s.uri) for s in manifest.sources] == [
        ("experts", str(kit.qwen_nvfp4)),
        ("onto", str(vendor.path)),
    ]
    assert manifest.formats == {"NVFP4": 48, "MXFP8": 8}
    assert manifest.notes["quantized_here"] == {}


def test_a_merge_checks_clean(kit, vendor, merged) -> None:
    report = verifier.check(merged[0], base=kit.qwen, merged_from=vendor.path, depth="payload")
    assert (report.verdict, report.findings) == ("passed", ())


def test_a_merge_declares_what_a_mixed_export_declares(kit, merged, mixed) -> None:
    assert kit.config(merged[0]) == kit.config(mixed.path)
    assert kit.config(merged[0], "hf_quant_config.json") == kit.config(
        mixed.path, "hf_quant_config.json"
    )


def test_merge_with_input_scale_one(kit, vendor, merged, tmp_path: Path) -> None:
    exporter.merge(kit.qwen_nvfp4, tmp_path / "out", onto=vendor.path, input_scale="one")
    one, keep = kit.read(tmp_path / "out"), kit.read(merged[0])
    assert set(one) == set(keep)
    scales = {n for n in one if n.endswith(".input_scale")}
    assert len(scales) == 48
    assert {one[n].array().item() for n in scales} == {1.0}
    assert [n for n in one if n not in scales and one[n] != keep[n]] == []


def test_merge_of_weight_only_experts(kit, vendor, tmp_path: Path) -> None:
    def drop(tensors: dict) -> None:
        for name in [n for n in tensors if n.endswith(".input_scale")]:
            del tensors[name]

    experts = kit.edit(kit.qwen_nvfp4, tmp_path / "experts", drop)
    exporter.merge(experts, tmp_path / "keep", onto=vendor.path)
    layers = kit.config(tmp_path / "keep")["quantization_config"]["quantized_layers"]
    assert layers[f"{EXPERT}.up_proj"]["quant_algo"] == "W4A16_NVFP4"
    exporter.merge(experts, tmp_path / "one", onto=vendor.path, input_scale="one")
    layers = kit.config(tmp_path / "one")["quantization_config"]["quantized_layers"]
    assert layers[f"{EXPERT}.up_proj"] == {"quant_algo": "NVFP4", "group_size": 16}
    assert {
        r.array().item()
        for n, r in kit.read(tmp_path / "one").items()
        if n.endswith(".input_scale")
    } == {1.0}


@pytest.mark.parametrize("policy", ["one", "keep"])
def test_a_merge_keeps_the_recorded_policy(kit, vendor, tmp_path: Path, policy: str) -> None:
    experts = tmp_path / "experts"
    exporter.merge(kit.qwen_nvfp4, experts, onto=vendor.path, input_scale=policy)
    exporter.merge(experts, tmp_path / "out", onto=vendor.path)
    manifest = json.loads((tmp_path / "out" / "ckptgate_manifest.json").read_text())
    assert manifest["options"]["input_scale"] == policy


def test_merge_where_one_expert_has_no_input_scale(kit, vendor, tmp_path: Path) -> None:
    experts = kit.edit(
        kit.qwen_nvfp4, tmp_path / "experts", lambda t: t.pop(f"{EXPERT}.up_proj.input_scale")
    )
    with pytest.raises(
        PlanError, match=rf"{EXPERT}\.up_proj has no input_scale to keep \(1 of 48\)"
    ):
        exporter.merge(experts, tmp_path / "out", onto=vendor.path)


def test_merge_without_quantized_experts(
    kit, vendor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(PlanError, match="holds no quantized routed expert"):
        exporter.merge(kit.qwen, tmp_path / "out", onto=vendor.path)
    with pytest.raises(PlanError, match="holds no quantized routed expert"):
        exporter.merge(kit.llama_mxfp8, tmp_path / "out", onto=kit.llama)
    assert run(["merge", str(kit.qwen), str(tmp_path / "out"), "--onto", str(vendor.path)]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_merge_through_the_command_line(
    kit, vendor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        run(["merge", str(kit.qwen_nvfp4), str(tmp_path / "out"), "--onto", str(vendor.path)]) == 0
    )
    out, err = capsys.readouterr()
    assert "verdict: PASSED" in out
    assert "48 modules (0 quantized now, 48 kept)" in out
    assert err == ""
