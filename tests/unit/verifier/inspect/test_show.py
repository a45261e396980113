# SPDX-License-Identifier: Apache-2.0
"""What `show` says of one place, against the bytes of the file and against the whole tensor
decoded.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import verifier
from tests.paths import TESTS
from verifier.cli import run
from verifier.errors import ContentError
from verifier.inspect.render import show_json, show_text
from verifier.inspect.show import Location, parse_location, show
from verifier.quantized import QuantizedCheckpoint
from verifier.report import render_text
from verifier.selftest.editor import CheckpointEditor

DATA = TESTS / "data" / "modelopt"
QWEN, QWEN_NVFP4 = DATA / "src_qwen3moe", DATA / "qwen3moe_nvfp4_experts_max"
LLAMA, LLAMA_MXFP8 = DATA / "src_llama", DATA / "llama_mxfp8"
EXPERT = "model.layers.1.mlp.experts.5.down_proj"
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def copy(tmp_path: Path) -> CheckpointEditor:
    return CheckpointEditor(Path(shutil.copytree(QWEN_NVFP4, tmp_path / "copy")))


def held_to_the_whole(folder: Path, base: Path) -> int:
    """Hold every block that is shown to the slice of the whole tensor; return how many."""
    judged, plain = (
        QuantizedCheckpoint(verifier.open_checkpoint(folder)),
        QuantizedCheckpoint(verifier.open_checkpoint(base)),
    )
    count = 0
    for module in list(judged.modules.values()):
        if not module.quantized or module.dims is None:
            continue
        whole, source = judged.values(module), plain.values(plain.modules[module.name])
        assert whole is not None
        assert source is not None
        out, in_ = module.dims
        for row, block in ((0, 0), (out - 1, 1), (out // 2, in_ // 64)):
            found = show(folder, module.name, row=row, block=block, base=base)
            start = found.first
            stop = start + len(found.elements)
            assert stop <= in_
            assert np.array_equal(
                np.float32([e.value for e in found.elements]), whole[row, start:stop]
            )
            assert np.array_equal(
                np.float32([e.base for e in found.elements]), source[row, start:stop]
            )
            count += 1
    return count


def test_every_format_is_shown_as_it_decodes() -> None:
    assert held_to_the_whole(QWEN_NVFP4, QWEN) == 3 * 48
    assert held_to_the_whole(LLAMA_MXFP8, LLAMA) == 3 * 14


def test_a_release_with_fp8_and_a_mixed_one(shared_data: Path) -> None:
    root = shared_data / "modelopt"
    assert held_to_the_whole(root / "llama_fp8_kvfp8", root / "src_llama") == 3 * 14
    assert held_to_the_whole(root / "m3_mixed_example", root / "src_m3") > 3 * 48


@pytest.mark.parametrize(
    ("dtype", "shape", "leaf", "algo", "block"),
    [
        ("F8_E4M3", (2, 3), "weight_scale_inv", "FP8_PB_WO", 2),
        ("F8_E4M3", (200,), "weight_scale", "FP8_PER_CHANNEL_PER_TOKEN", 1),
        ("F8_E4M3", (200, 1), "weight_scale", "FP8_PER_CHANNEL_PER_TOKEN", 1),
    ],
)
def test_other_fp8_layouts(
    tmp_path: Path, dtype: str, shape: tuple[int, ...], leaf: str, algo: str, block: int
) -> None:
    folder = CheckpointEditor(Path(shutil.copytree(LLAMA, tmp_path / "copy")))
    rng = np.random.default_rng(3)
    weight = rng.normal(size=(200, 300)).astype(ml_dtypes.float8_e4m3fn)
    scale = rng.uniform(0.5, 2, size=shape).astype(np.float32)
    folder.add("m.weight", weight)
    folder.add(f"m.{leaf}", scale)
    found = show(folder.path, "m", row=150, block=block)
    assert found.format == algo
    start = found.first
    rows = scale[150 // 128, block] if algo == "FP8_PB_WO" else scale.reshape(-1)[150]
    expected = weight[150, start : start + len(found.elements)].astype(np.float32) * rows
    assert start == (256 if algo == "FP8_PB_WO" else 16)
    assert np.array_equal(np.float32([e.value for e in found.elements]), expected)
    assert found.scales[0].value == rows


def test_compressed_tensors_divide(tmp_path: Path) -> None:
    folder = CheckpointEditor(Path(shutil.copytree(LLAMA, tmp_path / "copy")))
    codes = np.random.default_rng(4).integers(0, 256, (4, 16), dtype=np.uint8)
    scale = np.random.default_rng(5).uniform(1, 400, (4, 2)).astype(ml_dtypes.float8_e4m3fn)
    folder.add("m.weight_packed", codes)
    folder.add("m.weight_scale", scale)
    folder.add("m.weight_global_scale", np.float32([1024]))
    found = show(folder.path, "m", row=3, block=1)
    nibbles = np.stack([codes & 15, codes >> 4], axis=2).reshape(4, 32)[3, 16:]
    expected = nibbles.view(ml_dtypes.float4_e2m1fn).astype(np.float32) * (
        np.float32(scale[3, 1]) / np.float32(1024)
    )
    assert np.array_equal(np.float32([e.value for e in found.elements]), expected)
    assert [e.raw for e in found.elements] == [f"0x{n:X}" for n in nibbles]


def test_bytes_are_where_it_says(copy: CheckpointEditor) -> None:
    found = show(copy.path, f"{EXPERT}.weight_scale", row=12, block=3)
    raw = (copy.path / "model.safetensors").read_bytes()
    assert {s.leaf for s in found.scales} == {"weight_scale", "weight_scale_2", "input_scale"}
    for scale in found.scales:
        width = (len(scale.raw) - 2) // 2
        assert int.from_bytes(raw[scale.byte : scale.byte + width], "little") == int(scale.raw, 16)
    codes = [int(e.raw, 16) for e in found.elements]
    assert (
        bytes(a | b << 4 for a, b in zip(codes[::2], codes[1::2], strict=True))
        == raw[found.byte : found.byte + 8]
    )
    place = copy.where(f"{EXPERT}.weight_scale", 12 * 4 + 3)
    assert (place.row, place.block, place.byte) == (12, 3, found.scales[-1].byte)


@pytest.mark.parametrize("code", [0x00, 0x7F, 0x81])
def test_a_place_of_a_report_leads_to_its_bytes(copy: CheckpointEditor, code: int) -> None:
    name = f"{EXPERT}.weight_scale"
    copy.overwrite(name, 12 * 4 + 3, bytes([code]))
    text = render_text(verifier.check(copy.path, depth="payload"))
    line = next(x.strip() for x in text.splitlines() if name in x)
    assert "[row 12, block 3, byte " in line
    found = show(copy.path, line, base=QWEN)
    assert (found.tensor.name, found.row, found.block) == (name, 12, 3)
    assert f"0x{code:02X}" in {s.raw for s in found.scales if s.leaf == "weight_scale"}
    assert found.expected is not None
    assert (
        found.expected.raw
        == f"0x{CheckpointEditor(QWEN_NVFP4).array(name)[12, 3].view(np.uint8):02X}"
    )
    json.loads(show_json(found))
    assert show_text(found)


def test_a_place_in_a_weight_is_the_element_that_differs(tmp_path: Path) -> None:
    """A report counts a weight's elements, not its blocks: block 200 is column 200."""
    folder = CheckpointEditor(Path(shutil.copytree(LLAMA, tmp_path / "copy")))
    folder.overwrite("model.embed_tokens.weight", 3 * 128 + 100, b"\x80\x7f")
    text = render_text(verifier.check(folder.path, base=LLAMA, depth="payload"))
    line = next(x.strip() for x in text.splitlines() if "embed_tokens" in x)
    for place in (line, re.sub(r", byte.*", "]", line)):
        found = show(folder.path, place, base=LLAMA)
        assert (found.row, found.first, found.asked) == (3, 96, (100,))
        assert [x.split()[1] for x in show_text(found).splitlines() if x.startswith("> ")] == [
            "100"
        ]
        assert found.elements[4].raw == "0x7F80"
        assert found.elements[4].value == np.inf
        assert found.elements[4].base != np.inf


def test_a_byte_in_packed_codes(copy: CheckpointEditor) -> None:
    tensor = copy.tensors()[f"{EXPERT}.weight"]
    found = show(copy.path, f"{EXPERT}.weight", byte=tensor.offset + 5 * tensor.shape[1] + 9)
    assert (found.row, found.block, found.first, found.asked) == (5, 1, 16, (18, 19))
    assert [x.split()[1] for x in show_text(found).splitlines() if x.startswith("> ")] == [
        "18",
        "19",
    ]
    assert show(copy.path, f"{EXPERT}.weight", row=5, block=1).asked == ()


def test_the_nearest_codes_of_a_sound_export_are_those_stored() -> None:
    """ModelOpt's codes are the nearest ones under its own scale, ties aside."""
    found = show(QWEN_NVFP4, EXPERT, row=7, block=2, base=QWEN)
    assert [e.code for e in found.elements] == [e.raw for e in found.elements]
    assert found.expected is not None
    assert found.expected.error <= found.expected.stored_error * (1 + 1e-6)


def test_another_code_shows_beside_the_nearest(copy: CheckpointEditor) -> None:
    before = show(copy.path, EXPERT, row=7, block=2, base=QWEN)
    raw = copy.array(f"{EXPERT}.weight")[7, 16]
    copy.overwrite(f"{EXPERT}.weight", 7 * 32 + 16, bytes([raw ^ 0x08]))
    after = show(copy.path, EXPERT, row=7, block=2, base=QWEN)
    assert [i for i, e in enumerate(after.elements) if e.raw != e.code] == [0]
    assert after.elements[0].value == -before.elements[0].value
    assert after.expected is not None
    assert before.expected is not None
    assert after.expected.stored_error > before.expected.stored_error


def test_an_infinite_base_is_told(tmp_path: Path) -> None:
    base = CheckpointEditor(Path(shutil.copytree(QWEN, tmp_path / "base")))
    base.overwrite(f"{EXPERT}.weight", 7 * 64 + 33, b"\x80\x7f")
    found = show(QWEN_NVFP4, EXPERT, row=7, block=2, base=base.path)
    assert found.notes == ("the base is not finite here",)
    assert json.loads(show_json(found))["elements"][1]["base"] == "Infinity"


def test_what_no_format_fits_is_shown_as_stored(copy: CheckpointEditor) -> None:
    copy.drop([f"{EXPERT}.weight_scale"])
    found = show(copy.path, f"{EXPERT}.weight", row=2)
    assert found.scales == ()
    assert [e.raw for e in found.elements] == [
        f"0x{b:02X}" for b in copy.array(f"{EXPERT}.weight")[2, :16]
    ]
    assert "ckptgate check" in show_text(found)


def test_a_bias_and_a_cache_scale_of_a_quantized_module(tmp_path: Path) -> None:
    folder = CheckpointEditor(Path(shutil.copytree(LLAMA_MXFP8, tmp_path / "copy")))
    name = "model.layers.0.self_attn.k_proj"
    folder.add(f"{name}.bias", np.arange(64, dtype=np.float32))
    folder.add(f"{name}.k_scale", np.float32(0.25))
    found = show(folder.path, f"{name}.bias", row=20)
    assert ([e.value for e in found.elements[:2]], found.first, found.scales) == ([16, 17], 16, ())
    assert found.format == "MXFP8"
    assert [e.value for e in show(folder.path, f"{name}.k_scale").elements] == [0.25]
    assert show(folder.path, name).elements[0].base is None


def test_a_global_scale_shows_what_it_scales() -> None:
    found = show(QWEN_NVFP4, f"{EXPERT}.weight_scale_2")
    assert (found.row, found.block) == (0, 0)
    byte = next(s.byte for s in found.scales if s.leaf == "weight_scale_2")
    assert (
        show(QWEN_NVFP4, f"{EXPERT}.weight_scale_2 [byte {byte:,}, of model.safetensors]") == found
    )


def test_three_dimensions_need_a_byte(copy: CheckpointEditor) -> None:
    place = copy.add("stack", np.arange(24, dtype=np.float32).reshape(2, 3, 4))
    offset = copy.tensors()["stack"].offset
    assert place.tensor == "stack"
    assert show(copy.path, "stack").elements[0].value == 0
    with pytest.raises(ContentError, match="use --byte"):
        show(copy.path, "stack", row=1)
    assert [e.value for e in show(copy.path, "stack", byte=offset + 4 * 17).elements] == [
        16,
        17,
        18,
        19,
    ]


@pytest.mark.parametrize("shape", [(), (1,), (0,), (0, 4), (4, 0)])
def test_small_and_empty_tensors(copy: CheckpointEditor, shape: tuple[int, ...]) -> None:
    copy.add("odd", np.zeros(shape, np.float32))
    if 0 in shape:
        with pytest.raises(ContentError):
            show(copy.path, "odd")
    else:
        assert show(copy.path, "odd").elements[0].value == 0


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("a.b.weight_scale", Location("a.b.weight_scale")),
        ("  a.b [row 12, block 3]", Location("a.b", 12, 3)),
        (
            "a [row 1,234, block 3, byte 2,078,571, of m.safetensors]",
            Location("a", 1234, 3, 2078571),
        ),
        ("a [row 5, byte 77, of row 9, block 2.safetensors]", Location("a", 5, None, 77)),
        ("a [in model.safetensors]", Location("a")),
        ("a [0]", Location("a [0]")),
        ("a [byte 12345678901234567890123]", Location("a")),
    ],
)
def test_locations(text: str, place: Location) -> None:
    assert parse_location(text) == place


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (
            ["experts.5.up_prj"],
            1,
            "no tensor 'experts.5.up_prj'. Did you mean model.layers.0.mlp.experts.5.up_proj.",
        ),
        (
            ["model.layer.0.mlp.gate"],
            1,
            "no tensor 'model.layer.0.mlp.gate'. Did you mean model.layers.0.mlp.gate.weight",
        ),
        ([EXPERT, "--row", "128"], 1, "has no row 128, only 0 to 127"),
        ([EXPERT, "--block", "4"], 1, "has no block 4, only 0 to 3"),
        ([f"{EXPERT}.weight", "--byte", "3"], 1, "byte 3 is outside"),
        ([EXPERT, "--byte", "3", "--row", "1"], 2, "use --byte, or --row and --block, not both"),
        (["model.norm.weight", "--row", "128"], 1, "has no element 128, only 0 to 127"),
    ],
)
def test_a_place_that_is_not_there(capsys: Capture, argv: list[str], code: int, words: str) -> None:
    assert run(["show", str(QWEN_NVFP4), *argv]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err
    assert len(err.splitlines()) == 1


def test_a_hostile_name_is_found_as_it_is_printed(copy: CheckpointEditor, capsys: Capture) -> None:
    copy.add("x\x1b[31m\n.weight", np.ones(3, np.float32))
    assert run(["show", str(copy.path), "x\\x1b[31m\\x0a.weight [row 1]"]) == 0
    out = capsys.readouterr().out
    assert all(c == "\n" or c.isprintable() for c in out)
    assert "x\\x1b[31m" in out
