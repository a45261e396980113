# SPDX-License-Identifier: Apache-2.0
"""Load checkpoints with vLLM's own loader on a CPU: JSON lines on stdin and stdout. Run by path
under vLLM's own interpreter.

It imports only the standard library, torch and vLLM, so ckptgate need not be installed there.
Everything that depends on vLLM's internals is in this module. Lines in (>) and out (<):

    > {"ckptgate": 1, "tried": ["0.32"]}
    < {"ready": {"engine": "vllm 0.32.0"}}
    > {"id": 1, "model": PATH, "layers": null}
    < {"id": 1, "loaded": {…}}

``loaded`` has the fields of `verifier.rules.engine_loading.EngineLoad`. A failure of the worker
itself is {"error": …}, after which the process ends, as it does at the end of stdin. vLLM is
imported once; each checkpoint is loaded in a fork of the process.
"""

from __future__ import annotations

import os
import sys

# A file that is run by path has its own directory first on sys.path. (python -P leaves it out, but
# Python 3.10 has no such option.)
_HERE = os.path.dirname(os.path.realpath(__file__))
sys.path[:] = [entry for entry in sys.path if os.path.realpath(entry or ".") != _HERE]
# vLLM reads these when it is imported.
os.environ.update(
    {
        "VLLM_TARGET_DEVICE": "cpu",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_PLUGINS": "",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
    }
)

import contextlib  # noqa: E402
import functools  # noqa: E402
import importlib.machinery  # noqa: E402
import json  # noqa: E402
import logging  # noqa: E402
import math  # noqa: E402
import re  # noqa: E402
import tempfile  # noqa: E402
import traceback  # noqa: E402
import types  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from importlib import import_module  # noqa: E402
from typing import Any  # noqa: E402

MAX_NAMES = 2000
"""Names per list of an answer."""
SILENT_LOSS = (
    "must match",
    "differs across",
    "are not the same",
    "never loaded",
    "scaling factor 1.0",
    "not found in params_dict",
    "not found in the checkpoint",
)
"""Parts of warnings that mean that a value of the checkpoint is lost or made up."""
NO_CPU = (
    "cuda",
    "triton",
    "failed to find a kernel",
    "not supported on cpu",
    "not supported in cpu",
    "no module named",
    "has no attribute '_c",
    "'_opnamespace' '",
    "backend supports the deployment configuration",
    "backends available",
    "does not support the deployment configuration",
    "no valid cpu",
    "amx",
    "only supported on",
    "flashinfer",
    "sparse mla backend",
    "dummy base class",
    "model runner v1 does not support",
    "get_device_capability",
    "device capability",
)
"""Parts of messages, in lower case, of errors that a CPU causes and not the checkpoint."""
TEXT_LAYER = re.compile(r"^(?!.*(?:vision|visual|audio)).*?\blayers\.(\d+)\.")
LINEAR_KERNELS = (
    ("_POSSIBLE_NVFP4_KERNELS", "EmulationNvFp4LinearKernel"),
    ("_POSSIBLE_MXFP8_KERNELS", "EmulationMxfp8LinearKernel"),
    ("_POSSIBLE_MXFP4_KERNELS", "EmulationMxfp4LinearKernel"),
    ("_POSSIBLE_MXFP6_KERNELS", "EmulationMxfp6LinearKernel"),
    ("_POSSIBLE_FP8_BLOCK_KERNELS", "TritonFp8BlockScaledMMKernel"),
)
EXPERT_KERNELS = (
    ("nvfp4_emulation_moe", "Nvfp4QuantizationEmulationTritonExperts"),
    ("mxfp8_emulation_moe", "Mxfp8EmulationTritonExperts"),
    ("triton_moe", "TritonExperts"),
    ("cpu_moe", "CPUUnquantizedExperts"),
)
TORCHVISION = (
    "torchvision",
    "torchvision.io",
    "torchvision.ops",
    "torchvision.transforms",
    "torchvision.transforms.functional",
    "torchvision.transforms.v2",
    "torchvision.transforms.v2.functional",
)
E8M0_NAN = 255
OPTIONAL = (
    "q_scale",
    "k_scale",
    "v_scale",
    "prob_scale",
    "q_zero_point",
    "k_zero_point",
    "v_zero_point",
)
"""Parameters of the KV cache that vLLM itself replaces by 1 or 0, with a warning where a quantized
cache is declared.
"""


class Refusal(Exception):
    """vLLM raised an error in one of its stages."""

    def __init__(self, stage: str, error: BaseException) -> None:
        super().__init__(stage)
        self.stage = stage
        self.error = error

    def answer(self) -> dict[str, Any]:
        """Return the fields of the answer."""
        message = _message(self.error)
        last = traceback.extract_tb(self.error.__traceback__)
        place = f"{os.path.basename(last[-1].filename)}:{last[-1].name}" if last else ""
        lower = message.lower()
        no_cpu = isinstance(self.error, (NotImplementedError, ImportError)) or any(
            part in lower for part in NO_CPU
        )
        return {
            "stage": self.stage,
            "error": message,
            "place": place,
            "unbuildable": no_cpu and self.stage != "weight loading",
        }


def _message(error: BaseException) -> str:
    """Return an error in one line, with its cause where it has no text of its own."""
    text = str(error).strip() or (str(error.__cause__) if error.__cause__ else "")
    return f"{type(error).__name__}: {' '.join(text.split())}"[:600]


@contextlib.contextmanager
def stage(name: str) -> Iterator[None]:
    """Name the stage in which an error is raised.

    Raises:
        Refusal: the error.
    """
    try:
        yield
    except Refusal:
        raise
    except Exception as error:
        raise Refusal(name, error) from error


def prepare() -> str:
    """Import vLLM, let it select kernels on a CPU, and return its version."""
    _stub_torchvision()
    vllm, platform = import_module("vllm"), import_module("vllm.platforms").current_platform
    if not platform.is_cpu():
        raise RuntimeError(f"vLLM runs on {platform.device_name} here, not on a CPU")
    type(platform).supported_quantization = []
    type(platform).has_device_capability = classmethod(lambda *_, **__: True)
    _emulate_kernels(platform)
    _inspect_in_process()
    return str(vllm.__version__)


def _stub_torchvision() -> None:
    """Provide torchvision's names where it does not import: vision models need them when they are
    imported, and none of it runs here.
    """
    try:
        import_module("torchvision")
    except (ImportError, RuntimeError):
        # transformers looks once whether it is installed, and remembers that it is not.
        import_module("transformers.utils.import_utils").is_torchvision_available()
        for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        for name in TORCHVISION:
            module = types.ModuleType(name)
            module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
            module.__path__ = []
            vars(module)["__getattr__"] = functools.partial(getattr, Stub)
            sys.modules[name] = module


class _AnyAttribute(type):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return cls


class Stub(metaclass=_AnyAttribute):
    """In place of every name of torchvision."""

    def __init__(self, *_: Any, **__: Any) -> None:
        """Accept any arguments."""


def _emulate_kernels(platform: Any) -> None:
    """Let vLLM select kernels on a CPU: its own emulation where it has one, else a class that
    prepares weights with plain torch operations. None of them is run.
    """
    linear = import_module("vllm.model_executor.kernels.linear")
    for table, name in LINEAR_KERNELS:
        kernel = getattr(linear, name, None)
        if kernel is not None and hasattr(linear, table):
            kernel.is_supported = classmethod(lambda *_: (True, None))
            getattr(linear, table).setdefault(platform._enum, []).append(kernel)
    for module, name in EXPERT_KERNELS:
        with contextlib.suppress(ImportError, AttributeError):
            path = f"vllm.model_executor.layers.fused_moe.experts.{module}"
            experts = getattr(import_module(path), name)
            experts.is_supported_config = staticmethod(_for_any_config(experts))
    vars(import_module("vllm._custom_ops"))["scaled_fp8_quant"] = _fp8_by_scale


def _for_any_config(experts: Any) -> Callable[..., Any]:
    """Return what a class answers whether it supports a config; its subclasses answer as before."""
    original = experts.is_supported_config

    def supported(cls: Any, *arguments: Any) -> Any:
        return (True, None) if cls is experts else original(cls, *arguments)

    return supported


def _fp8_by_scale(values: Any, scale: Any = None, **_: Any) -> tuple[Any, Any]:
    """Return values in FP8 by a given scale, as vLLM's CUDA operation does."""
    torch = import_module("torch")
    fp8 = torch.float8_e4m3fn
    limit = torch.finfo(fp8).max
    return (values.float() / scale).clamp(-limit, limit).to(fp8), scale


def _inspect_in_process() -> None:
    """Inspect model classes in this process: a subprocess would import vLLM again."""
    registry = import_module("vllm.model_executor.models.registry")
    if hasattr(registry, "_run_in_subprocess"):
        vars(registry)["_run_in_subprocess"] = lambda function: function()


class Warnings(logging.Handler):
    """Collects warnings that mean silent loss."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a message that has one of `SILENT_LOSS`."""
        message = " ".join(record.getMessage().split())[:400]
        if any(part in message for part in SILENT_LOSS) and message not in self.messages:
            self.messages.append(message)


def load(path: str, layers: int | None) -> dict[str, Any]:
    """Load one checkpoint, and return the fields of `EngineLoad`."""
    warnings = Warnings()
    result: dict[str, Any] = {}
    try:
        with stage("configuration"):
            config = _engine_config(path, layers)
        # create_engine_config reconfigures logging: the handler is attached after it.
        logging.getLogger("vllm").addHandler(warnings)
        result = _load(config, layers)
    except Refusal as refusal:
        result = refusal.answer()
    return result | {"warnings": warnings.messages}


def _engine_config(path: str, layers: int | None) -> Any:
    arguments_class = import_module("vllm.engine.arg_utils").EngineArgs
    options: dict[str, Any] = {
        "model": path,
        "tokenizer": path,
        "skip_tokenizer_init": True,
        "trust_remote_code": False,
        "enforce_eager": True,
        "load_format": "safetensors",
        "linear_backend": "emulation",
        "disable_log_stats": True,
        # On a CPU, vLLM switches it off for MLA after it has adapted Mamba layers to it.
        "enable_prefix_caching": False,
        "max_num_seqs": 1,
    }
    if layers is not None:
        options["hf_overrides"] = lambda config: _shortened(config, layers)
    known = arguments_class.__dataclass_fields__
    arguments = arguments_class(**{k: v for k, v in options.items() if k in known})
    return arguments.create_engine_config()


def _shortened(config: Any, layers: int) -> Any:
    """Return a config with the first layers only."""
    for part in (config, getattr(config, "text_config", None)):
        count = getattr(part, "num_hidden_layers", None)
        if part is None or not isinstance(count, int) or count <= layers:
            continue
        for name, value in list(vars(part).items()):
            if isinstance(value, list) and len(value) == count:
                setattr(part, name, value[:layers])
        part.num_hidden_layers = layers
    return config


def _load(config: Any, layers: int | None) -> dict[str, Any]:
    torch = import_module("torch")
    utils = import_module("vllm.model_executor.model_loader.utils")
    loading = import_module("vllm.model_executor.model_loader")
    set_config = import_module("vllm.config").set_current_vllm_config
    set_dtype = import_module("vllm.utils.torch_utils").set_default_torch_dtype
    model_config = config.model_config
    with set_config(config), set_dtype(model_config.dtype):
        with stage("model construction"):
            _init_distributed()
            with torch.device("cpu"):
                model = utils.initialize_model(vllm_config=config)
        recorder = Recorder(model)
        with stage("weight loading"):
            loader = loading.get_model_loader(config.load_config)
            weights = _weights(loader, model_config, model, layers)
            with recorder:
                model.load_weights(recorder.watched(weights))
        optional = _optional(model)
        answer = {
            "architecture": type(model).__name__,
            "parameters": recorder.parameters,
            "bytes": recorder.bytes,
            "tensors": recorder.read,
            "unwritten": recorder.unwritten(optional),
            "unused": recorder.unused(),
            "casts": recorder.casts(),
        }
        sources = recorder.sources()
        with stage("post-processing"):
            utils.process_weights_after_loading(model, model_config, torch.device("cpu"))
        return answer | {"bad_scales": bad_scales(model, sources, optional)}


def _init_distributed() -> None:
    state = import_module("vllm.distributed.parallel_state")
    store = tempfile.NamedTemporaryFile(prefix="ckptgate-engine-", delete=False).name
    state.init_distributed_environment(1, 0, f"file://{store}", 0, "gloo")
    state.ensure_model_parallel_initialized(1, 1)
    with contextlib.suppress(OSError):
        os.unlink(store)


def _weights(
    loader: Any, model_config: Any, model: Any, layers: int | None
) -> Iterator[tuple[str, Any]]:
    for name, tensor in loader.get_all_weights(model_config, model):
        number = TEXT_LAYER.match(name)
        if layers is None or number is None or int(number[1]) < layers:
            yield name, tensor


def _optional(model: Any) -> set[str]:
    """Return the parameters that vLLM does without."""
    names = {n for n, _ in model.named_parameters() if n.rpartition(".")[2] in OPTIONAL}
    for prefix, module in model.named_modules():
        if getattr(getattr(module, "quant_method", None), "use_a16", False):
            names |= {f"{prefix}.{n}" for n, _ in module.named_parameters() if "input_scale" in n}
    return names


class Recorder:
    """Notes which bytes of which parameters a load writes, and from which tensors.

    Every operation of torch passes through a dispatch mode. A tensor that is made of checkpoint
    tensors (a view, a cast, a concatenation) carries their names; an operation that writes into
    the storage of a parameter marks the elements and notes the names.
    """

    def __init__(self, model: Any) -> None:
        torch = import_module("torch")
        dispatch = import_module("torch.utils._python_dispatch")
        self._tensor_class = torch.Tensor
        self._unwatched = dispatch._disable_current_modes
        named = [*model.named_parameters(), *model.named_buffers()]
        self._tensors: dict[int, tuple[str, Any, Any]] = {}
        for name, tensor in named:
            data = tensor.data
            if data.numel() and data.device.type == "cpu":
                pointer = data.untyped_storage().data_ptr()
                size = data.untyped_storage().nbytes() // data.element_size()
                mask = torch.zeros(size, dtype=torch.bool)
                self._tensors.setdefault(pointer, (name, tensor, mask))
        self._owned = {name for name, _ in model.named_parameters()}
        self.parameters = len(self._owned)
        self.bytes = sum(p.numel() * p.element_size() for _, p in model.named_parameters())
        self.read = 0
        self._seen: dict[str, str] = {}
        self._used: dict[str, set[str]] = {}
        self._casts: dict[tuple[str, str, str], str] = {}
        self._busy = False
        recorder = self

        class Mode(dispatch.TorchDispatchMode):  # type: ignore[misc,name-defined]
            def __torch_dispatch__(
                self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None
            ) -> Any:
                return recorder._dispatch(func, args, kwargs or {})

        self._mode: Any = Mode()

    def __enter__(self) -> None:
        self._mode.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._mode.__exit__(*error)

    def watched(self, weights: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
        """Yield the checkpoint's tensors, each marked with its name."""
        for name, tensor in weights:
            self.read += 1
            self._seen[name] = f"{_dtype(tensor.dtype)} {list(tensor.shape)}"
            tensor._ckptgate = frozenset([name])
            yield name, tensor

    def _dispatch(self, func: Any, args: Any, kwargs: Any) -> Any:
        out = func(*args, **kwargs)
        names = self._names_of((args, kwargs))
        schema = func._schema
        written = [
            value
            for argument, value in zip(schema.arguments, args, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        for target in written:
            if isinstance(target, self._tensor_class):
                self._note_write(target, names, args)
        if names:
            for tensor in self._tensors_in(out):
                if not any(tensor is target for target in written):
                    tensor._ckptgate = names
        return out

    def _note_write(self, target: Any, names: frozenset[str], args: Any) -> None:
        owner = self._tensors.get(target.untyped_storage().data_ptr())
        if owner is None:
            if names:
                target._ckptgate = names | getattr(target, "_ckptgate", frozenset())
            return
        name, parameter, mask = owner
        scale = target.element_size() / parameter.element_size()
        with self._unwatched():
            if scale == 1:
                mask.as_strided(target.size(), target.stride(), target.storage_offset()).fill_(True)
            else:
                start = int(target.storage_offset() * scale)
                mask[start : start + math.ceil(target.numel() * scale)] = True
        for source in names:
            self._used.setdefault(source, set()).add(name)
        if len(args) > 1 and names and isinstance(args[1], self._tensor_class):
            self._note_cast(name, target, args[1], sorted(names)[0])

    def _note_cast(self, name: str, target: Any, source: Any, tensor: str) -> None:
        have, want = source.dtype, target.dtype
        lossy = have.is_floating_point != want.is_floating_point or (
            have.itemsize != want.itemsize and want.itemsize == 1
        )
        exponents = "e8m0" in str(have) and have != want
        if lossy or exponents:
            self._casts.setdefault((name, _dtype(have), _dtype(want)), tensor)

    def _names_of(self, value: Any) -> frozenset[str]:
        names: frozenset[str] = frozenset()
        for tensor in self._tensors_in(value):
            names |= getattr(tensor, "_ckptgate", frozenset())
        return names

    def _tensors_in(self, value: Any) -> Iterator[Any]:
        if isinstance(value, self._tensor_class):
            yield value
        elif isinstance(value, (list, tuple)):
            for item in value:
                yield from self._tensors_in(item)
        elif isinstance(value, dict):
            yield from self._tensors_in(list(value.values()))

    def unwritten(self, optional: set[str]) -> list[dict[str, Any]]:
        """Return the parameters of which elements were never written."""
        found = []
        for pointer, (name, parameter, mask) in self._tensors.items():
            if name not in self._owned or name in optional:
                continue
            if parameter.data.untyped_storage().data_ptr() != pointer:
                continue  # replaced as a whole
            missing = int((~mask).sum())
            if missing:
                found.append(
                    {
                        "name": name,
                        "share": missing / mask.numel(),
                        "bytes": missing * parameter.element_size(),
                        "tensors": sorted(t for t, names in self._used.items() if name in names)[
                            :2
                        ],
                    }
                )
        return found[:MAX_NAMES]

    def unused(self) -> list[str]:
        """Return the tensors that were read and wrote into no parameter or buffer."""
        return sorted(name for name in self._seen if name not in self._used)[:MAX_NAMES]

    def casts(self) -> list[dict[str, str]]:
        """Return the writes in which values change their kind of number."""
        return [
            {"name": name, "tensor": tensor, "have": have, "want": want}
            for (name, have, want), tensor in self._casts.items()
        ][:MAX_NAMES]

    def sources(self) -> dict[str, str]:
        """Return one tensor of each parameter, by the parameter's name."""
        first: dict[str, str] = {}
        for tensor, names in self._used.items():
            for name in names:
                first.setdefault(name, tensor)
        return first


def _dtype(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def bad_scales(model: Any, sources: dict[str, str], optional: set[str]) -> list[dict[str, Any]]:
    """Return the scales that are zero or not finite after loading, with a tensor of each."""
    torch = import_module("torch")
    found = []
    for name, parameter in model.named_parameters():
        leaf = name.rpartition(".")[2]
        data = parameter.data
        if "scale" not in leaf or not data.numel() or name in optional or leaf in OPTIONAL:
            continue
        if data.dtype == torch.uint8 or "e8m0" in str(data.dtype):  # exponents: 0 is 2^-127
            zeros, broken = 0, int((data.view(torch.uint8) == E8M0_NAN).sum())
        else:
            values = data.float()
            zeros, broken = int((values == 0).sum()), int((~torch.isfinite(values)).sum())
        if zeros or broken:
            found.append(
                {
                    "name": name,
                    "tensor": sources.get(name, ""),
                    "zeros": zeros,
                    "nonfinite": broken,
                    "of": data.numel(),
                }
            )
    return found[:MAX_NAMES]


def in_fork(function: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what a function returns in a fork of this process."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        code = 1
        try:
            result = function()
            with os.fdopen(writing, "wb") as pipe:
                pipe.write(json.dumps(result).encode())
            code = 0
        except BaseException:  # noqa: BLE001  (the fork must not go on as the worker)
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        data = pipe.read()
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code != 0:
        reason = f"signal {-code}" if code < 0 else f"exit code {code}"
        return {
            "stage": "process",
            "error": f"the loading process ended with {reason}",
            "place": "",
        }
    loaded: dict[str, Any] = json.loads(data)
    return loaded


def main() -> int:
    """Serve until stdin ends."""
    # What vLLM prints goes to stderr: stdout is for the lines.
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(value: dict[str, Any]) -> None:
        out.write(json.dumps(value, separators=(",", ":")) + "\n")
        out.flush()

    try:
        hello = json.loads(sys.stdin.readline())
        if hello.get("ckptgate") != 1:
            raise ValueError(f"expected protocol version 1, got {hello.get('ckptgate')!r}")
        version = prepare()
        answer({"ready": {"engine": f"vllm {version}"}})
        for line in sys.stdin:
            question = json.loads(line)
            loaded = in_fork(lambda q=question: load(q["model"], q.get("layers")))  # type: ignore[misc]
            answer({"id": question["id"], "loaded": loaded})
    except Exception as error:  # noqa: BLE001  (whatever it was must reach the other process)
        traceback.print_exc()
        answer({"error": _message(error)})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
