# SPDX-License-Identifier: Apache-2.0
"""One family: detect, export from memory and from disk, check, there and back, reload; each step
says ok or why not.

What is held against what: names, shapes and bytes of the hub layout against transformers' own
`save_pretrained`; the number of quantized experts against the module tree; what came back from the
export, decoded by the verifier and put together by transformers' loader, against the values that
the model had. A refusal is an error of ours that names the reason; anything else that is not ok is
a defect.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import re
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from exporter import export, export_model
from exporter.detect import Detection, detect, detect_config
from exporter.layout import Layout
from exporter.layout.hf_mapping import of_model
from tests.layouts import to_hub, to_memory
from tests.zoo.families import Family, model
from verifier import check, open_checkpoint
from verifier.errors import CkptgateError
from verifier.layouts.expert_stacks import find_stacks, unstacked
from verifier.load.model import load_model
from verifier.schemes import gather, role, split

RECIPES = ("nvfp4_experts_only", "mxfp8_default", "mxfp8_nvfp4_experts")
STEPS = ("disk", "memory", "check", "check with base", "quantized", "round trip", "reload")
"""Of each recipe; ``detected`` and ``layout`` are the family's."""
OK = "ok"
REFUSED = "refused: "
INCONCLUSIVE = "inconclusive: "
"""A check that could not judge, for want of the family's layout and of a base: neither right nor
wrong."""
NOISE = 0.2
"""Relative error that a quantized weight may have: NVFP4 is near 0.1 on normal values, what is
swapped above 1."""

TOWER = re.compile(
    r"(^|\.)(vision(?!_moe)|visual|audio|code2wav|embed_audio|embed_vision|patch_embed)"
)
"""What is not the text model, by its name in memory; every recipe leaves it."""

Outcome = dict[str, Any]


def judge(family: Family) -> Outcome:
    """Return what became of a family; only JSON values."""
    started = time.monotonic()
    found: Outcome = {
        "family": family.name,
        "architecture": family.architecture,
        "model_type": family.config_type,
    }
    with quiet(), tempfile.TemporaryDirectory(prefix="zoo-") as folder:
        try:
            built = filled(model(family))
        except Exception as error:  # noqa: BLE001  (transformers may fail in any way; the error is recorded)
            found["built"] = said(error)
        else:
            found["built"] = OK
            found |= _steps(built, Path(folder))
    found["seconds"] = round(time.monotonic() - started, 1)
    return found


def standing(found: Outcome) -> str:
    """Return ``works``, ``refused``, ``defect`` or ``not built`` for an outcome."""
    if found["built"] != OK:
        return "not built"
    if defects(found):
        return "defect"
    return "works" if working(found) else "refused"


def working(found: Outcome) -> list[str]:
    """Return the recipes of which every step is ok; a check without a base may be inconclusive."""
    if found["built"] != OK or (found["detected"], found["layout"]) != (OK, OK):
        return []

    def fine(step: str) -> bool:
        return step == OK or step.startswith(INCONCLUSIVE)

    return [r for r, s in found["recipes"].items() if all(fine(s.get(k, "")) for k in STEPS)]


def refusals(found: Outcome) -> list[str]:
    """Return the reasons for which steps of a family were refused, each once."""
    steps = [found.get("detected", OK), found.get("layout", OK)]
    steps += [v for s in found.get("recipes", {}).values() for v in s.values()]
    return list(dict.fromkeys(s.removeprefix(REFUSED) for s in steps if s.startswith(REFUSED)))


def defects(found: Outcome) -> list[str]:
    """Return what went wrong and was not refused, a line each."""
    if found["built"] != OK:
        return []
    steps = {"detected": found["detected"], "layout": found["layout"]}
    steps |= {f"{r}, {k}": v for r, s in found["recipes"].items() for k, v in s.items()}
    return [
        f"{found['family']}, {k}: {v}"
        for k, v in steps.items()
        if v != OK and not v.startswith((REFUSED, INCONCLUSIVE))
    ]


def filled(built: Any) -> Any:
    """Return a model whose every parameter has values of its own: two zeros or two ones could be
    swapped unseen.
    """
    for parameter in built.parameters():
        with torch.no_grad():
            values = torch.randn(parameter.shape) * 0.05
            parameter.copy_(
                values + 1 if parameter.ndim == 1 and bool((parameter == 1).all()) else values
            )
    for (
        buffer
    ) in built.buffers():  # Gemma-4's clipping bounds are infinite until they are calibrated
        if buffer.is_floating_point():
            buffer.copy_(buffer.clamp(-99, 99))
    return built


def _steps(built: Any, folder: Path) -> Outcome:
    saved = folder / "saved"
    built.save_pretrained(saved)
    found: Outcome = {"tensors": len(_files(saved))}
    detection = detect(built)
    found["classes"] = sorted(
        {s.cls for s in detection.stacks} | {r.cls for r in detection.refused}
    )
    found["experts"] = dict(detection.layouts())
    found["linears"] = detection.linears
    found["stored"] = _stored(built, saved, detection)
    found["detected"] = _attempt(lambda: _detected(detection, saved))
    found["layout"] = _attempt(lambda: _layout(built, saved))
    found["recipes"] = {r: _recipe(r, built, saved, folder, detection) for r in RECIPES}
    return found


def _recipe(
    recipe: str, built: Any, saved: Path, folder: Path, detection: Detection
) -> dict[str, str]:
    disk, memory = folder / f"{recipe}-disk", folder / f"{recipe}-memory"
    given: dict[str, Any] = {"recipe": recipe, "input_scale": "one", "workers": 1, "engine": "none"}
    steps = {"disk": _attempt(lambda: export(saved, disk, **given))}
    steps["memory"] = _attempt(
        lambda: _same_as(disk, lambda: export_model(built, memory, **given), memory)
    )
    if steps["disk"] != OK:
        return steps
    steps["check"] = _attempt(lambda: _checked(disk, None))
    steps["check with base"] = _attempt(lambda: _checked(disk, saved))
    steps["quantized"] = _attempt(lambda: _quantized(disk, recipe, built, detection))
    steps["round trip"] = _attempt(lambda: _round_trip(built, disk, saved))
    steps["reload"] = _attempt(lambda: reload(built, disk))
    return steps


def _attempt(step: Any) -> str:
    """Run a step: ok, a refusal by name, or what was wrong."""
    try:
        step()
    except Wrong as error:
        return str(error)
    except CkptgateError as error:
        return REFUSED + said(error)
    except Exception as error:  # noqa: BLE001  (a traceback is recorded as a defect)
        return f"{type(error).__name__}: {said(error)}"
    return OK


class Wrong(Exception):
    """A step was carried out, and its result is wrong."""


def said(error: Exception) -> str:
    """Return an error's message in one line, without the temporary folder."""
    return (
        re.sub(r"/\S*/zoo-[^/]+/", "", " ".join(str(error).split()))[:300] or type(error).__name__
    )


def _files(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as handle:
            found |= {k: handle.get_tensor(k) for k in handle.keys()}
    return found


def _raw(value: torch.Tensor) -> tuple[Any, ...]:
    return (
        value.dtype,
        tuple(value.shape),
        value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(),
    )


def _differences(
    made: Mapping[str, torch.Tensor], saved: Mapping[str, torch.Tensor], whose: str
) -> None:
    names = sorted(made.keys() ^ saved.keys())
    if names:
        raise Wrong(f"{len(names)} names are not {whose}'s, {names[0]} first")
    odd = [n for n in sorted(made) if _raw(made[n]) != _raw(saved[n])]
    if odd:
        raise Wrong(f"{len(odd)} tensors are not {whose}'s, {odd[0]} first")


def _stored(built: Any, saved: Path, detection: Detection) -> str:
    """Return how the hub keeps the routed experts: one by one, or stacked; by what transformers'
    own mapping says.
    """
    if not detection.stacks:
        return "stacked" if 3 in {t.ndim for t in _files(saved).values()} else "in two dimensions"
    try:
        memory = of_model(built).memory
    except CkptgateError:
        return "not known"
    stack, grid = next(
        (s, g) for s in detection.stacks if (g := memory.get(f"{s.path}.{s.first}")) is not None
    )
    return "one by one" if len({p.hub for p in grid.regions}) >= stack.experts else "stacked"


def _detected(detection: Detection, saved: Path) -> None:
    if not detection.stacks:
        reason = (
            "; ".join(sorted({f"{r.cls}: {r.reason}" for r in detection.refused}))
            or "no experts were found"
        )
        raise CkptgateError(reason) if detection.refused else Wrong(reason)
    from_config = detect_config(saved)
    if (from_config.stacks, from_config.refused) != (detection.stacks, detection.refused):
        raise Wrong("the model of the saved config has other experts")


def _layout(built: Any, saved: Path) -> None:
    """Hold names, shapes and bytes to what `save_pretrained` wrote, and back."""
    on_disk = _files(saved)
    layout = of_model(built)
    state = {k: v for k, v in built.state_dict().items() if k in layout.memory}
    _differences(to_hub(layout, state), on_disk, "save_pretrained")
    _differences(to_memory(layout, on_disk), state, "the model")


def _same_as(disk: Path, write: Any, memory: Path) -> None:
    write()
    if disk.is_dir():
        _differences(_files(memory), _files(disk), "the export from disk")
        for name in ("config.json", "hf_quant_config.json"):
            here, there = (json.loads((f / name).read_text()) for f in (memory, disk))
            odd = sorted(k for k in here.keys() | there.keys() if here.get(k) != there.get(k))
            if odd:
                raise Wrong(
                    f"{name} has other values than the export from disk for {', '.join(odd)}"
                )


def _checked(path: Path, base: Path | None) -> None:
    report = check(path, base=base, depth="payload", workers=1)
    lines = [
        f"{f.rule} {f.severity}: {f.message} {f.observed}"
        for f in report.findings
        if f.severity != "info" and not f.effects  # effects on one engine: exports are for none
    ]
    if report.verdict == "inconclusive" and not lines:
        raise Wrong(INCONCLUSIVE + report.summary.inconclusive)
    if lines or report.verdict != "passed":
        raise Wrong(
            f"{report.verdict}; " + " | ".join(" ".join(line.split())[:160] for line in lines[:4])
        )


def _quantized(path: Path, recipe: str, built: Any, detection: Detection) -> None:
    """Hold what was quantized to the module tree: every expert, and nothing that is no linear layer
    there.
    """
    modules = [
        n
        for n, m in gather(unstacked(open_checkpoint(path)).tensors.values()).items()
        if m.quantized
    ]
    experts = sum(role(n) == "routed_expert" for n in modules)
    layout = of_model(built)
    stacks, there = set(), 0
    for s in detection.stacks:
        keys = [f"{s.path}.{p}" for p in (s.first, s.down)]
        if not TOWER.search(s.path) and keys[0] in layout.memory:  # a tied stack is saved once
            stacks |= set(keys)
            there += max(s.linears, len({p.hub for k in keys for p in layout.memory[k].regions}))
    if experts != there:
        raise Wrong(f"{experts} experts' linears are quantized, and the model has {there}")
    for name in modules:
        if role(name) == "routed_expert" and f"{name}.weight" not in layout.hub:
            continue  # of a stack on the hub, which the counts above hold
        for key in layout.keys(f"{name}.weight"):
            if TOWER.search(key):
                raise Wrong(f"{name} is quantized, and is no part of the text model")
            owner = built.get_submodule(key.rpartition(".")[0])
            router = any(w in type(owner).__name__.lower() for w in ("router", "gate", "topk"))
            if key not in stacks and (not isinstance(owner, torch.nn.Linear) or router):
                raise Wrong(f"{name} is quantized, and {key} is of a {type(owner).__name__}")
    if recipe == "nvfp4_experts_only" and len(modules) != experts:
        raise Wrong(f"{len(modules) - experts} linears that are no routed experts are quantized")


def _round_trip(built: Any, path: Path, saved: Path) -> None:
    """Bring the quantized tensors to the shapes that they would have in memory, scales included,
    and back.

    Experts of families whose hub layout has stacks are left out: `reload` compares their values.
    """
    written = open_checkpoint(path)
    in_stacks = {t.name for s in find_stacks(written).stacks for t in s.tensors.values()}
    experts = {n for s in find_stacks(open_checkpoint(saved)).stacks for n in s.linears}
    tensors = {
        name: tensor
        for name, tensor in _files(path).items()
        if name not in in_stacks and split(name)[0] not in experts
    }
    layout = of_model(built)
    _differences(to_hub(layout, to_memory(layout, tensors)), tensors, "the export")


def reload(built: Any, path: Path) -> None:
    """Let transformers load what the verifier decodes, and hold every value to the model's.

    Raises:
        Wrong: an unexpected key, a value that came back as another, logits that are not finite.
    """
    loaded = load_model(str(path))
    if loaded.unexpected:
        raise Wrong(f"{len(loaded.unexpected)} unexpected keys, {loaded.unexpected[0]} first")
    layout = of_model(built)
    modules = gather(unstacked(open_checkpoint(path)).tensors.values())
    quantized = {f"{n}.weight" for n, m in modules.items() if m.quantized}
    if any(role(n.removesuffix(".weight")) == "routed_expert" for n in quantized):
        keys = [f"{s.path}.{k}" for s in detect(built).stacks for k in (s.first, s.down)]
        quantized |= {p.hub for k in keys for p in _regions(layout, k)}
    state = loaded.model.state_dict()
    for key, before in built.state_dict().items():
        after = state[key]
        parts = {p.hub for p in layout.memory[key].regions} if key in layout.memory else set()
        error = _distance(after, before)
        limit = NOISE if parts & quantized else 0.0
        if not error <= limit:
            raise Wrong(f"{key} came back with a relative error of {error:.3g}")
    with torch.inference_mode():
        logits = _logits(loaded.model)
        reference = _logits(built)
    if not bool(torch.isfinite(logits).all()):
        raise (
            Wrong("logits are not finite")
            if bool(torch.isfinite(reference).all())
            else CkptgateError("the model's own logits are not finite")
        )


def _regions(layout: Layout, key: str) -> tuple[Any, ...]:
    return layout.memory[key].regions if key in layout.memory else ()


def _distance(after: torch.Tensor, before: torch.Tensor) -> float:
    a, b = after.double(), before.double()
    return float((a - b).norm() / b.norm()) if bool(b.any()) else float(a.norm())


def _logits(built: Any) -> torch.Tensor:
    ids = torch.arange(100, 124)[None]
    speaker = getattr(built, "thinker", built)  # Qwen3-Omni's own forward is its generation loop
    out = speaker(input_ids=ids, use_cache=False)
    logits: torch.Tensor = out.logits
    return logits.float()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence what libraries say while a family is run, on one thread."""
    logger = logging.getLogger("transformers")
    level, threads = logger.level, torch.get_num_threads()
    logger.setLevel(logging.CRITICAL)
    torch.set_num_threads(1)  # tensors are small: threads would wait for one another
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stderr(io.StringIO()),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.setLevel(level)
            torch.set_num_threads(threads)
