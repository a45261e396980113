# SPDX-License-Identifier: Apache-2.0
"""The kinds of mutation: what is edited, how many of each there are, and what a check needs to
catch them.

KINDS.md is the list in words; both were written before the first score was computed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np

from tests.mutation.image import CONFIG, EXPERT, INDEX, NESTED, Array, Image, Unfit, split

Knows = Literal["nothing", "base", "stats", "nobody"]
Rng = np.random.Generator
Edit = Callable[[Image, Rng], str]
GATE, UP, DOWN = ("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")
OTHER_LEAF = {
    "gate_proj": "w1",
    "up_proj": "w3",
    "down_proj": "w2",
    "w1": "gate_proj",
    "w3": "up_proj",
    "w2": "down_proj",
}
FUSED = ("q_proj", "k_proj", "v_proj", *GATE, *UP)
NUMBERS = ("weight_scale", "weight_scale_2", "weight_scale_inv")


@dataclass(frozen=True)
class Kind:
    """One kind: its edit, its number of mutations, and what a check needs to catch it."""

    name: str
    count: int
    knows: Knows
    edit: Edit


KINDS: list[Kind] = []


def kind(name: str, count: int, knows: Knows) -> Callable[[Edit], Edit]:
    """Register an edit."""

    def register(edit: Edit) -> Edit:
        KINDS.append(Kind(name, count, knows, edit))
        return edit

    return register


# choosing


def one(rng: Rng, found: list[Any]) -> Any:
    """Return one of a list, or raise `Unfit` if it is empty."""
    if not found:
        raise Unfit("nothing to choose from")
    return found[int(rng.integers(len(found)))]


def linear(image: Image, rng: Rng) -> str:
    """Return a quantized module."""
    return str(one(rng, image.quantized()))


def of_leaf(image: Image, rng: Rng, leaves: tuple[str, ...]) -> str:
    return str(one(rng, [m for m in image.quantized() if m.rpartition(".")[2] in leaves]))


def experts(image: Image) -> dict[tuple[str, str], list[int]]:
    """Return the numbers of the experts by container and leaf."""
    found: dict[tuple[str, str], list[int]] = {}
    for module in image.quantized():
        match = EXPERT.match(module)
        if match:
            found.setdefault((match[1], match[3]), []).append(int(match[2]))
    return found


def pair(image: Image, rng: Rng, same: Callable[[str], Any]) -> tuple[str, str]:
    """Return two quantized modules alike in ``same``, leaves and shapes."""
    groups: dict[Any, list[str]] = {}
    for module in image.quantized():
        shapes = tuple(
            (split(n)[1], image.tensors[n].dtype, image.tensors[n].shape)
            for n in image.of_module(module)
        )
        groups.setdefault((shapes, same(module)), []).append(module)
    found = one(rng, [g for g in groups.values() if len(g) > 1])
    a, b = rng.choice(len(found), 2, replace=False)
    return found[a], found[b]


def scale_name(
    image: Image, rng: Rng, dtypes: tuple[str, ...] = ("F8_E4M3", "U8", "F8_E8M0", "F32")
) -> str:
    """Return a weight scale of one of some dtypes."""
    names = [f"{m}.{image.scale_leaf(m)}" for m in image.quantized()]
    return str(one(rng, [n for n in names if image.tensors[n].dtype in dtypes]))


def set_raw(image: Image, name: str, raw: Array) -> None:
    image.tensors[name].data = np.ascontiguousarray(raw).view(np.uint8).tobytes()


def rows(image: Image, name: str) -> Array:
    """Return a tensor's bytes as [rows, bytes of a row]."""
    tensor = image.tensors[name]
    if not tensor.shape or tensor.shape[0] < 2:
        raise Unfit("one row")
    return tensor.raw().reshape(tensor.shape[0], -1)


def spoil(file: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def act(path: Path) -> None:
        target = path / file
        target.write_bytes(change(target.read_bytes()))

    return act


# container


@kind("shard-cut", 20, "nothing")
def shard_cut(image: Image, rng: Rng) -> str:
    """A shard ends early, by one byte up to nearly all."""
    file, share = one(rng, image.files), float(rng.uniform()) ** 3
    image.post.append(spoil(file, lambda raw: raw[: len(raw) - 1 - int(share * (len(raw) - 2))]))
    return f"{file} loses {share:.3f} of its end"


@kind("bytes-after", 10, "nothing")
def bytes_after(image: Image, rng: Rng) -> str:
    """A shard has trailing bytes after its last tensor."""
    file, more = one(rng, image.files), int(rng.integers(1, 4096))
    image.post.append(spoil(file, lambda raw: raw + bytes(more)))
    return f"{more} bytes after {file}"


@kind("header-length", 10, "nothing")
def header_length(image: Image, rng: Rng) -> str:
    """The length of the header is wrong."""
    file = one(rng, image.files)
    by = int(one(rng, [-8, -1, 1, 7, 8, 64, 1 << 20, 1 << 40, 1 << 62]))
    image.post.append(
        spoil(
            file,
            lambda raw: (
                ((int.from_bytes(raw[:8], "little") + by) % (1 << 64)).to_bytes(8, "little")
                + raw[8:]
            ),
        )
    )
    return f"header of {file} {by:+d}"


@kind("header-bit", 50, "nothing")
def header_bit(image: Image, rng: Rng) -> str:
    """One bit of the header's JSON is flipped."""
    file, at, bit = one(rng, image.files), float(rng.uniform()), int(rng.integers(8))

    def change(raw: bytes) -> bytes:
        length = int.from_bytes(raw[:8], "little")
        place = 8 + int(at * length)
        return raw[:place] + bytes([raw[place] ^ (1 << bit)]) + raw[place + 1 :]

    image.post.append(spoil(file, change))
    return f"bit {bit} at {at:.4f} of the header of {file}"


def _edit_header(change: Callable[[dict[str, Any]], None]) -> Callable[[bytes], bytes]:
    def act(raw: bytes) -> bytes:
        length = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + length])
        change(header)
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text + raw[8 + length :]

    return act


@kind("offsets-overlap", 10, "nothing")
def offsets_overlap(image: Image, rng: Rng) -> str:
    """Two tensors of a shard share the same bytes."""
    by_size: dict[Any, list[str]] = {}
    for name, tensor in image.tensors.items():
        by_size.setdefault((tensor.file, len(tensor.data)), []).append(name)
    found = one(rng, [g for g in by_size.values() if len(g) > 1])
    a, b = (found[i] for i in rng.choice(len(found), 2, replace=False))

    def change(header: dict[str, Any]) -> None:
        header[a]["data_offsets"] = header[b]["data_offsets"]

    image.post.append(spoil(image.tensors[a].file, _edit_header(change)))
    return f"{a} at the bytes of {b}"


@kind("key-twice", 10, "nothing")
def key_twice(image: Image, rng: Rng) -> str:
    """A header names a tensor twice, with different bytes."""
    by_size: dict[Any, list[str]] = {}
    for name, tensor in image.tensors.items():
        by_size.setdefault((tensor.file, tensor.dtype, tensor.shape), []).append(name)
    found = one(rng, [g for g in by_size.values() if len(g) > 1])
    a, b = (found[i] for i in rng.choice(len(found), 2, replace=False))

    def change(raw: bytes) -> bytes:
        length = int.from_bytes(raw[:8], "little")
        text = (
            raw[8 : 8 + length].rstrip().replace(json.dumps(a).encode(), json.dumps(b).encode(), 1)
        )
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text + raw[8 + length :]

    image.post.append(spoil(image.tensors[a].file, change))
    return f"{b} twice, once for {a}"


@kind("shard-lost", 10, "nothing")
def shard_lost(image: Image, rng: Rng) -> str:
    """A shard is missing."""
    if len(image.files) < 2:
        raise Unfit("one shard")
    file = one(rng, image.files)
    image.post.append(lambda path: (path / file).unlink())
    return f"{file} is gone"


@kind("shard-of-zeros", 10, "nothing")
def shard_of_zeros(image: Image, rng: Rng) -> str:
    """A shard was allocated, but not written: as a whole, or from some byte of its header on."""
    file = one(rng, image.files)
    keep = int(one(rng, [0, 8, 64]))
    image.post.append(spoil(file, lambda raw: raw[:keep] + bytes(len(raw) - keep)))
    return f"{file} zero from byte {keep}"


@kind("tensor-twice", 15, "nothing")
def tensor_twice(image: Image, rng: Rng) -> str:
    """A second file contains a tensor again, with different values."""
    name = one(rng, list(image.tensors))
    tensor = image.tensors[name]
    raw = np.roll(tensor.raw(), 1)
    header = {
        name: {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [0, len(raw)]}
    }
    text = json.dumps(header).encode()
    file = str(one(rng, ["old.safetensors", "model-00000-of-00001.safetensors", "z.safetensors"]))
    whole = len(text).to_bytes(8, "little") + text + raw.tobytes()
    image.post.append(lambda path: path.joinpath(file).write_bytes(whole) and None)
    return f"{name} again in {file}"


@kind("index-entry-lost", 15, "nothing")
def index_entry_lost(image: Image, rng: Rng) -> str:
    """A tensor is missing from the index."""
    name = _indexed(image, rng)
    image.on_index.append(lambda value: value["weight_map"].pop(name))
    return f"index without {name}"


@kind("index-entry-elsewhere", 15, "nothing")
def index_entry_elsewhere(image: Image, rng: Rng) -> str:
    """The index maps a tensor to the wrong shard, or to a missing one."""
    name = _indexed(image, rng)
    others = [f for f in image.files if f != image.tensors[name].file]
    file = one(
        rng,
        [*others, "model-00009-of-00009.safetensors", "../x.safetensors", "/x.safetensors", "", 7],
    )
    image.on_index.append(lambda value: value["weight_map"].update({name: file}))
    return f"index sends {name} to {file!r}"


@kind("index-entry-renamed", 10, "nothing")
def index_entry_renamed(image: Image, rng: Rng) -> str:
    """The index has the wrong name for a tensor."""
    name = _indexed(image, rng)
    new = f"model.{name}" if rng.integers(2) else name.replace("model.", "", 1)

    def change(value: dict[str, Any]) -> None:
        value["weight_map"][new] = value["weight_map"].pop(name)

    image.on_index.append(change)
    return f"index calls {name} {new}"


@kind("index-spoilt", 10, "nothing")
def index_spoilt(image: Image, rng: Rng) -> str:
    """The index is truncated, or one bit of it is flipped."""
    if not image.indexed:
        raise Unfit("no index")
    at, bit, cut = float(rng.uniform()), int(rng.integers(8)), bool(rng.integers(3) == 0)

    def change(raw: bytes) -> bytes:
        place = int(at * len(raw))
        return (
            raw[:place]
            if cut
            else raw[:place] + bytes([raw[place] ^ (1 << bit)]) + raw[place + 1 :]
        )

    image.post.append(spoil(INDEX, change))
    return f"index {'cut' if cut else f'bit {bit}'} at {at:.4f}"


def _indexed(image: Image, rng: Rng) -> str:
    if not image.indexed:
        raise Unfit("no index")
    return str(one(rng, list(image.tensors)))


# names, dtypes, shapes


@kind("tensor-lost", 35, "nothing")
def tensor_lost(image: Image, rng: Rng) -> str:
    """An unquantized tensor is missing."""
    name = one(rng, image.plain())
    image.drop([name])
    return f"{name} is gone"


@kind("weight-lost", 20, "nothing")
def weight_lost(image: Image, rng: Rng) -> str:
    """A quantized weight is missing, with or without its scales."""
    module = linear(image, rng)
    names = image.of_module(module) if rng.integers(2) else [f"{module}.weight"]
    image.drop(names)
    return f"{names[0]} and {len(names) - 1} more are gone"


@kind("scale-lost", 45, "nothing")
def scale_lost(image: Image, rng: Rng) -> str:
    """A scale is missing: of blocks, of the tensor or of the input."""
    module = linear(image, rng)
    name = one(rng, [n for n in image.of_module(module) if not n.endswith((".weight", ".bias"))])
    if name.endswith(".input_scale") and f"{split(name)[0]}.weight_scale_2" not in image.tensors:
        raise Unfit("static FP8 may leave it out")
    image.drop([name])
    return f"{name} is gone"


@kind("expert-lost", 20, "nothing")
def expert_lost(image: Image, rng: Rng) -> str:
    """An expert, or one projection of it, is missing."""
    container, leaf = one(rng, list(experts(image)))
    number = one(rng, experts(image)[container, leaf])
    head = f"{container}.{number}." + (leaf if rng.integers(2) else "")
    image.drop([n for n in image.tensors if n.startswith(head)])
    return f"{head} is gone"


@kind("layer-lost", 10, "nothing")
def layer_lost(image: Image, rng: Rng) -> str:
    """A layer is missing, or its experts are."""
    name = one(rng, [n for n in image.tensors if ".layers." in n])
    head = str(re.match(r".*?layers\.\d+\.", name)[0])  # type: ignore[index]
    if ".experts." in name and rng.integers(2):
        head = name[: name.index(".experts.") + len(".experts.")]
    image.drop([n for n in image.tensors if n.startswith(head)])
    return f"{head} is gone"


@kind("prefix-changed", 35, "nothing")
def prefix_changed(image: Image, rng: Rng) -> str:
    """One tensor, one module or all have the wrong prefix."""
    name = one(rng, list(image.tensors))
    new = one(rng, ["model.language_model.", "module.", "base_model.model.", ""])
    old = next(
        (p for p in ("language_model.model.", "model.", "vision_tower.") if name.startswith(p)), ""
    )
    which = int(rng.integers(3))
    chosen = [name] if which == 0 else image.of_module(split(name)[0])
    if which == 2:
        chosen = [n for n in image.tensors if n.startswith(old)]
    names = {n: new + n[len(old) :] for n in chosen}
    if any(n == m for n, m in names.items()):
        raise Unfit("the same name")
    image.rename(names)
    return f"{len(names)} names: {name} became {names[name]}"


@kind("leaf-renamed", 20, "nothing")
def leaf_renamed(image: Image, rng: Rng) -> str:
    """A projection has the name of a different family."""
    module = of_leaf(image, rng, tuple(OTHER_LEAF))
    head, _, leaf = module.rpartition(".")
    image.rename(
        {n: f"{head}.{OTHER_LEAF[leaf]}{n[len(module) :]}" for n in image.of_module(module)}
    )
    return f"{module} became {OTHER_LEAF[leaf]}"


@kind("scale-renamed", 20, "nothing")
def scale_renamed(image: Image, rng: Rng) -> str:
    """A scale has a name that no loader of its format reads."""
    name = scale_name(image, rng)
    new = (
        name.rpartition(".")[0]
        + "."
        + one(rng, ["scale", "weight_scales", "scales", "weight.scale", "weight_scale_0"])
    )
    image.rename({name: new})
    return f"{name} became {new}"


@kind("codes-relabelled", 25, "nothing")
def codes_relabelled(image: Image, rng: Rng) -> str:
    """Quantized values or block scales are labeled with a different dtype of the same width."""
    module = linear(image, rng)
    name = one(rng, [f"{module}.weight", f"{module}.{image.scale_leaf(module)}"])
    old = image.tensors[name].dtype
    if old == "F32":
        raise Unfit("a scalar")
    others = {"U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"} - {old}
    if name.endswith(("_scale", "_inv")) and old in ("U8", "F8_E8M0"):
        others -= {"U8", "F8_E8M0"}  # both are the format's
    image.tensors[name].dtype = str(one(rng, sorted(others)))
    return f"{name}: {old} became {image.tensors[name].dtype}"


@kind("scale-cast", 35, "nothing")
def scale_cast(image: Image, rng: Rng) -> str:
    """A scale is cast to a different dtype; its values stay."""
    module = linear(image, rng)
    name = one(rng, [n for n in image.of_module(module) if not n.endswith((".weight", ".bias"))])
    values = image.tensors[name].array()
    target = one(
        rng,
        [t for t in (np.float32, ml_dtypes.bfloat16, np.float16) if np.dtype(t) != values.dtype],
    )
    with np.errstate(over="ignore"):
        image.put(name, values.astype(target))
    return f"{name} became {image.tensors[name].dtype}"


@kind("plain-recast", 25, "base")
def plain_recast(image: Image, rng: Rng) -> str:
    """An unquantized tensor is cast to a different float dtype."""
    name = one(rng, image.plain())
    values = image.tensors[name].array()
    target = one(
        rng,
        [t for t in (np.float32, ml_dtypes.bfloat16, np.float16) if np.dtype(t) != values.dtype],
    )
    image.put(name, values.astype(target))
    return f"{name} became {image.tensors[name].dtype}"


@kind("shape-turned", 20, "nothing")
def shape_turned(image: Image, rng: Rng) -> str:
    """A tensor is written transposed, or only its shape is transposed."""
    names = [
        n
        for n, t in image.tensors.items()
        if len(t.shape) == 2 and t.shape[0] != t.shape[1] and min(t.shape) > 1
    ]
    name = one(rng, names)
    tensor = image.tensors[name]
    if rng.integers(2):
        image.put(name, np.ascontiguousarray(tensor.array().T))
    else:
        tensor.shape = tensor.shape[::-1]
    return f"{name} is {list(image.tensors[name].shape)}"


@kind("shape-flattened", 10, "nothing")
def shape_flattened(image: Image, rng: Rng) -> str:
    """A weight or block scale is flattened, or has one dimension too many."""
    name = one(rng, [n for n, t in image.tensors.items() if len(t.shape) == 2 and min(t.shape) > 1])
    tensor = image.tensors[name]
    tensor.shape = (int(np.prod(tensor.shape)),) if rng.integers(2) else (1, *tensor.shape)
    return f"{name} is {list(tensor.shape)}"


@kind("scale-misshapen", 35, "nothing")
def scale_misshapen(image: Image, rng: Rng) -> str:
    """Rows or columns of a block scale are missing, or it is padded."""
    names = [f"{m}.{image.scale_leaf(m)}" for m in image.quantized()]
    name = one(rng, [n for n in names if len(image.tensors[n].shape) == 2])
    raw = image.tensors[name].array()
    how = int(rng.integers(4))
    pad = (
        ((0, int(rng.integers(1, 130))), (0, 0))
        if how == 2
        else ((0, 0), (0, int(rng.integers(1, 5))))
    )
    plain = raw.view(np.uint8 if raw.itemsize == 1 else raw.dtype)
    made = plain[:-1] if how == 0 else plain[:, :-1] if how == 1 else np.pad(plain, pad)
    if not made.size:
        raise Unfit("nothing left")
    image.put(name, np.ascontiguousarray(made).view(raw.dtype))
    return f"{name} is {list(made.shape)}"


@kind("weight-misshapen", 20, "nothing")
def weight_misshapen(image: Image, rng: Rng) -> str:
    """Rows or columns of a weight are missing."""
    name = one(
        rng, [n for n, t in image.tensors.items() if n.endswith(".weight") and len(t.shape) == 2]
    )
    raw = image.tensors[name].array()
    cut = int(rng.integers(1, raw.shape[0]))
    made = raw[:cut] if rng.integers(2) else raw[:, : raw.shape[1] // 2]
    image.put(name, np.ascontiguousarray(made))
    return f"{name} is {list(made.shape)}"


@kind("scalar-a-vector", 10, "nothing")
def scalar_a_vector(image: Image, rng: Rng) -> str:
    """A scalar scale is written once per row."""
    name = one(
        rng,
        [
            n
            for n, t in image.tensors.items()
            if t.shape == () and n.endswith(("_scale", "_scale_2"))
        ],
    )
    count = int(one(rng, [2, 3, image.tensors[f"{split(name)[0]}.weight"].shape[0]]))
    image.put(name, np.full(count, image.tensors[name].array()))
    return f"{name} is [{count}]"


@kind("experts-stacked", 10, "nothing")
def experts_stacked(image: Image, rng: Rng) -> str:
    """The experts of a layer are saved as one stack."""
    (container, leaf), numbers = one(rng, list(experts(image).items()))
    parts = [split(n)[1] for n in image.of_module(f"{container}.{numbers[0]}.{leaf}")]
    home = image.tensors[f"{container}.{numbers[0]}.{leaf}.weight"].file
    made = {
        p: np.stack([image.tensors[f"{container}.{i}.{leaf}.{p}"].array() for i in numbers])
        for p in parts
    }
    image.drop([f"{container}.{i}.{leaf}.{p}" for i in numbers for p in parts])
    for part, values in made.items():
        image.put(f"{container}.{leaf}.{part}", values, home)
    return f"{container}.{leaf} stacked"


@kind("qkv-fused", 10, "nothing")
def qkv_fused(image: Image, rng: Rng) -> str:
    """q, k and v are saved as one projection."""
    head = one(
        rng,
        [n.removesuffix("q_proj.weight") for n in image.tensors if n.endswith(".q_proj.weight")],
    )
    members = [f"{head}{p}_proj" for p in "qkv"]
    leaves = [split(n)[1] for n in image.of_module(members[0])]
    home = image.tensors[f"{members[0]}.weight"].file
    made = {}
    for leaf in leaves:
        each = [image.tensors[f"{m}.{leaf}"].array() for m in members]
        made[leaf] = each[0] if not each[0].shape else np.concatenate(each)
    image.drop([n for m in members for n in image.of_module(m)])
    for leaf, values in made.items():
        image.put(f"{head}qkv_proj.{leaf}", values, home)
    return f"{head}qkv_proj"


@kind("tensor-leaked", 15, "nothing")
def tensor_leaked(image: Image, rng: Rng) -> str:
    """A tensor that exists only in the exporter's memory is saved with the weights."""
    module = linear(image, rng)
    leaf = one(
        rng,
        [
            "weight_quantizer._amax",
            "input_quantizer._amax",
            "weight_quantizer._scale",
            "lora_A.weight",
        ],
    )
    image.put(f"{module}.{leaf}", np.ones((2, 2) if "lora" in leaf else (), np.float32))
    return f"{module}.{leaf}"


# configuration


def _edit_all(image: Image, change: Callable[[dict[str, Any]], None]) -> None:
    found = image.declared()
    if not found:
        raise Unfit("not declared")
    for body in found:
        change(body)


def _lists(body: dict[str, Any]) -> list[str]:
    return [
        k
        for k in ("ignore", "exclude_modules", "ignored_layers", "modules_to_not_convert")
        if k in body
    ]


@kind("declaration-lost", 10, "nothing")
def declaration_lost(image: Image, rng: Rng) -> str:
    """Neither file declares the quantization."""
    image.json[CONFIG].pop("quantization_config", None)
    image.json.pop(NESTED, None)
    return "no declaration"


@kind("algo-changed", 25, "nothing")
def algo_changed(image: Image, rng: Rng) -> str:
    """Both files declare the wrong algorithm."""
    algos = [
        "NVFP4",
        "MXFP8",
        "FP8",
        "W4A16_NVFP4",
        "FP8_PER_CHANNEL_PER_TOKEN",
        "FP8_PB_WO",
        "W4A8_AWQ",
        "NVFP5",
        "",
        None,
    ]

    def change(body: dict[str, Any]) -> None:
        body["quant_algo"] = new

    old = image.declared()[0].get("quant_algo") if image.declared() else None
    if old is None:
        raise Unfit("a vendor's dialect")
    new = one(rng, [a for a in algos if a != old])
    _edit_all(image, change)
    return f"{old} became {new!r}"


@kind("algo-of-one-file", 10, "nothing")
def algo_of_one_file(image: Image, rng: Rng) -> str:
    """The two files declare different algorithms."""
    if len(image.declared()) < 2:
        raise Unfit("one declaration")
    body = one(rng, image.declared())
    old = body["quant_algo"]
    body["quant_algo"] = one(
        rng, [a for a in ("NVFP4", "MXFP8", "FP8", "MIXED_PRECISION") if a != old]
    )
    return f"{old} became {body['quant_algo']} in one file"


@kind("vendor-method-changed", 10, "nothing")
def vendor_method_changed(image: Image, rng: Rng) -> str:
    """A vendor's declaration names the wrong method or block size."""
    body = image.declared()[0] if image.declared() else {}
    if "weight_block_size" not in body:
        raise Unfit("no vendor's dialect")
    if rng.integers(2):
        body["quant_method"] = one(
            rng, [m for m in ("fp8", "mxfp8", "modelopt", "awq") if m != body["quant_method"]]
        )
    else:
        sizes = [
            b for b in ([1, 32], [128, 128], [64, 64], [1, 16]) if b != body["weight_block_size"]
        ]
        body["weight_block_size"] = one(rng, sizes)
    if (body["quant_method"], body["weight_block_size"]) == ("fp8", [1, 32]):
        raise Unfit("another spelling of MXFP8")
    return f"{body['quant_method']} {body['weight_block_size']}"


@kind("group-size-changed", 15, "nothing")
def group_size_changed(image: Image, rng: Rng) -> str:
    """The wrong group size is declared."""
    new = int(one(rng, [8, 16, 32, 64, 128]))
    seen = []

    def change(node: Any) -> None:
        for key, value in node.items():
            if key == "group_size" and isinstance(value, int):
                seen.append(value)
                node[key] = new
            elif isinstance(value, dict):
                change(value)

    _edit_all(image, change)
    if not seen or set(seen) == {new}:
        raise Unfit("no group size")
    return f"group size {seen[0]} became {new}"


@kind("excluded-wrongly", 35, "nothing")
def excluded_wrongly(image: Image, rng: Rng) -> str:
    """A quantized module is excluded: by name, by glob or by a part of its name."""
    module = linear(image, rng)
    leaf = module.rpartition(".")[2]
    pattern = one(
        rng, [module, f"*{leaf}", f"{module.rpartition('.')[0]}*", f"*.{leaf}*", "model.*", "*"]
    )

    def change(body: dict[str, Any]) -> None:
        for key in _lists(body):
            body[key] = [*body[key], pattern]

    _edit_all(image, change)
    return f"{pattern} excluded"


@kind("exclusion-lost", 35, "nothing")
def exclusion_lost(image: Image, rng: Rng) -> str:
    """The exclusion of an unquantized linear layer, or all exclusions, are missing."""
    first = image.declared()[0] if image.declared() else {}
    if first.get("quant_algo") == "MIXED_PRECISION" or not _lists(first):
        raise Unfit("nothing is excluded")
    gone = one(rng, first[_lists(first)[0]]) if rng.integers(4) else None

    def change(body: dict[str, Any]) -> None:
        for key in _lists(body):
            body[key] = [] if gone is None else [p for p in body[key] if p != gone]

    _edit_all(image, change)
    return f"{gone or 'every exclusion'} is gone"


@kind("exclusions-differ", 10, "nothing")
def exclusions_differ(image: Image, rng: Rng) -> str:
    """The two files exclude different modules."""
    if len(image.declared()) < 2:
        raise Unfit("one declaration")
    body = image.declared()[1]
    key = one(rng, _lists(body))
    gone = one(rng, body[key])
    body[key] = [p for p in body[key] if p != gone]
    return f"{gone} is excluded in one file only"


@kind("entry-changed", 25, "nothing")
def entry_changed(image: Image, rng: Rng) -> str:
    """An entry of quantized_layers is missing, has the wrong algorithm or name, or declares
    an unquantized module.
    """
    first = image.declared()[0] if image.declared() else {}
    layers = first.get("quantized_layers")
    if not layers:
        raise Unfit("not mixed")
    name, how = one(rng, sorted(layers)), int(rng.integers(4))
    plain = one(rng, [split(n)[0] for n in image.plain(2) if "embed" not in n and "norm" not in n])

    def change(body: dict[str, Any]) -> None:
        entries = body["quantized_layers"]
        if how == 0:
            entries.pop(name)
        elif how == 1:
            entries[name] = {
                "quant_algo": "MXFP8" if entries[name]["quant_algo"] == "NVFP4" else "NVFP4"
            }
        elif how == 2:
            entries[f"model.language_model.{name}"] = entries.pop(name)
        else:
            entries[plain] = {"quant_algo": "MXFP8"}

    _edit_all(image, change)
    return f"{('lost', 'another algorithm', 'another name', f'as well {plain}')[how]}: {name}"


SIZES = (
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "num_experts",
    "num_local_experts",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "dense_intermediate_size",
    "shared_intermediate_size",
)


def _text(image: Image) -> dict[str, Any]:
    config = image.json[CONFIG]
    found: dict[str, Any] = config.get("text_config", config)
    return found


@kind("size-changed", 45, "nothing")
def size_changed(image: Image, rng: Rng) -> str:
    """config.json states the wrong size."""
    text = _text(image)
    names = [
        k
        for k in SIZES
        if k in text and not (k == "intermediate_size" and "moe_intermediate_size" in text)
    ]
    key = one(rng, names)
    old = text[key]
    text[key] = int(
        one(rng, [n for n in (old * 2, old // 2, old + 1, old - 1) if n > 0 and n != old])
    )
    return f"{key} {old} became {text[key]}"


@kind("size-lost", 15, "nothing")
def size_lost(image: Image, rng: Rng) -> str:
    """config.json does not state a size."""
    text = _text(image)
    names = [
        k
        for k in SIZES
        if k in text and not (k == "intermediate_size" and "moe_intermediate_size" in text)
    ]
    key = one(rng, [k for k in names if k != "head_dim"])
    del text[key]
    return f"no {key}"


@kind("config-of-the-model", 25, "base")
def config_of_the_model(image: Image, rng: Rng) -> str:
    """config.json differs from the base's in a field that tensors do not show."""
    text = _text(image)
    changes = {
        "rms_norm_eps": 1e-2,
        "hidden_act": "gelu",
        "num_experts_per_tok": 1,
        "max_position_embeddings": 7,
        "routed_scaling_factor": 9.0,
        "norm_topk_prob": True,
        "eos_token_id": 77,
        "bos_token_id": 78,
    }
    key = one(rng, [k for k in changes if k in text and text[k] != changes[k]])
    text[key] = changes[key]
    return f"{key} became {changes[key]}"


@kind("model-type-changed", 10, "base")
def model_type_changed(image: Image, rng: Rng) -> str:
    """config.json names a different model_type or architecture."""
    config = image.json[CONFIG]
    if rng.integers(2):
        config["model_type"] = one(
            rng, [t for t in ("llama", "mixtral", "qwen3", "lama") if t != config["model_type"]]
        )
    else:
        config["architectures"] = ["GPT2LMHeadModel"]
    return f"{config['model_type']} {config['architectures']}"


@kind("tied-wrongly", 10, "nothing")
def tied_wrongly(image: Image, rng: Rng) -> str:
    """config.json ties a head that is stored and differs from the embedding."""
    image.json[CONFIG]["tie_word_embeddings"] = True
    return "tie_word_embeddings true"


@kind("kv-declared", 10, "nothing")
def kv_declared(image: Image, rng: Rng) -> str:
    """A quantized KV cache is declared, but none of its scales is stored."""
    if any(n.endswith(("k_scale", "v_scale")) for n in image.tensors) or not image.declared():
        raise Unfit("its scales are stored")
    _edit_all(image, lambda body: body.update({"kv_cache_quant_algo": "FP8"}))
    return "kv_cache_quant_algo FP8"


@kind("config-spoilt", 15, "nothing")
def config_spoilt(image: Image, rng: Rng) -> str:
    """A config is truncated, is not an object, or holds the declaration as text."""
    file = one(rng, [f for f in (CONFIG, NESTED) if f in image.json])
    how, at = int(rng.integers(3)), float(rng.uniform(0.05, 0.95))
    if how == 2:
        image.json[CONFIG]["quantization_config"] = str(
            image.json[CONFIG].get("quantization_config")
        )
    else:
        image.post.append(spoil(file, lambda raw: raw[: int(at * len(raw))] if how == 0 else b"[]"))
    return f"{file}: {('cut', 'a list', 'text')[how]}"


# scales: what shows without a base


@kind("scale-nan", 25, "nothing")
def scale_nan(image: Image, rng: Rng) -> str:
    """Bytes of a block scale are NaN."""
    name = scale_name(image, rng, ("F8_E4M3", "U8", "F8_E8M0"))
    raw = image.tensors[name].raw()
    places = rng.choice(raw.size, int(rng.integers(1, 1 + min(8, raw.size))), replace=False)
    raw[places] = one(rng, [0x7F, 0xFF]) if image.tensors[name].dtype == "F8_E4M3" else 0xFF
    set_raw(image, name, raw)
    return f"{places.size} NaN in {name}"


@kind("scale-sign", 15, "nothing")
def scale_sign(image: Image, rng: Rng) -> str:
    """The sign bit of block scales is set."""
    name = scale_name(image, rng, ("F8_E4M3",))
    raw = image.tensors[name].raw()
    places = rng.choice(raw.size, int(rng.integers(1, 9)), replace=False)
    raw[places] |= 0x80
    set_raw(image, name, raw)
    return f"{places.size} negative in {name}"


@kind("scale-zero", 25, "nothing")
def scale_zero(image: Image, rng: Rng) -> str:
    """Block scales are zero: one, a row or a run."""
    name = scale_name(image, rng, ("F8_E4M3",))
    raw = image.tensors[name].raw()
    start = int(rng.integers(raw.size))
    count = int(one(rng, [1, 2, 8, image.tensors[name].shape[1], raw.size]))
    raw[start : start + count] = 0
    set_raw(image, name, raw)
    return f"{count} zero from {start} in {name}"


@kind("e8m0-cast-to-zero", 10, "nothing")
def e8m0_cast_to_zero(image: Image, rng: Rng) -> str:
    """All E8M0 scales of a tensor are 0, which is 2^-127: floats were cast to bytes."""
    name = scale_name(image, rng, ("U8", "F8_E8M0"))
    set_raw(image, name, np.zeros(len(image.tensors[name].data), np.uint8))
    return f"{name} is 2^-127 throughout"


@kind("number-unusable", 35, "nothing")
def number_unusable(image: Image, rng: Rng) -> str:
    """A float32 weight scale is NaN, infinite, zero or negative."""
    name = one(
        rng, [n for n, t in image.tensors.items() if t.dtype == "F32" and n.endswith(NUMBERS)]
    )
    values = image.tensors[name].array()
    flat = values.reshape(-1)
    flat[int(rng.integers(flat.size))] = one(rng, [np.nan, np.inf, -np.inf, 0.0, -1.0])
    image.put(name, values)
    return f"{name} holds {flat[~np.isfinite(flat) | (flat <= 0)]}"


@kind("input-scale-unusable", 25, "nothing")
def input_scale_unusable(image: Image, rng: Rng) -> str:
    """An input_scale is NaN, infinite, zero, negative or denormal."""
    name = one(rng, [n for n in image.tensors if n.endswith(".input_scale")])
    value = np.float32(one(rng, [np.nan, np.inf, 0.0, -0.01, 1e-39, 1e-34]))
    image.put(name, np.asarray(value, np.float32).reshape(image.tensors[name].shape))
    return f"{name} is {value}"


@kind("input-scale-far", 10, "nothing")
def input_scale_far(image: Image, rng: Rng) -> str:
    """An input_scale is a hundred thousand times its siblings', or a hundred-thousandth."""
    name = one(rng, [n for n in image.tensors if n.endswith(".input_scale")])
    by = np.float32(10.0) ** np.float32(one(rng, [-9, -7, -6, 6, 7, 9]))
    image.put(name, image.tensors[name].array() * by)
    return f"{name} times {by:g}"


@kind("input-scale-of-a-fused-member", 10, "nothing")
def input_scale_of_a_fused_member(image: Image, rng: Rng) -> str:
    """Members of a group that engines fuse have different input scales, within a factor of a
    hundred.
    """
    name = one(
        rng, [n for n in image.tensors if n.endswith(".input_scale") and n.split(".")[-2] in FUSED]
    )
    by = np.float32(one(rng, [0.01, 0.1, 0.3, 3, 10, 100]))
    image.put(name, image.tensors[name].array() * by)
    return f"{name} times {by:g}"


@kind("global-scale-of-a-fused-member", 35, "nothing")
def global_scale_of_a_fused_member(image: Image, rng: Rng) -> str:
    """Members of a group that engines fuse have different global scales."""
    name = one(
        rng,
        [n for n in image.tensors if n.endswith(".weight_scale_2") and n.split(".")[-2] in FUSED],
    )
    by = np.float32(one(rng, [0.001, 0.1, 0.5, 0.7, 1.3, 2, 4, 10, 1000]))
    image.put(name, image.tensors[name].array() * by)
    return f"{name} times {by:g}"


@kind("scale-inverted", 10, "nothing")
def scale_inverted(image: Image, rng: Rng) -> str:
    """A float32 weight scale is stored as a divisor instead of a factor."""
    name = one(
        rng, [n for n, t in image.tensors.items() if t.dtype == "F32" and n.endswith(NUMBERS)]
    )
    image.put(name, (1 / image.tensors[name].array()).astype(np.float32))
    return f"1/{name}"


@kind("plain-not-finite", 20, "nothing")
def plain_not_finite(image: Image, rng: Rng) -> str:
    """An unquantized tensor contains NaN or infinity."""
    name = one(rng, image.plain())
    values = image.tensors[name].array()
    flat = values.reshape(-1)
    flat[int(rng.integers(flat.size))] = one(rng, [np.nan, np.inf, -np.inf])
    image.put(name, values)
    return f"{name} is not finite"


@kind("expert-repeated", 20, "nothing")
def expert_repeated(image: Image, rng: Rng) -> str:
    """An expert is a copy of a different one of its layer."""
    container, _ = one(rng, list(experts(image)))
    leaves = [leaf for c, leaf in experts(image) if c == container]
    numbers = experts(image)[container, leaves[0]]
    a, b = rng.choice(numbers, 2, replace=False)
    for leaf in leaves:
        for name in image.of_module(f"{container}.{a}.{leaf}"):
            image.tensors[name].data = image.tensors[
                f"{container}.{b}.{leaf}.{split(name)[1]}"
            ].data
    return f"{container}: expert {a} is {b}"


# values: what shows with a base


@kind("scale-bit", 105, "base")
def scale_bit(image: Image, rng: Rng) -> str:
    """Bits of one to eight scales are flipped (NaN, zero and negative are other kinds)."""
    name = scale_name(image, rng)
    tensor = image.tensors[name]
    raw = tensor.raw()
    width = max(1, len(raw) // max(1, int(np.prod(tensor.shape))))
    count = int(rng.integers(1, 1 + min(8, len(raw) // width)))
    for place in rng.choice(len(raw) // width, count, replace=False):
        bit = int(rng.integers(7 if width == 1 else 31))
        raw[place * width + bit // 8] ^= 1 << (bit % 8)
    if tensor.dtype == "F8_E4M3" and (((raw & 0x7F) == 0) | ((raw & 0x7F) == 0x7F)).any():
        raise Unfit("another kind")
    if tensor.dtype in ("U8", "F8_E8M0") and (raw == 0xFF).any():
        raise Unfit("another kind")
    if (
        tensor.dtype == "F32"
        and not (np.isfinite(raw.view(np.float32)) & (raw.view(np.float32) > 0)).all()
    ):
        raise Unfit("another kind")
    set_raw(image, name, raw)
    return f"{count} bits in {name}"


def _rearranged(image: Image, rng: Rng, name: str) -> str:
    held = rows(image, name)
    how = int(rng.integers(4))
    if how == 0:
        made, said = np.roll(held, int(rng.integers(1, len(held))), axis=0), "rows rolled"
    elif how == 1:
        made, said = held[rng.permutation(len(held))], "rows permuted"
    elif how == 2:
        a, b = rng.choice(len(held), 2, replace=False)
        made, said = held.copy(), "two rows swapped"
        made[[a, b]] = made[[b, a]]
    else:
        made, said = held[::-1], "rows reversed"
    set_raw(image, name, made)
    return f"{name}: {said}"


@kind("scales-rearranged", 70, "base")
def scales_rearranged(image: Image, rng: Rng) -> str:
    """The rows of a block, row or tile scale are rolled, permuted, swapped or reversed."""
    return _rearranged(image, rng, scale_name(image, rng))


@kind("scales-shuffled", 25, "base")
def scales_shuffled(image: Image, rng: Rng) -> str:
    """All values of a scale are permuted, or its columns are rolled."""
    name = scale_name(image, rng)
    values = image.tensors[name].array()
    if values.size < 2:
        raise Unfit("one scale")
    if rng.integers(2) or values.ndim < 2:
        made = rng.permutation(values.reshape(-1)).reshape(values.shape)
    else:
        made = np.roll(values, 1, axis=1)
    set_raw(image, name, made)
    return f"{name} shuffled"


@kind("scales-of-another", 50, "base")
def scales_of_another(image: Image, rng: Rng) -> str:
    """Two modules of one shape have swapped scales, or one has the other's."""
    a, b = pair(image, rng, lambda m: m.rpartition(".")[2] if rng.integers(2) else "")
    leaf = image.scale_leaf(a)
    mine, theirs = image.tensors[f"{a}.{leaf}"], image.tensors[f"{b}.{leaf}"]
    both = bool(rng.integers(2))
    old, mine.data = mine.data, theirs.data
    if both:
        theirs.data = old
    return f"{a} has the {leaf} of {b}{' and the reverse' if both else ''}"


@kind("scales-multiplied", 50, "base")
def scales_multiplied(image: Image, rng: Rng) -> str:
    """The scales of a tensor, of some rows or of one block are multiplied by 2, 1/2 or more."""
    name = scale_name(image, rng)
    tensor = image.tensors[name]
    step = int(one(rng, [-2, -1, 1, 2]))
    values = tensor.array()
    mask = np.zeros(values.shape, bool)
    part = int(rng.integers(3))
    if part == 0 or not values.shape:
        mask[...] = True
    elif part == 1:
        mask[int(rng.integers(values.shape[0])) :] = True
    else:
        mask.reshape(-1)[int(rng.integers(values.size))] = True
    if tensor.dtype in ("U8", "F8_E8M0"):
        made = np.where(
            mask,
            tensor.raw().reshape(values.shape).astype(int) + step,
            tensor.raw().reshape(values.shape),
        )
        set_raw(image, name, np.clip(made, 1, 254).astype(np.uint8))
    else:
        wide = values.astype(np.float32)
        made = np.where(mask, wide * np.float32(2.0**step), wide)
        if tensor.dtype == "F8_E4M3":
            made = np.clip(made, 2**-9, 448)
        set_raw(image, name, made.astype(values.dtype))
    return f"{name} times 2^{step}, {('all', 'from a row on', 'one')[part]}"


@kind("scales-constant", 20, "base")
def scales_constant(image: Image, rng: Rng) -> str:
    """All scales of a tensor are one value: 1.0, the largest or the median."""
    name = scale_name(image, rng)
    values = image.tensors[name].array()
    if values.size < 2:
        raise Unfit("one scale")
    raw = image.tensors[name].raw().reshape(values.size, -1)
    order = np.argsort(values.astype(np.float32).reshape(-1))
    raw[:] = raw[order[one(rng, [0, -1, values.size // 2])]]
    set_raw(image, name, raw)
    return f"{name} is constant"


@kind("global-scale-alone", 25, "base")
def global_scale_alone(image: Image, rng: Rng) -> str:
    """The global scale of a projection that is not fused is wrong by a factor."""
    name = one(
        rng,
        [
            n
            for n in image.tensors
            if n.endswith(".weight_scale_2") and n.split(".")[-2] not in FUSED
        ],
    )
    by = np.float32(one(rng, [0.1, 0.5, 0.7, 1.5, 2, 6, 10]))
    image.put(name, image.tensors[name].array() * by)
    return f"{name} times {by:g}"


@kind("code-bits", 85, "base")
def code_bits(image: Image, rng: Rng) -> str:
    """Bits of one to 64 quantized values are flipped."""
    name = f"{linear(image, rng)}.weight"
    raw = image.tensors[name].raw()
    count = int(one(rng, [1, 2, 4, 16, 64]))
    for place in rng.choice(raw.size, count, replace=False):
        raw[place] ^= 1 << int(rng.integers(8))
    set_raw(image, name, raw)
    return f"{count} bits in {name}"


@kind("codes-rearranged", 60, "base")
def codes_rearranged(image: Image, rng: Rng) -> str:
    """The rows of a weight are rolled, permuted, swapped or reversed, without the scales."""
    return _rearranged(image, rng, f"{linear(image, rng)}.weight")


@kind("codes-zeroed", 35, "base")
def codes_zeroed(image: Image, rng: Rng) -> str:
    """A run of quantized values is zero: a block, a row, a page or all."""
    name = f"{linear(image, rng)}.weight"
    raw = image.tensors[name].raw()
    start, count = int(rng.integers(raw.size)), int(one(rng, [16, 64, 512, raw.size]))
    raw[start : start + count] = 0
    set_raw(image, name, raw)
    return f"{count} bytes of {name} zero from {start}"


@kind("nibbles-swapped", 25, "base")
def nibbles_swapped(image: Image, rng: Rng) -> str:
    """Nibbles are swapped, in a tensor or in some of its rows."""
    name = one(
        rng,
        [f"{m}.weight" for m in image.quantized() if image.tensors[f"{m}.weight"].dtype == "U8"],
    )
    held = rows(image, name)
    start = int(rng.integers(len(held))) if rng.integers(2) else 0
    held[start:] = (held[start:] << 4) | (held[start:] >> 4)
    set_raw(image, name, held)
    return f"{name} from row {start}"


@kind("codes-negated", 20, "base")
def codes_negated(image: Image, rng: Rng) -> str:
    """Signs of quantized values are flipped, from some row on or in one row."""
    name = f"{linear(image, rng)}.weight"
    held = rows(image, name)
    start = int(rng.integers(len(held)))
    end = start + 1 if rng.integers(2) else len(held)
    held[start:end] ^= 0x88 if image.tensors[name].dtype == "U8" else 0x80
    set_raw(image, name, held)
    return f"{name} rows {start} to {end}"


@kind("codes-coarse", 20, "base")
def codes_coarse(image: Image, rng: Rng) -> str:
    """The lowest bits of quantized values are cleared: a coarser grid than the format's."""
    name = f"{linear(image, rng)}.weight"
    raw = image.tensors[name].raw()
    mask = one(rng, [0xEE, 0xCC]) if image.tensors[name].dtype == "U8" else one(rng, [0xFC, 0xF8])
    set_raw(image, name, raw & np.uint8(mask))
    return f"{name} and 0x{mask:02X}"


@kind("code-nan", 15, "base")
def code_nan(image: Image, rng: Rng) -> str:
    """A value of an FP8 weight is NaN."""
    name = one(
        rng,
        [
            f"{m}.weight"
            for m in image.quantized()
            if image.tensors[f"{m}.weight"].dtype == "F8_E4M3"
        ],
    )
    raw = image.tensors[name].raw()
    raw[rng.choice(raw.size, int(rng.integers(1, 9)), replace=False)] = one(rng, [0x7F, 0xFF])
    set_raw(image, name, raw)
    return f"NaN in {name}"


@kind("modules-swapped", 50, "base")
def modules_swapped(image: Image, rng: Rng) -> str:
    """Two modules of one shape are swapped, with or without their scales."""
    a, b = pair(image, rng, lambda m: "")
    leaves = ["weight"] if rng.integers(2) else None
    image.swap(a, b, leaves)
    return f"{a} and {b}{' (codes)' if leaves else ''}"


@kind("gate-and-up-swapped", 35, "base")
def gate_and_up_swapped(image: Image, rng: Rng) -> str:
    """Gate and up are swapped."""
    gate = of_leaf(image, rng, GATE)
    head, _, leaf = gate.rpartition(".")
    image.swap(gate, f"{head}.{UP[GATE.index(leaf)]}")
    return f"{gate} and up"


@kind("gate-and-up-interleaved", 15, "base")
def gate_and_up_interleaved(image: Image, rng: Rng) -> str:
    """Gate and up were split from a stack with interleaved rows in halves."""
    gate = of_leaf(image, rng, GATE)
    head, _, leaf = gate.rpartition(".")
    up = f"{head}.{UP[GATE.index(leaf)]}"
    for part in ("weight", image.scale_leaf(gate)):
        if not image.tensors[f"{gate}.{part}"].shape:
            continue
        stack = np.concatenate([rows(image, f"{gate}.{part}"), rows(image, f"{up}.{part}")])
        set_raw(image, f"{gate}.{part}", stack[0::2])
        set_raw(image, f"{up}.{part}", stack[1::2])
    return f"{gate} and up"


@kind("experts-swapped", 35, "base")
def experts_swapped(image: Image, rng: Rng) -> str:
    """Two experts of a layer are swapped, as a whole or in one projection."""
    container, leaf = one(rng, list(experts(image)))
    a, b = rng.choice(experts(image)[container, leaf], 2, replace=False)
    leaves = [leaf] if rng.integers(2) else [x for c, x in experts(image) if c == container]
    for each in leaves:
        image.swap(f"{container}.{a}.{each}", f"{container}.{b}.{each}")
    return f"{container}: {a} and {b}, {len(leaves)} projections"


@kind("layers-swapped", 10, "base")
def layers_swapped(image: Image, rng: Rng) -> str:
    """Two layers are swapped in some role."""
    a, b = pair(image, rng, lambda m: re.sub(r"layers\.\d+\.", "layers.*.", m))
    image.swap(a, b)
    return f"{a} and {b}"


@kind("plain-bit", 40, "base")
def plain_bit(image: Image, rng: Rng) -> str:
    """One bit of an unquantized tensor is flipped; the value stays finite."""
    name = one(rng, image.plain())
    tensor = image.tensors[name]
    raw = tensor.raw()
    raw[int(rng.integers(raw.size))] ^= 1 << int(rng.integers(8))
    set_raw(image, name, raw)
    if not np.isfinite(tensor.array().astype(np.float32)).all():
        raise Unfit("another kind")
    return f"a bit of {name}"


@kind("plain-rearranged", 25, "base")
def plain_rearranged(image: Image, rng: Rng) -> str:
    """The rows of an embedding, a router or a norm are rolled, permuted, swapped or reversed."""
    return _rearranged(image, rng, one(rng, image.plain()))


@kind("plain-swapped", 15, "base")
def plain_swapped(image: Image, rng: Rng) -> str:
    """Two unquantized tensors of one shape are swapped."""
    groups: dict[Any, list[str]] = {}
    for name in image.plain():
        groups.setdefault((image.tensors[name].dtype, image.tensors[name].shape), []).append(name)
    found = one(rng, [g for g in groups.values() if len(g) > 1])
    a, b = (found[i] for i in rng.choice(len(found), 2, replace=False))
    image.tensors[a].data, image.tensors[b].data = image.tensors[b].data, image.tensors[a].data
    return f"{a} and {b}"


@kind("plain-zeroed", 10, "base")
def plain_zeroed(image: Image, rng: Rng) -> str:
    """An unquantized tensor is zero, or its second half is."""
    name = one(rng, image.plain())
    raw = image.tensors[name].raw()
    raw[0 if rng.integers(2) else raw.size // 2 :] = 0
    set_raw(image, name, raw)
    return f"{name} is zero"


# what no check of a checkpoint can know; counted apart


@kind("input-scale-among-siblings", 20, "stats")
def input_scale_among_siblings(image: Image, rng: Rng) -> str:
    """All input scales of a fused group are wrong by the same factor, up to ten: only calibration
    statistics know.
    """
    name = one(rng, [n for n in image.tensors if n.endswith(".input_scale")])
    by = np.float32(one(rng, [0.1, 0.3, 3, 10]))
    head = name.rsplit(".", 2)[0]
    for other in image.tensors:
        if other.endswith(".input_scale") and other.rsplit(".", 2)[0] == head:
            image.put(other, image.tensors[other].array() * by)
    return f"{head}.*.input_scale times {by:g}"


@kind("scale-one-code-off", 20, "nobody")
def scale_one_code_off(image: Image, rng: Rng) -> str:
    """A block scale is the next value; the stored values stay the nearest ones, or next to them."""
    name = scale_name(image, rng, ("F8_E4M3",))
    raw = image.tensors[name].raw()
    raw[int(rng.integers(raw.size))] += 1
    set_raw(image, name, raw)
    return f"a scale of {name} is the next one"


TOTAL = sum(k.count for k in KINDS if k.knows in ("nothing", "base"))
APART = sum(k.count for k in KINDS if k.knows not in ("nothing", "base"))
