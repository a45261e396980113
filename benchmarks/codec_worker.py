# SPDX-License-Identifier: Apache-2.0
"""One library's codecs in a process of its own, driven by benchmarks/codecs.py over JSON lines on
stdin and stdout.

    python benchmarks/codec_worker.py NAME FOLDER

Every library is called by the entry point that its documentation gives for weights. A line {"op",
"dtype", "shape", "threads"} is answered by {"seconds"} of one call; with "save", its result is
written under FOLDER instead, for comparison.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

Tensors = dict[str, torch.Tensor]
Call = Callable[[], Tensors]
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


def each(x: torch.Tensor, one: Callable[[torch.Tensor], Tensors]) -> Tensors:
    """Encode matrix by matrix, as a library does that has one global scale a call; return the
    last.
    """
    return one(x) if x.ndim == 2 else [one(part) for part in x][-1]


class Copy:
    """The yardstick: `torch.Tensor.copy_` of the input in float32."""

    version = torch.__version__

    def prepare(self, op: str, x: torch.Tensor, threads: int) -> Call | None:
        """Return the call to be timed."""
        y = torch.empty_like(x := x.float())
        return lambda: {"weight": y.copy_(x)}


class Ckptgate:
    """Ours: into tensors that exist (``out=``), or into new ones (``fresh``); the reference back
    end, or the chosen one.
    """

    def __init__(self, *, fresh: bool = False, reference: bool = False) -> None:
        os.environ["CKPTGATE_FAST"] = "0" if reference else "1"
        self.fresh = fresh

    @property
    def version(self) -> str:
        """Return the version, with the back end that runs."""
        from exporter import codecs

        return f"{version('ckptgate')} ({getattr(codecs, 'backend', lambda: 'torch')()})"

    def prepare(self, op: str, x: torch.Tensor, threads: int) -> Call | None:
        """Return the call to be timed."""
        from exporter import codecs, weights

        if op in ("sweep", "sweep_all"):
            scale_2 = codecs.amax(x, "nvfp4") / 2688
            if op == "sweep":
                return lambda: {
                    "weight_scale": weights.search(x, scale_2, "sweep", threads=threads)
                }
            blocks = x.float().abs().reshape(x.shape[0], -1, 16)
            return lambda: {"weight_scale": weights.sweep_all(blocks, scale_2.reshape(1, 1))}
        fmt, way = op.split("_")
        parts = codecs.encode(x, fmt, threads=threads)
        if way == "encode":
            out = None if self.fresh else dict(parts)
            return lambda: codecs.encode(x, fmt, out=out, threads=threads)
        into = None if self.fresh else torch.empty_like(x)
        return lambda: {
            "weight": codecs.decode(parts, fmt, dtype=x.dtype, out=into, threads=threads)
        }


class ModelOpt:
    """`NVFP4QTensor` and `MXFP8QTensor` of modelopt.torch.quantization.qtensor;
    `NVFP4MSECalibrator`.
    """

    version = property(lambda self: version("nvidia-modelopt"))

    def prepare(self, op: str, x: torch.Tensor, threads: int) -> Call | None:
        """Return the call to be timed."""
        from modelopt.torch.quantization.qtensor import MXFP8QTensor, NVFP4QTensor

        def nvfp4(w: torch.Tensor) -> Tensors:
            q, scale, scale_2 = NVFP4QTensor.quantize(w, 16)
            return {"weight": q._quantized_data, "weight_scale": scale, "weight_scale_2": scale_2}

        if op == "nvfp4_encode":
            return lambda: each(x, nvfp4)
        if op == "nvfp4_decode":
            stored = [NVFP4QTensor.quantize(w, 16) for w in x.reshape(-1, *x.shape[-2:])]

            def decode() -> Tensors:
                for q, scale, scale_2 in stored:
                    found = q.dequantize(
                        x.dtype, scale=scale, double_scale=scale_2, block_sizes={-1: 16}
                    )
                return {"weight": found}

            return decode
        if op == "mxfp8_encode":

            def mxfp8() -> Tensors:
                q, scale = MXFP8QTensor.quantize(x)
                return {"weight": q._quantized_data, "weight_scale": scale}

            return mxfp8
        if op == "mxfp8_decode":
            whole, scales = MXFP8QTensor.quantize(x)
            return lambda: {"weight": whole.dequantize(x.dtype, scale=scales)}
        return self.sweep(x) if op == "sweep" else None

    def sweep(self, x: torch.Tensor) -> Call:
        """Return its loop over 126 scales. Its fake quantizer needs CUDA: its own casts stand in
        for it, and no more.
        """
        from modelopt.torch.quantization.calib.mse import NVFP4MSECalibrator
        from modelopt.torch.quantization.qtensor import NVFP4QTensor

        top = x.abs().max()
        blocks = x.reshape(-1, 16)
        scale_2 = top / 2688

        def quantized(w: torch.Tensor, amax: torch.Tensor) -> torch.Tensor:
            scale = (
                NVFP4QTensor._cast_per_block_scale_to_fp8(amax / 6, top / 6)
                .float()
                .mul(scale_2)
                .reshape(-1, 1)
            )
            return (
                NVFP4QTensor.get_e2m1_values(w.device)[NVFP4QTensor._cast_fp4(w / scale).long()]
                * scale
            )

        def run() -> Tensors:
            loop = NVFP4MSECalibrator(
                blocks.abs().amax(1, keepdim=True), top, axis=0, quant_func=quantized
            )
            loop.collect(blocks)
            found = NVFP4QTensor._cast_per_block_scale_to_fp8(loop.compute_amax() / 6, top / 6)
            return {"weight_scale": found.reshape(x.shape[0], -1)}

        return run


class TorchAO:
    """`NVFP4Tensor.to_nvfp4` and `MXTensor.to_mx` of torchao.prototype.mx_formats."""

    version = property(lambda self: version("torchao"))

    def prepare(self, op: str, x: torch.Tensor, threads: int) -> Call | None:
        """Return the call to be timed."""
        from torchao.prototype.mx_formats.config import ScaleCalculationMode
        from torchao.prototype.mx_formats.mx_tensor import MXTensor
        from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale

        def quantize(w: torch.Tensor) -> Any:
            return NVFP4Tensor.to_nvfp4(w, per_tensor_scale=per_tensor_amax_to_scale(w.abs().max()))

        def nvfp4(w: torch.Tensor) -> Tensors:
            q = quantize(w)
            return {
                "weight": q.qdata,
                "weight_scale": q.scale,
                "weight_scale_2": q.per_tensor_scale,
            }

        def to_mx() -> Any:
            return MXTensor.to_mx(x, torch.float8_e4m3fn, 32, ScaleCalculationMode.RCEIL)

        def mxfp8() -> Tensors:
            q = to_mx()
            return {"weight": q.qdata, "weight_scale": q.scale}

        if op == "nvfp4_encode":
            return lambda: each(x, nvfp4)
        if op == "nvfp4_decode":
            stored = [quantize(w) for w in x.reshape(-1, *x.shape[-2:])]
            return lambda: {"weight": [q.dequantize(x.dtype) for q in stored][-1]}
        if op == "mxfp8_encode":
            return mxfp8
        if op == "mxfp8_decode":
            whole = to_mx()
            return lambda: {"weight": whole.dequantize(x.dtype)}
        return None


class CompressedTensors:
    """`NVFP4PackedCompressor` and `MXFP8QuantizationCompressor`, with scales by its own
    `calculate_qparams`.
    """

    version = property(lambda self: version("compressed-tensors"))

    def prepare(self, op: str, x: torch.Tensor, threads: int) -> Call | None:
        """Return the call to be timed."""
        from compressed_tensors.compressors.mxfp8.base import MXFP8QuantizationCompressor
        from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
        from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme
        from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

        if op not in ("nvfp4_encode", "nvfp4_decode", "mxfp8_encode", "mxfp8_decode"):
            return None
        packed = op.startswith("nvfp4")
        scheme: QuantizationScheme = preset_name_to_scheme(
            "NVFP4A16" if packed else "MXFP8A16", ["Linear"]
        )
        compressor = NVFP4PackedCompressor if packed else MXFP8QuantizationCompressor
        args = scheme.weights

        def state(w: torch.Tensor) -> Tensors:
            blocks = w.unflatten(-1, (-1, args.group_size))
            low, high = blocks.amin(-1), blocks.amax(-1)
            shared = generate_gparam(low.min(), high.max()) if packed else None
            scale, _ = calculate_qparams(low, high, args, global_scale=shared)
            whole = {"weight": w, "weight_scale": scale}
            return whole | {"weight_global_scale": shared} if shared is not None else whole

        def one(w: torch.Tensor) -> Tensors:
            found = compressor.compress(state(w), scheme)
            return {"weight": found.pop("weight_packed", found.get("weight")), **found}

        if op.endswith("encode"):
            return lambda: each(x, one)
        stored = [compressor.compress(state(w), scheme) for w in x.reshape(-1, *x.shape[-2:])]
        return lambda: {
            "weight": [compressor.decompress(q, scheme)["weight"].to(x.dtype) for q in stored][-1]
        }


LIBRARIES: dict[str, Callable[[], Any]] = {
    "copy": Copy,
    "ckptgate": Ckptgate,
    "ckptgate fresh": lambda: Ckptgate(fresh=True),
    "ckptgate torch": lambda: Ckptgate(reference=True),
    "modelopt": ModelOpt,
    "torchao": TorchAO,
    "compressed-tensors": CompressedTensors,
}


def main() -> None:
    """Answer requests until stdin ends."""
    library, folder = LIBRARIES[sys.argv[1]](), Path(sys.argv[2])
    answers, sys.stdout = sys.stdout, sys.stderr  # what a library prints is no answer
    held: tuple[Any, Call | None] = (None, None)
    for line in sys.stdin:
        asked = json.loads(line)
        if asked["op"] == "version":
            answer: dict[str, Any] = {"version": library.version}
        else:
            torch.set_num_threads(asked["threads"])
            if held[0] != asked:
                held = (None, None)
                count = torch.Size(asked["shape"]).numel()
                x = torch.from_file(
                    str(folder / "input.bin"), size=count, dtype=torch.float32
                ).clone()
                call = library.prepare(
                    asked["op"],
                    x.reshape(asked["shape"]).to(DTYPES[asked["dtype"]]),
                    asked["threads"],
                )
                held = (asked, call)
                if call is not None:
                    call()
            answer = time_or_save(
                held[1], folder / f"{sys.argv[1]}.bin" if asked.get("save") else None
            )
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def time_or_save(call: Call | None, file: Path | None) -> dict[str, Any]:
    """Return the seconds of one call, or the sizes of what was saved."""
    if call is None:
        return {"seconds": None}
    started = time.perf_counter()
    with torch.no_grad():
        found = call()
    seconds = time.perf_counter() - started
    if file is None:
        return {"seconds": seconds}
    raw = {
        k: v.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        for k, v in found.items()
    }
    file.write_bytes(b"".join(raw.values()))
    return {"leaves": {k: len(v) for k, v in raw.items()}}


if __name__ == "__main__":
    main()
