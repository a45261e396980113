# SPDX-License-Identifier: Apache-2.0
"""A directory of a wrong kind is named, with what to do, before a header is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.paths import TESTS
from verifier.checkpoint import open_checkpoint
from verifier.cli import run
from verifier.errors import NotACheckpointError

DATA = TESTS / "data" / "modelopt"
LLAMA, QWEN_NVFP4 = DATA / "src_llama", DATA / "qwen3moe_nvfp4_experts_max"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def _files(*names: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("{}")

    return make


def _adapter(folder: Path) -> None:
    shutil.copy(LLAMA / "model.safetensors", folder / "adapter_model.safetensors")
    config = {"base_model_name_or_path": "org/base", "r": 16}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def _pipeline(folder: Path) -> None:
    _files("model_index.json", "unet/config.json", "vae/config.json")(folder)
    for part in ("unet", "vae"):
        shutil.copy(LLAMA / "model.safetensors", folder / part)


def _parent(folder: Path) -> None:
    for name in ("first", "second"):
        shutil.copytree(LLAMA, folder / name)


def _hub_cache(folder: Path) -> None:
    shutil.copytree(LLAMA, folder / "snapshots" / "0123abcd")


def _pointers(folder: Path) -> None:
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        (folder / name).write_text(POINTER)


KINDS = {
    "empty": (_files(), "the directory is empty; give the one that holds config.json"),
    "pickles": (
        _files("config.json", "pytorch_model.bin"),
        "PyTorch weights, not safetensors (pytorch_model.bin); load the model with transformers "
        "and call save_pretrained(OUT)",
    ),
    "original": (_files("params.json", "consolidated.00.pth"), "(consolidated.00.pth)"),
    "gguf": (
        _files("m-Q4_K_M.gguf", "config.json"),
        "a GGUF model of llama.cpp (m-Q4_K_M.gguf); give the safetensors checkpoint",
    ),
    "distcp": (_files("__0_0.distcp", ".metadata"), "a distributed training checkpoint"),
    "deepspeed": (_files("zero_to_fp32.py"), "a distributed training checkpoint"),
    "onnx": (_files("model.onnx", "config.json"), "a format other than safetensors (model.onnx)"),
    "adapter": (_adapter, "a LoRA adapter of org/base, not a model; merge it into its base"),
    "old adapter": (_files("adapter_config.json", "adapter_model.bin"), "a LoRA adapter, not"),
    "pipeline": (_pipeline, "a diffusers pipeline; give the directory of one of its models: unet"),
    "parent": (_parent, "a directory of 2 checkpoints, not one itself; give one: first, second"),
    "hub cache": (_hub_cache, "its directory snapshots/0123abcd is one; give that"),
    "pointers": (_pointers, "all 2 shards are Git LFS pointers, not tensors; `git lfs pull`"),
    "config": (_files("config.json"), "a config without weights: no *.safetensors among its 1"),
    "notes": (_files("notes.txt"), "no *.safetensors among its 1 file (notes.txt); give the"),
}


@pytest.fixture(params=list(KINDS))
def kind(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str]:
    """Return a directory of each kind, and what its message says."""
    make, message = KINDS[request.param]
    folder = tmp_path / "folder"
    folder.mkdir()
    make(folder)
    return folder, message


def test_a_wrong_kind_is_named_with_what_to_do(kind: tuple[Path, str]) -> None:
    folder, message = kind
    with pytest.raises(NotACheckpointError) as raised:
        open_checkpoint(folder)
    assert str(raised.value).startswith(f"{folder}: ")
    assert message in str(raised.value)


def test_check_says_so_once_with_exit_2(
    kind: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, message = kind
    assert run(["check", str(folder)]) == 2
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 1)
    assert message in err


@pytest.mark.parametrize("option", ["--base", "--merged-from"])
def test_a_wrong_base_is_said_first(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the checkpoint itself is of a wrong kind."""
    base, candidate = tmp_path / "base", tmp_path / "candidate"
    base.mkdir()
    candidate.mkdir()
    _files("model.gguf")(base)
    for path in (QWEN_NVFP4, candidate):
        assert run(["check", str(path), option, str(base)]) == 2
        assert f"ckptgate: {option} {base}: a GGUF model" in capsys.readouterr().err


def test_one_pointer_among_tensors_is_a_finding(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(LLAMA, tmp_path / "copy"))
    (copy / "extra.safetensors").write_text(POINTER)
    assert run(["check", str(copy)]) == 1
    assert "extra.safetensors: is a Git LFS pointer, not tensors" in capsys.readouterr().out


def test_a_model_with_an_adapter_or_pickles_next_to_it_is_a_checkpoint(tmp_path: Path) -> None:
    copy = Path(shutil.copytree(LLAMA, tmp_path / "copy"))
    _adapter(copy)
    _files("pytorch_model.bin", "model.gguf", "model_index.json", "empty/x.safetensors")(copy)
    assert "model.safetensors" in open_checkpoint(copy).files


def test_a_base_of_another_model_is_said_before_its_findings(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(["check", str(QWEN_NVFP4), "--base", str(LLAMA)]) == 1
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith(
        f"base    the base {LLAMA} is a different model: its model_type is llama"
    )
    assert run(["check", str(QWEN_NVFP4), "--base", str(DATA / "src_qwen3moe")]) == 0
    assert "different model" not in capsys.readouterr().out
