# SPDX-License-Identifier: Apache-2.0
"""Both decoders against compressed-tensors' own decompression of what its own compressors wrote."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

import verifier
from exporter import codecs

PEERS = Path(os.environ.get("CKPTGATE_PEERS", "/tmp/ckptgate-peers"))  # noqa: S108
PYTHON = PEERS / "compressed-tensors" / "bin" / "python"
OURS = {
    "nvfp4": "nvfp4_ct",
    "mxfp4": "mxfp4",
    "mxfp8": "mxfp8",
    "fp8": "fp8",
    "fp8_per_channel": "fp8_per_channel",
}
pytestmark = pytest.mark.skipif(
    not PYTHON.exists(), reason=f"compressed-tensors is not at {PYTHON} (CKPTGATE_PEERS)"
)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    out = tmp_path_factory.mktemp("peer") / "ct.npz"
    worker = Path(__file__).with_name("compressed_tensors_worker.py")
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [PYTHON, worker, out],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    with np.load(out) as found:
        return dict(found)


@pytest.mark.parametrize("name", OURS)
def test_values_are_those_of_its_own_decompression(
    written: dict[str, np.ndarray], name: str
) -> None:
    parts = {k.removeprefix(f"{name}/"): v for k, v in written.items() if k.startswith(f"{name}/")}
    wanted = parts.pop("=")
    ours = verifier.decode(parts, OURS[name])
    theirs = codecs.decode({k: torch.from_numpy(v.copy()) for k, v in parts.items()}, OURS[name])
    assert np.array_equal(ours.view(np.int32), theirs.numpy().view(np.int32))
    assert np.abs(ours).max() > 0.1
    if name == "nvfp4":  # it decompresses to BF16, by more than one rounding
        assert np.all(np.abs(ours - wanted) <= np.abs(ours) * 2.0**-7)
        assert np.mean(np.abs(ours - wanted)[ours != 0] / np.abs(ours[ours != 0])) < 2.0**-8
    else:
        assert np.array_equal(ours, wanted)
