# SPDX-License-Identifier: Apache-2.0
"""The verifier's decoder, and the encoder of tests/formats, against other tools' own decoders.

Where a tool rounds nothing, the values are the same to the bit. A tool is installed by ``uv venv
$CKPTGATE_PEERS/TOOL`` and ``uv pip install --python $CKPTGATE_PEERS/TOOL/bin/python TOOL``.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import verifier
from tests.formats.encoders import Linear
from tests.formats.files import Array, Tensors, safetensors
from tests.formats.formats import encoder_of
from tests.formats.models import MODELS, generator
from tests.formats.numbers import bf16
from tests.formats.table import FORMATS

PEERS = Path(os.environ.get("CKPTGATE_PEERS", "/tmp/ckptgate-peers"))  # noqa: S108
HERE = Path(__file__).parent
SHAPE = (128, 256)
DECODED_AS = {
    "ct_nvfp4": "nvfp4_ct",
    "ct_mxfp4": "mxfp4",
    "ct_mxfp8": "mxfp8",
    "ct_fp8_tensor": "fp8",
    "ct_fp8_channel": "fp8_per_channel",
    "ct_fp8_block": "fp8_block",
}
"""The verifier's name of each format that it decodes."""
ERROR = 0.13
"""The largest relative error of a weight after its encoding, in root mean squares."""
THREE_BITS = 0.25
"""The same for integers of 3 bits."""
ROUNDED = {"ct_nvfp4": 2.0**-7}
"""Formats that compressed-tensors decodes to BF16, and the relative difference that makes."""
GPTQ = {
    "gptq": (4, 128, "zero_less_one"),
    "gptq_v2": (4, 128, "zero"),
    "gptq_desc_act": (4, 128, "zero_less_one"),
    "gptq_asym": (4, 128, "zero_less_one"),
    "gptq_8bit": (8, 128, "zero_less_one"),
    "autoround_gptq": (4, 128, "zero_less_one"),
    "awq": (4, 128, "awq"),
    "autoround_awq": (4, 128, "awq"),
}


def scheme(name: str) -> tuple[str, dict[str, Any]]:
    """Return compressed-tensors' compressor and scheme of one of its formats, or of AWQ."""
    if name == "awq":
        weights = {"num_bits": 4, "type": "int", "symmetric": False, "group_size": 128}
        return "pack-quantized", {"targets": ["Linear"], "weights": weights | {"strategy": "group"}}
    files = FORMATS[name].declare(MODELS[FORMATS[name].model], ())
    config = files["config.json"]["quantization_config"]
    group = config["config_groups"]["group_0"]
    return config["format"], {"targets": group["targets"], "weights": group["weights"]}


COMPRESSED = [
    "ct_nvfp4",
    "ct_mxfp4",
    "ct_mxfp6",
    "ct_mxfp8",
    "ct_fp8_tensor",
    "ct_fp8_channel",
    "ct_fp8_block",
    "ct_w4a16",
    "ct_w4a16_asym",
    "ct_w4a16_channel",
    "ct_w3a16",
    "ct_w8a16",
    "ct_w8a8_int8",
    "kimi_k2_int4",
    "awq",
]


def weight_of(name: str) -> Array:
    """Return the BF16 weight that a format is tried on, as float32."""
    return bf16(generator(f"peer {name}").normal(0, 0.05, SHAPE)).astype(np.float32)


def encoded(name: str) -> Tensors:
    """Return a weight in a format, by leaf."""
    weight = weight_of(name)
    return encoder_of(FORMATS[name])(Linear("layer", weight, (weight,)))


def decoded_by(tool: str, script: str, file: bytes, folder: Path) -> dict[str, Array]:
    """Return what another tool makes of a safetensors file, by format."""
    python = PEERS / tool / "bin" / "python"
    if not python.exists():
        pytest.skip(f"{tool} is not at {python} (CKPTGATE_PEERS)")
    source, target = folder / "encoded.safetensors", folder / "decoded.safetensors"
    source.write_bytes(file)
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [python, HERE / script, source, target],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return read_float32(target)


def read_float32(path: Path) -> dict[str, Array]:
    """Return the float32 tensors of a safetensors file."""
    raw = path.read_bytes()
    start = 8 + struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8:start])
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        assert entry["dtype"] == "F32"
        low, high = entry["data_offsets"]
        values = np.frombuffer(raw[start + low : start + high], np.float32)
        found[name] = values.reshape(entry["shape"])
    return found


def bundle(names: list[str], how: Callable[[str], Any]) -> bytes:
    """Return one file with the tensors of some formats, and how each is decoded."""
    tensors = {f"{n}/{leaf}": array for n in names for leaf, array in encoded(n).items()}
    return safetensors(tensors, {n: json.dumps(how(n)) for n in names})


@pytest.fixture(scope="module")
def by_compressed_tensors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Array]:
    folder = tmp_path_factory.mktemp("compressed_tensors")
    file = bundle(COMPRESSED, scheme)
    return decoded_by("compressed-tensors", "compressed_tensors_decoder.py", file, folder)


@pytest.fixture(scope="module")
def by_auto_round(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Array]:
    folder = tmp_path_factory.mktemp("auto_round")
    return decoded_by("auto-round", "auto_round_decoder.py", bundle(list(GPTQ), GPTQ.get), folder)


def assert_decoded(name: str, values: Array, tolerance: float = 0.0) -> None:
    """Compare another tool's values with the weight, and with the verifier's values."""
    weight = weight_of(name)
    error = np.sqrt(np.square(values - weight).mean() / np.square(weight).mean())
    assert error < (THREE_BITS if name == "ct_w3a16" else ERROR)
    if name in DECODED_AS:
        ours = verifier.decode(encoded(name), DECODED_AS[name])
        assert np.all(np.abs(ours - values) <= np.abs(ours) * tolerance)


@pytest.mark.parametrize("name", COMPRESSED)
def test_compressed_tensors_decodes_the_same(
    by_compressed_tensors: dict[str, Array], name: str
) -> None:
    assert_decoded(name, by_compressed_tensors[name], ROUNDED.get(name, 0.0))


@pytest.mark.parametrize("name", GPTQ)
def test_auto_round_decodes_the_same(by_auto_round: dict[str, Array], name: str) -> None:
    assert_decoded(name, by_auto_round[name])


def test_two_tools_decode_awq_the_same(
    by_compressed_tensors: dict[str, Array], by_auto_round: dict[str, Array]
) -> None:
    assert np.array_equal(by_compressed_tensors["awq"], by_auto_round["awq"])
