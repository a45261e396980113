# SPDX-License-Identifier: Apache-2.0
"""Files that lie: each is a finding and exit code 1, never an exception of the check."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import SafetensorError, safe_open

import verifier
from verifier.checkpoint import INDEX, MAX_HEADER, open_checkpoint, strict_json
from verifier.errors import NotACheckpointError, UsageError
from verifier.findings import Report

SHARD = "model.safetensors"
NAME = "model.layers.0.mlp.up_proj.weight"
ENTRY = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def _file(header: Any, data: bytes = bytes(24)) -> bytes:
    """Return a safetensors file: a header (bytes as they are, else as JSON), and the data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def _entry(**changes: Any) -> dict[str, Any]:
    return {NAME: ENTRY | changes}


def _two(first: list[int], second: list[int]) -> dict[str, Any]:
    return {
        "a.weight": {"dtype": "F32", "shape": [3], "data_offsets": first},
        "b.weight": {"dtype": "F32", "shape": [3], "data_offsets": second},
    }


def _nested(depth: int) -> bytes:
    return b'{"a":' + b"[" * depth + b"]" * depth + b"}"


def _raw_entry(**changes: str) -> bytes:
    """Return a header with values that json.dumps would not write."""
    fields = {"dtype": '"F32"', "shape": "[2,3]", "data_offsets": "[0,24]"} | changes
    return (
        f'{{"{NAME}":{{{",".join(f"{json.dumps(k)}:{v}" for k, v in fields.items())}}}}}'.encode()
    )


SHORT_HEADER = json.dumps(_entry()).encode()
HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "short"),
    "seven_bytes": (b"\x10\0\0\0\0\0\0", "short"),
    "length_only": ((100).to_bytes(8, "little"), "truncated"),
    "length_2_63": ((2**63).to_bytes(8, "little") + bytes(64), "header-length"),
    "length_2_64": (b"\xff" * 8 + bytes(64), "header-length"),
    "length_over_the_cap": ((MAX_HEADER + 1).to_bytes(8, "little") + bytes(64), "header-length"),
    "header_beyond_the_file": ((1000).to_bytes(8, "little") + SHORT_HEADER, "truncated"),
    "one_byte_beyond_the_file": (
        (len(SHORT_HEADER) + 1).to_bytes(8, "little") + SHORT_HEADER,
        "truncated",
    ),
    "zeros": (bytes(4096), "header-length"),
    "text": (
        b"<!DOCTYPE html>\n<html><head><title>Not Found</title></head></html>\n",
        "header-length",
    ),
    "not_utf8": (_file(b'{"\xff\xfe": 1}'), "json"),
    "utf16": (_file(json.dumps(_entry()).encode("utf-16")), "json"),
    "utf8_with_a_mark": (_file(b"\xef\xbb\xbf" + SHORT_HEADER), "json"),
    "lone_surrogate": (_file(b'{"\\ud800.weight":' + json.dumps(ENTRY).encode() + b"}"), "name"),
    "not_json": (_file(b"{'a': 1}"), "json"),
    "cut_json": (_file(SHORT_HEADER[:-3]), "json"),
    "two_values": (_file(SHORT_HEADER + b"{}"), "json"),
    "a_list": (_file(b"[]"), "json"),
    "a_number": (_file(b"7"), "json"),
    "null": (_file(b"null"), "json"),
    "nan": (_file(_raw_entry(shape="[NaN,3]")), "json"),
    "infinity": (_file(_raw_entry(data_offsets="[0,Infinity]")), "json"),
    "nested_arrays": (_file(_nested(200_000)), "json"),
    "nested_objects": (_file(b'{"a":' * 200_000 + b"1" + b"}" * 200_000), "json"),
    "number_of_9000_digits": (_file(_raw_entry(shape=f"[{'9' * 9000},3]")), "json"),
    "name_twice": (_file(SHORT_HEADER[:-1] + b"," + SHORT_HEADER[1:]), "duplicate"),
    "field_twice": (_file(_raw_entry().replace(b'"dtype"', b'"shape":[6],"dtype"')), "duplicate"),
    "entry_is_a_list": (_file({NAME: [1, 2]}), "entry"),
    "entry_is_null": (_file({NAME: None}), "entry"),
    "field_missing": (_file({NAME: {"dtype": "F32", "shape": [2, 3]}}), "entry"),
    "field_unknown": (_file(_entry(stride=[3, 1])), "entry"),
    "dtype_unknown": (_file(_entry(dtype="Q4_K")), "dtype"),
    "dtype_lower_case": (_file(_entry(dtype="f32")), "dtype"),
    "dtype_number": (_file(_entry(dtype=32)), "dtype"),
    "dtype_list": (_file(_entry(dtype=["F32"])), "dtype"),
    "shape_negative": (_file(_entry(shape=[-2, -3])), "shape"),
    "shape_float": (_file(_entry(shape=[2.0, 3])), "shape"),
    "shape_text": (_file(_entry(shape=["2", "3"])), "shape"),
    "shape_bool": (_file(_entry(shape=[True, 6])), "shape"),
    "shape_null": (_file(_entry(shape=None)), "shape"),
    "shape_huge": (_file(_entry(shape=[2**62, 2**62])), "shape"),
    "shape_wraps_to_24_bytes": (_file(_entry(shape=[2**32, 2**32, 6])), "shape"),
    "shape_of_a_million": (_file(_entry(shape=[1] * 1_000_000)), "shape"),
    "offsets_negative": (_file(_entry(data_offsets=[-24, 0])), "offsets"),
    "offsets_reversed": (_file(_entry(data_offsets=[24, 0])), "offsets"),
    "offsets_float": (_file(_entry(data_offsets=[0.0, 24.0])), "offsets"),
    "offsets_three": (_file(_entry(data_offsets=[0, 12, 24])), "offsets"),
    "offsets_object": (_file(_entry(data_offsets={"start": 0, "end": 24})), "offsets"),
    "offsets_2_62": (_file(_entry(data_offsets=[2**62, 2**62 + 24])), "offsets"),
    "offsets_just_below_2_62": (_file(_entry(data_offsets=[2**62 - 24, 2**62])), "truncated"),
    "offsets_2_64": (_file(_entry(data_offsets=[2**64, 2**64 + 24])), "offsets"),
    "too_few_bytes": (_file(_entry(data_offsets=[0, 20]), bytes(20)), "offsets"),
    "too_many_bytes": (_file(_entry(data_offsets=[0, 32]), bytes(32)), "offsets"),
    "bytes_of_another_dtype": (_file(_entry(dtype="BF16")), "offsets"),
    "half_a_byte": (_file(_entry(dtype="F4", shape=[3], data_offsets=[0, 1]), bytes(1)), "offsets"),
    "overlap": (_file(_two([0, 12], [8, 20]), bytes(20)), "overlap"),
    "same_range_twice": (_file(_two([0, 12], [0, 12]), bytes(12)), "overlap"),
    "empty_inside_another": (
        _file(
            {
                "a.weight": {"dtype": "F32", "shape": [0], "data_offsets": [4, 4]},
                "b.weight": {"dtype": "F32", "shape": [6], "data_offsets": [0, 24]},
            }
        ),
        "overlap",
    ),
    "gap": (_file(_two([0, 12], [16, 28]), bytes(28)), "gap"),
    "gap_before_the_first": (_file(_entry(data_offsets=[8, 32]), bytes(32)), "gap"),
    "beyond_the_end": (_file(_entry(), bytes(23)), "truncated"),
    "no_data": (_file(_entry(), b""), "truncated"),
}
"""File, and the kind of problem that it is."""

HARMLESS: dict[str, bytes] = {
    "plain": _file(_entry()),
    "empty_tensor": _file(_entry(shape=[0, 7], data_offsets=[0, 0]), b""),
    "empty_between": _file(
        {
            "a.weight": {"dtype": "I8", "shape": [2], "data_offsets": [0, 2]},
            "b.weight": {"dtype": "F32", "shape": [0], "data_offsets": [2, 2]},
            "c.weight": {"dtype": "I8", "shape": [2], "data_offsets": [2, 4]},
        },
        bytes(4),
    ),
    "scalar": _file(_entry(shape=[], data_offsets=[0, 4]), bytes(4)),
    "no_tensors": _file({}, b""),
    "metadata": _file({"__metadata__": {"format": "pt"}, **_entry()}),
    "padded_header": _file(SHORT_HEADER + b" " * 64),
    "spaces_before": _file(b"  \n" + SHORT_HEADER),
    "half_bytes": _file(_entry(dtype="F4", shape=[2, 24])),
    "names_out_of_order": _file(_two([12, 24], [0, 12])),
}


def _folder(root: Path, shard: bytes, name: str = SHARD) -> Path:
    """Write a folder of one shard, of a family that no layout file describes."""
    root.mkdir(exist_ok=True)
    (root / name).write_bytes(shard)
    (root / "config.json").write_text(json.dumps({"model_type": "none_that_is_known"}))
    return root


def _check(folder: Path) -> Report:
    """Check at payload depth, against itself too, so that every rule reads it; without the note on
    absent metadata.
    """
    report = verifier.check(folder, depth="payload")
    again = verifier.check(folder, base=folder, merged_from=folder, depth="payload")
    assert {f.rule for f in report.findings} <= {f.rule for f in again.findings}
    notes = [f for f in report.findings if f.severity == "info"]
    assert {f.rule for f in notes} <= {"QC109"}
    return replace(report, findings=tuple(f for f in report.findings if f not in notes))


def _accepted(path: Path) -> bool:
    """Whether the safetensors library, which had no hand in ours, reads the file."""
    try:
        with safe_open(path, "np") as handle:
            for name in handle.keys():
                handle.get_slice(name).get_shape()
    except (SafetensorError, OSError):
        return False
    return True


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_file_is_a_finding(tmp_path: Path, name: str) -> None:
    data, kind = HOSTILE[name]
    folder = _folder(tmp_path / "ckpt", data)
    (shard,) = open_checkpoint(folder).shards
    assert kind in {p.kind for p in shard.problems}, shard.problems
    assert all(t.offset + t.nbytes <= len(data) for t in shard.tensors.values())
    report = _check(folder)
    assert report.exit_code == 1
    found = report.by_rule("QC104")
    assert found
    assert {(f.severity, f.where.file) for f in found} == {("error", SHARD)}
    assert {f.rule for f in report.findings} == {"QC104"}


@pytest.mark.parametrize(
    "name", [n for n in HOSTILE if n not in ("name_twice", "field_unknown", "field_twice")]
)
def test_safetensors_refuses_it_too(tmp_path: Path, name: str) -> None:
    """What we call hostile, the reference implementation does not read either (it lets the last of
    two keys win).
    """
    path = tmp_path / SHARD
    path.write_bytes(HOSTILE[name][0])
    assert not _accepted(path)


@pytest.mark.parametrize("name", HARMLESS)
def test_harmless_file_is_no_finding(tmp_path: Path, name: str) -> None:
    folder = _folder(tmp_path / "ckpt", HARMLESS[name])
    assert _accepted(folder / SHARD)
    (shard,) = open_checkpoint(folder).shards
    assert shard.problems == ()
    report = _check(folder)
    assert report.findings == ()
    assert report.exit_code == 3  # nothing in it is quantized


def test_cap_of_the_header_is_not_the_size_of_the_file(tmp_path: Path) -> None:
    """A header that claims more than 100 MB is refused although the file is as long as that (sparse
    on disk).
    """
    folder = _folder(tmp_path / "ckpt", (MAX_HEADER + 1).to_bytes(8, "little"))
    os.truncate(folder / SHARD, 8 + MAX_HEADER + 1)
    report = _check(folder)
    assert [f.rule for f in report.findings] == ["QC104"]
    assert "too large" in report.findings[0].message


@pytest.mark.parametrize(
    "metadata",
    [{"format": 1}, {"format": None}, {"a": {"b": "c"}}, ["format", "pt"], "pt", 3],
    ids=["number", "null", "object", "list", "text", "bare_number"],
)
def test_metadata_that_are_no_strings_are_a_finding(tmp_path: Path, metadata: Any) -> None:
    folder = _folder(tmp_path / "ckpt", _file({"__metadata__": metadata, **_entry()}))
    (shard,) = open_checkpoint(folder).shards
    assert [p.kind for p in shard.problems] == ["metadata"]
    assert not _accepted(folder / SHARD)
    report = _check(folder)
    assert report.exit_code == 1
    assert report.findings[0].where.file == SHARD


def test_trailing_bytes_are_a_warning(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "ckpt", _file(_entry(), bytes(25)))
    report = _check(folder)
    assert [(f.rule, f.severity, f.where.file) for f in report.findings] == [
        ("QC105", "warning", SHARD)
    ]


def test_one_broken_shard_does_not_hide_the_others(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "ckpt", _file(_entry()))
    (folder / "a.safetensors").write_bytes(b"\0" * 5)
    (folder / "z.safetensors").write_bytes(_file({"z.weight": ENTRY}, bytes(12)))
    checkpoint = open_checkpoint(folder)
    assert set(checkpoint.tensors) == {NAME}
    found = _check(folder).by_rule("QC104")
    assert {f.where.file for f in found} == {"a.safetensors", "z.safetensors"}


@pytest.mark.parametrize(
    "order", [("a.weight", "b.weight"), ("b.weight", "a.weight")], ids=["last", "first"]
)
def test_one_bad_entry_does_not_hide_its_neighbours(tmp_path: Path, order: tuple[str, str]) -> None:
    """And the bytes of the bad one are no gap and no trailing bytes: it says where they are."""
    header = {name: ENTRY | {"data_offsets": [24 * i, 24 * i + 24]} for i, name in enumerate(order)}
    header["b.weight"]["dtype"] = "Q8"
    folder = _folder(tmp_path / "ckpt", _file(header, bytes(48)))
    (shard,) = open_checkpoint(folder).shards
    assert set(shard.tensors) == {"a.weight"}
    assert [(p.kind, p.tensor) for p in shard.problems] == [("dtype", "b.weight")]


@pytest.mark.parametrize(
    "name",
    ["", "weight", ".weight", "..", "a..weight", "\n", "\x00", "\x1b[31m", "a" * 999],
    ids=repr,
)
def test_odd_tensor_names_are_read(tmp_path: Path, name: str) -> None:
    folder = _folder(tmp_path / "ckpt", _file({name: ENTRY}))
    assert set(open_checkpoint(folder).tensors) == {name}
    assert _check(folder).exit_code in (1, 3)


# the index


def _sharded(root: Path, index: Any) -> Path:
    folder = _folder(root, _file(_entry()))
    (folder / INDEX).write_bytes(index if isinstance(index, bytes) else json.dumps(index).encode())
    return folder


@pytest.mark.parametrize(
    "index",
    [
        [],
        None,
        3,
        "model",
        {},
        {"weight_map": []},
        {"weight_map": None},
        b"",
        b"{",
        b"\xff\xfe",
        b'{"weight_map": NaN}',
        b'{"weight_map": {}, "weight_map": {}}',
        b'{"weight_map":' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    ],
    ids=[
        "list",
        "null",
        "number",
        "text",
        "empty_object",
        "map_is_list",
        "map_is_null",
        "empty_file",
        "cut",
        "not_utf8",
        "nan",
        "key_twice",
        "nested",
    ],
)
def test_index_that_is_none_is_a_finding(tmp_path: Path, index: Any) -> None:
    report = _check(_sharded(tmp_path / "ckpt", index))
    assert report.exit_code == 1
    assert {(f.rule, f.severity, f.where.file) for f in report.findings} == {
        ("QC101", "error", INDEX)
    }


@pytest.mark.parametrize(
    "file",
    [
        "/etc/passwd",
        f"../{SHARD}",
        f"./{SHARD}",
        f"sub/{SHARD}",
        "..",
        ".",
        "",
        "a\\..\\b",
        f"{SHARD}\0",
        7,
        None,
        [SHARD],
        {"file": SHARD},
    ],
    ids=[
        "absolute",
        "up",
        "here",
        "below",
        "dots",
        "dot",
        "empty",
        "backslash",
        "nul",
        "number",
        "null",
        "list",
        "object",
    ],
)
def test_index_that_names_no_plain_file_is_a_finding(tmp_path: Path, file: Any) -> None:
    outside = tmp_path / SHARD
    outside.write_bytes(_file({"stolen.weight": ENTRY}))
    folder = _sharded(
        tmp_path / "ckpt",
        {"metadata": {"total_size": 24}, "weight_map": {NAME: SHARD, "b.weight": file}},
    )
    assert set(open_checkpoint(folder).tensors) == {NAME}
    report = _check(folder)
    assert report.exit_code == 1
    (found,) = report.by_rule("QC101")
    assert (found.severity, found.where.tensor, found.where.file) == ("error", "b.weight", INDEX)


@pytest.mark.parametrize("file", ["config.json", "pytorch_model.bin"])
def test_index_that_names_another_kind_of_file_is_a_finding(tmp_path: Path, file: str) -> None:
    """The name is plain and the file is there, and it is no safetensors file: every loader fails on
    it.
    """
    folder = _sharded(
        tmp_path / "ckpt", {"metadata": {"total_size": 24}, "weight_map": {NAME: file}}
    )
    (folder / "pytorch_model.bin").write_bytes(b"PK")
    report = _check(folder)
    assert report.exit_code == 1
    assert any(f.where.tensor == NAME for f in report.findings)


@pytest.mark.parametrize("total", ["24", None, 24.5, 1e308, True, [24], -1, 10**30], ids=str)
def test_odd_total_size_is_read(tmp_path: Path, total: Any) -> None:
    folder = _sharded(
        tmp_path / "ckpt", {"metadata": {"total_size": total}, "weight_map": {NAME: SHARD}}
    )
    report = _check(folder)
    assert {f.rule for f in report.findings} <= {"QC106"}


@pytest.mark.parametrize("metadata", [None, [], "x", 3], ids=repr)
def test_metadata_of_the_index_may_be_anything(tmp_path: Path, metadata: Any) -> None:
    folder = _sharded(tmp_path / "ckpt", {"metadata": metadata, "weight_map": {NAME: SHARD}})
    assert _check(folder).findings == ()


# the configs

TEXT_FAMILIES = ("llama", "mixtral", "qwen3_moe", "minimax_m3_vl", "nothing_known")
ODD = [None, True, 7, -1, 1.5, 10**30, "x", [], [None], {}, {"a": 1}]
KEYS = (
    "text_config",
    "vision_config",
    "num_hidden_layers",
    "num_local_experts",
    "hidden_size",
    "num_attention_heads",
    "head_dim",
    "mlp_layer_types",
    "moe_layer_freq",
    "mlp_only_layers",
    "decoder_sparse_step",
    "first_k_dense_replace",
    "layer_types",
    "sparse_attention_config",
    "tie_word_embeddings",
    "quantization_config",
)


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"null", b"{", b"\xff", b'{"a": 1, "a": 1}', b"[" * 200_000]
)
@pytest.mark.parametrize("file", ["config.json", "hf_quant_config.json"])
def test_config_that_is_no_object_is_a_finding(tmp_path: Path, file: str, text: bytes) -> None:
    folder = _folder(tmp_path / "ckpt", _file(_entry()))
    (folder / file).write_bytes(text)
    report = _check(folder)
    assert report.exit_code == 1
    assert ("QC407", file) in {(f.rule, f.where.file) for f in report.findings}


def test_infinity_in_a_config_is_read(tmp_path: Path) -> None:
    """Python writes it, transformers reads it, and nvidia/Nemotron-H-56B-Base-8K has it in
    config.json.
    """
    folder = _folder(tmp_path / "ckpt", _file(_entry()))
    (folder / "config.json").write_text(
        '{"model_type": "nemotron_h", "time_step_limit": [0.0, Infinity]}'
    )
    assert open_checkpoint(folder).model_type == "nemotron_h"
    # It is no whole nemotron_h, whose names are known; of its config nothing is said.
    assert {f.rule for f in verifier.check(folder, depth="payload").findings} <= {
        "QC109",
        "QC201",
        "QC205",
    }


@pytest.mark.parametrize("model_type", TEXT_FAMILIES)
@pytest.mark.parametrize("key", KEYS)
def test_odd_config_values_never_crash_the_check(tmp_path: Path, key: str, model_type: str) -> None:
    folder = _folder(tmp_path / "ckpt", _file(_entry()))
    small: dict[str, Any] = {
        "model_type": model_type,
        "num_hidden_layers": 2,
        "num_local_experts": 2,
        "vision_config": {"num_hidden_layers": 1},
        "text_config": {"num_hidden_layers": 2, "num_local_experts": 2},
    }
    for value in ODD:
        for config in (
            small | {key: value},
            small | {"text_config": {**small["text_config"], key: value}},
        ):
            (folder / "config.json").write_text(json.dumps(config))
            assert verifier.check(folder, depth="payload").exit_code in (1, 3), (key, value)


@pytest.mark.parametrize(
    "model_type", [None, 7, [], {}, "", "../llama", "__init__", "a\0b"], ids=repr
)
def test_odd_model_type_is_unknown(tmp_path: Path, model_type: Any) -> None:
    folder = _folder(tmp_path / "ckpt", _file(_entry()))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    assert _check(folder).findings == ()


# links


def _hub_cache(root: Path) -> Path:
    """Write the layout of the hub's cache: snapshots/REV/FILE points into blobs/, two levels up."""
    repo = root / "models--org--name"
    snapshot = repo / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for i, (file, data) in enumerate(
        [
            (SHARD, _file(_entry())),
            ("config.json", json.dumps({"model_type": "none_that_is_known"}).encode()),
        ]
    ):
        (repo / "blobs" / f"{i:064x}").write_bytes(data)
        (snapshot / file).symlink_to(Path("..") / ".." / "blobs" / f"{i:064x}")
    return snapshot


def test_links_of_the_hub_cache_are_followed(tmp_path: Path) -> None:
    snapshot = _hub_cache(tmp_path)
    checkpoint = open_checkpoint(snapshot)
    assert set(checkpoint.tensors) == {NAME}
    assert checkpoint.model_type == "none_that_is_known"
    assert (
        checkpoint.array(checkpoint.tensors[NAME]).tobytes()
        == np.zeros((2, 3), np.float32).tobytes()
    )
    report = _check(snapshot)
    assert report.findings == ()
    linked = tmp_path / "by-link"
    linked.symlink_to(snapshot)
    assert _check(linked).findings == ()


def test_link_into_another_repository_of_the_cache_is_a_finding(tmp_path: Path) -> None:
    snapshot = _hub_cache(tmp_path)
    other = tmp_path / "models--org--other" / "blobs"
    other.mkdir(parents=True)
    (other / "f").write_bytes(_file({"stolen.weight": ENTRY}))
    (snapshot / "z.safetensors").symlink_to(other / "f")
    assert set(open_checkpoint(snapshot).tensors) == {NAME}
    found = _check(snapshot).by_rule("QC104")
    assert {(f.severity, f.where.file) for f in found} == {("error", "z.safetensors")}


@pytest.mark.parametrize("name", ["z.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("relative", [True, False])
def test_link_out_of_the_folder_is_a_finding(tmp_path: Path, name: str, relative: bool) -> None:
    folder = _folder(tmp_path / "ckpt", _file(_entry()))
    secret = tmp_path / "secret"
    secret.write_bytes(_file({"stolen.weight": ENTRY}))
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(Path("..") / "secret" if relative else secret)
    checkpoint = open_checkpoint(folder)
    assert name not in checkpoint.files
    assert set(checkpoint.tensors) == {NAME}
    report = _check(folder)
    assert report.exit_code == 1
    assert ("QC104", name) in {(f.rule, f.where.file) for f in report.findings}


def test_link_within_the_folder_is_followed(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "ckpt", _file(_entry()))
    (folder / "config.json").rename(folder / "real.json")
    (folder / "config.json").symlink_to("real.json")
    assert _check(folder).findings == ()


def test_dangling_link_is_an_absent_file(tmp_path: Path) -> None:
    folder = _sharded(tmp_path / "ckpt", {"weight_map": {NAME: SHARD, "b.weight": "b.safetensors"}})
    (folder / "b.safetensors").symlink_to("nowhere")
    report = _check(folder)
    assert [(f.rule, f.where.file) for f in report.findings] == [("QC101", "b.safetensors")]


def test_link_to_itself_is_no_crash(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "ckpt", _file(_entry()))
    (folder / "loop.safetensors").symlink_to("loop.safetensors")
    assert _check(folder).exit_code in (1, 3)


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    """A pipe named like a shard would block whoever opens it."""
    folder = _folder(tmp_path / "ckpt", _file(_entry()))
    os.mkfifo(folder / "pipe.safetensors")
    (folder / "folder.safetensors").mkdir()
    assert set(open_checkpoint(folder).files) == {SHARD, "config.json"}
    assert _check(folder).findings == ()


# no checkpoint at all


def test_a_folder_without_shards_is_a_wrong_call(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "ckpt", _file(_entry()))
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotACheckpointError):
        verifier.check(tmp_path / "empty")
    with pytest.raises(NotACheckpointError):
        verifier.check(folder, base=tmp_path / "empty")


@pytest.mark.parametrize(
    "make", [lambda p: None, lambda p: p.write_bytes(b"")], ids=["absent", "a_file"]
)
def test_path_that_is_no_folder_is_a_usage_error(
    tmp_path: Path, make: Callable[[Path], Any]
) -> None:
    make(tmp_path / "x")
    with pytest.raises(UsageError):
        verifier.check(tmp_path / "x")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a": 1, "b": 2, "a": 3}', "'a' occurs twice"),
        ('{"a": NaN}', "NaN is not JSON"),
        ("[-Infinity]", "not JSON"),
        ("[" * 200_000, "deep"),
        (b"\xff", "UTF-8"),
    ],
    ids=["key_twice", "nan", "infinity", "nested", "not_utf8"],
)
def test_strict_json_names_what_is_wrong(text: bytes | str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        strict_json(text)


def test_strict_json_reads_json() -> None:
    assert strict_json('{"a": [1, 2.5, null]}') == {"a": [1, 2.5, None]}
