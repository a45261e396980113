# SPDX-License-Identifier: Apache-2.0
"""Bytes to a hostile checkpoint: a clean one, and edits of its JSON and bytes that the input
chooses.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from verifier.selftest.tiny import TINY, make

INDEX, CONFIG, NESTED = "model.safetensors.index.json", "config.json", "hf_quant_config.json"
DEEP = 3000
NAMES = (
    "\x1b[2J\x1b[31mred\x1b[0m.weight",
    "<script>alert(1)</script>.weight",
    "a\nb.weight",
    "\u202etxet.weight",
    "\x00.weight",
    "../../etc/passwd",
    "x" * 5000 + ".weight",
    ".weight",
    "weight",
    "",
    "__metadata__",
    "\ud800.weight",
    "model.layers.0.",
    "..",
    "model.layers.99999999999999999999.mlp.gate_proj.weight",
    "model.layers.0.mlp.experts.18446744073709551616.w1.weight",
    "model.layers.0.mlp.experts.-1.gate_proj.weight",
    "model.layers.0.mlp.gate_proj.weight_scale",
    "%s%n{0}{x}.weight",
    "'; DROP TABLE--",
    "=cmd|' /C calc'!A0",
    "\U0001f600.weight",
    "a" * 60 + "." * 60,
    "[bold]x[/bold].weight",
    "model.layers.\u0663.mlp.gate_proj.weight",
    "k_scale",
    "mtp.0.weight",
    "re:(",
    "*",
    "a.experts.1.w1.weight_scale_2",
)
VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    16,
    32,
    127,
    128,
    2**31,
    2**32,
    2**53 + 1,
    2**62,
    2**63,
    2**64,
    10**400,
    -(2**63),
    0.5,
    1e308,
    -0.0,
    "",
    "x",
    "NaN",
    "FP8",
    "NVFP4",
    "MXFP8",
    "MIXED_PRECISION",
    "U8",
    "F4",
    "BF16",
    "F8_E4M3",
    "F8_E8M0",
    "BOOL",
    "C64",
    [],
    [0],
    [0, 0],
    [1, 1],
    [0, 2**63],
    [2**63, 2**63 + 1],
    [-1, 1],
    [0, 8, 16],
    [[]],
    [None],
    ["x"],
    [1, 32],
    [128, 128],
    [0.0, 8.0],
    ["*"],
    ["re:(a|a)*$"],
    ["re:("],
    ["re:" + "(a*)*" * 3 + "b"],
    ["*" * 40 + "z"],
    [""],
    ["re:"],
    ["[" * 30],
    ["re:.*" + ".*" * 12 + "zz"],
    ["re:(.*.*.*)*x"],
    [1, 2, 3] * 30,
    {},
    {"": {}},
    {"a": None},
    {"quant_algo": 1},
    {"x": {"quant_algo": "NVFP4"}},
    {"group_0": {"weights": {"group_size": -5}}},
    "llama",
    "minimax_m3_vl",
    "mixtral",
    "\x1b[31m",
    "<script>",
    "../x",
    "/etc/passwd",
    "model.safetensors",
    "mxfp8",
    "fp8",
    "modelopt",
    "compressed-tensors",
    "x" * 3000,
    10**9,
)
RAW = (
    b"NaN",
    b"Infinity",
    b"-Infinity",
    b"1e999",
    b"[" * DEEP + b"]" * DEEP,
    b'{"a":' * DEEP + b"1" + b"}" * DEEP,
    b"\xff\xfe",
    b"\x00",
    b'"\\ud800"',
    b"0" * 5000,
    b"9" * 5000,
    b'{"a":1,"a":2}',
    b"/*c*/1",
    b"'x'",
    b"01",
    b"1.",
    b"+1",
    b'"' + b"\\n" * 500 + b'"',
)
MARK = "\u2603raw{}\u2603"
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "vocab_size": 16,
    "intermediate_size": 32,
    "moe_intermediate_size": 32,
    "num_local_experts": 2,
    "num_experts": 2,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 32,
}


class Reader:
    """Choices from bytes; past their end it goes on with a counter, so that every input means
    something.
    """

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def byte(self) -> int:
        """Return the next byte."""
        self.at += 1
        return self.data[self.at - 1] if self.at <= len(self.data) else (self.at * 73) & 0xFF

    def number(self, below: int) -> int:
        """Return a number below a limit."""
        value = self.byte()
        while below > 256:
            value, below = value * 256 + self.byte(), below // 256
        return value % max(1, below) if below <= 256 else value

    def pick(self, found: Any) -> Any:
        """Return one of a sequence."""
        count = len(found)
        return (
            found[(self.byte() * 256 + self.byte()) % count]
            if count > 256
            else found[self.byte() % count]
        )

    @property
    def more(self) -> bool:
        """Whether the input has bytes left."""
        return self.at < len(self.data)


Files = dict[str, bytes]


@cache
def seeds(root: Path) -> tuple[Files, ...]:
    """Return small clean checkpoints as files, made once below ``root``."""
    found: list[Files] = []
    for tiny in TINY:
        if tiny.name in ("llama-fp8-channel", "mixtral-w4a16", "minimax-m3-mxfp8", "llama-mxfp8"):
            continue
        made = make(root, tiny)
        found.append(
            {
                f.name: f.read_bytes()
                for f in sorted(made.path.iterdir())
                if not f.name.startswith("tokenizer")
            }
        )
    return tuple(_thinned(f) for f in found)


def _thinned(files: Files) -> Files:
    """Keep the first layer of a checkpoint, so that a check costs little."""
    result = dict(files)
    kept: dict[str, str] = {}
    for name, raw in files.items():
        if not name.endswith(".safetensors"):
            continue
        header, data = split(raw)
        metadata = header.pop("__metadata__", None)
        entries: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
        body, at = b"", 0
        for tensor, entry in sorted(header.items(), key=lambda e: tuple(e[1]["data_offsets"])):
            dropped = ("layers.1.", "layers.2.", "experts.2.", "experts.3.", "vision")
            if any(part in tensor for part in dropped):
                continue
            low, high = entry["data_offsets"]
            entries[tensor] = entry | {"data_offsets": [at, at + high - low]}
            body += data[low:high]
            at += high - low
            kept[tensor] = name
        result[name] = joined(json.dumps(entries).encode(), body)
    if INDEX in result:
        result[INDEX] = json.dumps({"metadata": {"total_size": 0}, "weight_map": kept}).encode()
    config = json.loads(result[CONFIG])
    text = config.get("text_config", config)
    text |= {
        k: v
        for k, v in (("num_hidden_layers", 1), ("num_local_experts", 2), ("num_experts", 2))
        if k in text
    }
    result[CONFIG] = json.dumps(config).encode()
    return result


def split(raw: bytes) -> tuple[dict[str, Any], bytes]:
    """Return header and data of a safetensors file."""
    length = int.from_bytes(raw[:8], "little")
    header: dict[str, Any] = json.loads(raw[8 : 8 + length])
    return header, raw[8 + length :]


def joined(text: bytes, data: bytes) -> bytes:
    """Return a safetensors file of a header's text and data."""
    return len(text).to_bytes(8, "little") + text + data


def build(data: bytes, root: Path) -> tuple[Files, list[tuple[str, str]]]:
    """Return the files that an input stands for, and links to make (name, target)."""
    reader = Reader(data)
    files = dict(reader.pick(seeds(root)))
    links: list[tuple[str, str]] = []
    for _ in range(1 + reader.byte() % 4):
        _edit(reader, files, links)
        if not reader.more:
            break
    return files, links


def _edit(reader: Reader, files: Files, links: list[tuple[str, str]]) -> None:
    how = reader.byte() % 16
    shards = [f for f in files if f.endswith(".safetensors")]
    if how < 7 and shards:
        _edit_header(reader, files, reader.pick(shards))
    elif how < 13:
        names = [f for f in (INDEX, CONFIG, NESTED, CONFIG) if f in files]
        if names:
            _edit_json(reader, files, reader.pick(names))
    elif how < 15:
        _edit_bytes(reader, files)
    else:
        _edit_files(reader, files, links)


def _edit_header(reader: Reader, files: Files, name: str) -> None:
    try:
        header, data = split(files[name])
    except (ValueError, RecursionError):
        return
    if not isinstance(header, dict) or not header:
        return
    raw: list[bytes] = []
    how = reader.byte() % 12
    tensor = reader.pick(list(header))
    entry = header[tensor]
    if how < 3 and isinstance(entry, dict):
        field = reader.pick(("dtype", "shape", "data_offsets", "extra"))
        entry[field] = _value(reader, raw)
    elif how < 5:
        new = reader.pick(NAMES)
        header = {(new if k == tensor else k): v for k, v in header.items()}
    elif how == 5:
        header[reader.pick(NAMES)] = _value(reader, raw)
    elif how == 6:
        del header[tensor]
    elif how == 7:
        other = reader.pick(list(header))
        header[tensor], header[other] = header[other], header[tensor]
    elif how == 8:
        header["__metadata__"] = _value(reader, raw)
    elif how == 9 and isinstance(entry, dict) and isinstance(entry.get("data_offsets"), list):
        step = (reader.byte() - 128) * (1 << (reader.byte() % 57))
        entry["data_offsets"] = [
            o + step if isinstance(o, int) else o for o in entry["data_offsets"]
        ]
    elif how == 10:
        text = (
            _dump(header, raw).rstrip(b"} ")
            + b', "'
            + tensor.encode("utf-8", "replace")[:90]
            + b'": {}}'
        )
        files[name] = joined(text, data)
        return
    else:
        many = 1 << (reader.byte() % 12)
        header |= {
            f"{reader.pick(NAMES)}{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
            for i in range(many)
        }
    files[name] = joined(_dump(header, raw), data)


def _value(reader: Reader, raw: list[bytes]) -> Any:
    if reader.byte() % 6 == 0:
        raw.append(reader.pick(RAW))
        return MARK.format(len(raw) - 1)
    return reader.pick(VALUES)


def _dump(value: Any, raw: list[bytes]) -> bytes:
    text = json.dumps(value, ensure_ascii=True).encode()
    for i, piece in enumerate(raw):
        text = text.replace(json.dumps(MARK.format(i)).encode(), piece)
    return text


def _edit_json(reader: Reader, files: Files, name: str) -> None:
    try:
        value = json.loads(files[name])
    except (ValueError, RecursionError):
        return
    raw: list[bytes] = []
    node, depth = value, 1 + reader.byte() % 5
    while depth and isinstance(node, dict) and node:
        key = reader.pick(list(node))
        depth -= 1
        if depth and isinstance(node[key], dict) and node[key]:
            node = node[key]
            continue
        how = reader.byte() % 8
        if how < 4:
            node[key] = _value(reader, raw)
        elif how == 4:
            del node[key]
        elif how == 5:
            node[reader.pick(NAMES)] = node.pop(key)
        elif how == 6 and isinstance(node[key], list):
            node[key] = [*node[key], reader.pick((*NAMES, *VALUES[60:70]))]
        else:
            node[reader.pick(NAMES)] = _value(reader, raw)
        break
    files[name] = _dump(value, raw)


def _edit_bytes(reader: Reader, files: Files) -> None:
    name = reader.pick(sorted(files))
    raw = bytearray(files[name])
    if not raw:
        return
    # Headers and JSON rather than tensors: the first kilobytes.
    at = (reader.byte() * 256 + reader.byte()) % min(len(raw), 6000)
    how = reader.byte() % 5
    if how == 0:
        raw[at] ^= 1 << (reader.byte() % 8)
    elif how == 1:
        raw[:8] = bytes(reader.byte() for _ in range(8))
    elif how == 2:
        del raw[at:]
    elif how == 3:
        raw[at:at] = reader.pick(RAW)
    else:
        raw += bytes(reader.byte())
    files[name] = bytes(raw)


def _edit_files(reader: Reader, files: Files, links: list[tuple[str, str]]) -> None:
    name = reader.pick(sorted(files))
    how = reader.byte() % 5
    if how == 0:
        del files[name]
    elif how == 1:
        files[f"z{name}"] = files[name]
    elif how == 2:
        files[name] = b""
    elif how == 3:
        del files[name]
        links.append(
            (name, reader.pick(("/etc/passwd", "../outside", name, "nowhere", "/dev/zero", ".")))
        )
    else:
        files[
            reader.pick(
                ("x.safetensors", "\u202e.safetensors", "\x1b[31m.safetensors", "a b.safetensors")
            )
        ] = files[name]


def write(files: Files, links: list[tuple[str, str]], path: Path) -> Path:
    """Write a checkpoint into an empty or absent folder."""
    path.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (path / name).write_bytes(data)
    for name, target in links:
        (path / name).unlink(missing_ok=True)
        os.symlink(target, path / name)
    return path


# Whole files that no chain of small edits reaches, one of each defect by name.


def _header(entries: dict[str, Any]) -> Callable[[], bytes]:
    return lambda: joined(json.dumps(entries).encode(), b"")


def bombs() -> dict[str, Files]:
    """Return checkpoints of about one megabyte that aim at time or memory, by name."""
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    config = json.dumps(
        {
            "model_type": "llama",
            "quantization_config": {
                "quant_method": "modelopt",
                "quant_algo": "NVFP4",
                "ignore": ["lm_head"],
            },
        }
    ).encode()

    def of(text: bytes, data: bytes = b"", **others: bytes) -> Files:
        return {"model.safetensors": joined(text, data), CONFIG: config} | {
            k.replace("_json", ".json"): v for k, v in others.items()
        }

    many = {f"model.layers.{i}.mlp.experts.{i}.w1.weight": entry for i in range(9000)}
    quantized = {
        f"model.layers.{i}.mlp.gate_proj.{leaf}": {
            "dtype": "U8",
            "shape": [1, 8],
            "data_offsets": [0, 8],
        }
        for i in range(3000)
        for leaf in ("weight", "weight_scale", "weight_scale_2")
    }
    huge = {"w.weight": {"dtype": "U8", "shape": [2**31, 2**31], "data_offsets": [0, 2**62]}}
    config_of = lambda **more: json.dumps(json.loads(config) | more).encode()  # noqa: E731
    regexes = [
        "re:(a+)+$",
        "re:(.*a){25}b",
        "re:" + "(.*)*" * 4 + "!",
        "re:(x+x+)+y",
        "re:" + ".*a" * 25 + "!",
    ]
    regexes += ["*a" * 30 + "b", "re:(a|a)*b", "re:a*a*a*a*a*a*b"]
    excluded = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": regexes}
    long_names = {("a" * 900 + f".{i}.weight"): entry for i in range(900)}
    odd = {f"{n}{i}": entry for i in range(200) for n in NAMES if "\ud800" not in n}
    return {
        "header-of-2-to-the-63": {
            "model.safetensors": (2**63).to_bytes(8, "little") + b"{}",
            CONFIG: config,
        },
        "header-of-99-megabytes": {
            "model.safetensors": (99_000_000).to_bytes(8, "little") + b"{}",
            CONFIG: config,
        },
        "deep-header": of(b'{"a":' * 150_000 + b"1" + b"}" * 150_000),
        "deep-list": of(b"[" * 900_000),
        "deep-config": of(
            json.dumps({"a.weight": entry}).encode(), config_json=b'{"model_type":' * 60_000
        ),
        "many-tensors": of(json.dumps(many).encode()),
        "many-overlapping": of(json.dumps(quantized).encode(), bytes(8)),
        "sizes-of-2-to-the-62": of(json.dumps(huge).encode()),
        "key-a-hundred-thousand-times": of(b"{" + b'"a.weight":1,' * 70_000 + b'"b":1}'),
        "digits": of(b'{"a.weight":' + b"9" * 1_000_000 + b"}"),
        "shape-of-a-hundred-thousand": of(
            json.dumps({"a.weight": entry | {"shape": [1] * 200_000}}).encode()
        ),
        "evil-patterns": of(
            json.dumps(long_names).encode(), config_json=config_of(quantization_config=excluded)
        ),
        "many-patterns": of(
            json.dumps(dict(list(many.items())[:3000])).encode(),
            config_json=config_of(
                quantization_config=excluded
                | {"ignore": [f"model.layers.{i}.*z" for i in range(3000)]}
            ),
        ),
        "many-parts-patterns": of(
            json.dumps(dict(list(many.items())[:3000])).encode(),
            config_json=config_of(
                quantization_config=excluded | {"ignore": [f"w{i}*x" for i in range(3000)]}
            ),
        ),
        "many-literals": of(
            json.dumps(dict(list(many.items())[:5000])).encode(),
            config_json=config_of(
                quantization_config=excluded | {"ignore": [f"w{i}.y" for i in range(30_000)]}
            ),
        ),
        "many-quantized-and-literals": of(
            json.dumps(quantized).encode(),
            bytes(8),
            config_json=config_of(
                quantization_config=excluded | {"ignore": [f"w{i}.y" for i in range(30_000)]}
            ),
        ),
        "many-unquantized-and-parts": of(
            json.dumps(
                {
                    f"model.layers.{i}.mlp.gate_proj.weight": entry | {"shape": [0, 8]}
                    for i in range(9000)
                }
            ).encode(),
            config_json=config_of(
                quantization_config=excluded | {"ignore": [f"w{i}?" for i in range(20_000)]}
            ),
        ),
        "billions-of-layers": of(
            json.dumps({"a.weight": entry}).encode(), config_json=config_of(num_hidden_layers=10**9)
        ),
        "millions-of-experts": of(
            json.dumps({"a.weight": entry}).encode(),
            config_json=config_of(
                model_type="mixtral", num_local_experts=10**6, num_hidden_layers=9999
            ),
        ),
        "nine-thousand-layers": of(
            json.dumps({"a.weight": entry}).encode(), config_json=config_of(num_hidden_layers=9999)
        ),
        "odd-names": of(json.dumps(odd).encode()),
        "long-names": of(json.dumps(long_names).encode()),
        "dots": of(
            json.dumps(
                {"." * 200_000 + ".weight": entry, ".a" * 100_000 + ".weight": entry}
            ).encode()
        ),
        "index-of-everything": of(
            json.dumps({"a.weight": entry}).encode(),
            model_safetensors_index_json=b"",
        ),
        "quantized-layers": of(
            json.dumps(dict(list(quantized.items())[:2000])).encode(),
            bytes(8),
            config_json=config_of(
                quantization_config={
                    "quant_method": "modelopt",
                    "quant_algo": "MIXED_PRECISION",
                    "quantized_layers": {
                        f"model.layers.{i}.mlp": {"quant_algo": "NVFP4"} for i in range(9000)
                    },
                }
            ),
        ),
    }


__all__ = ["bombs", "build", "seeds", "write"]
