# SPDX-License-Identifier: Apache-2.0
"""QC110: tokenizer, template, processor or code is missing, or is no JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from verifier.checkpoint import Checkpoint
from verifier.errors import ContainerError
from verifier.findings import Finding, Where
from verifier.rules.context import Context
from verifier.rules.registry import rule

MAX_BYTES = 4_000_000
"""Larger JSON files, which are vocabularies, are held to their first and last character: parsing
costs ten times as much."""
TOKENIZER_CONFIG, PROCESSOR = "tokenizer_config.json", "processor_config.json"
VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer.model.v3",
    "tekken.json",
    "tiktoken.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "spm.model",
    "vocab.json",
    "vocab.txt",
    "bpe.model",
)
"""Any of these, or a file ``*.tiktoken``, gives a tokenizer its words."""
# Part of a processor and the key of processor_config.json under which transformers 5 stores it
# instead.
PROCESSORS = {
    "preprocessor_config.json": ("image_processor", "feature_extractor"),
    "video_preprocessor_config.json": ("video_processor",),
}
JSON_FILES = (
    "generation_config.json",
    TOKENIZER_CONFIG,
    PROCESSOR,
    *PROCESSORS,
    "tokenizer.json",
    "tekken.json",
    "vocab.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
)
CODED = ("config.json", TOKENIZER_CONFIG, PROCESSOR, *PROCESSORS)
"""Files whose ``auto_map`` names code."""
_IMPORT = re.compile(r"^[ \t]*from[ \t]+\.(\w+)[ \t]+import\b", re.MULTILINE)


@rule(
    "QC110",
    "side file is missing or broken",
    severity="error",
    depth="header",
    unit="side files",
    consumers=("vLLM", "SGLang", "TensorRT-LLM", "transformers"),
    sources=(
        "NVIDIA/Model-Optimizer#2060",
        "ModelCloud/GPTQModel#1291",
        "hiyouga/LlamaFactory#8399",
        "vllm-project/vllm#46641",
    ),
    engines={
        "vllm": (
            "error",
            "does not start without a tokenizer in the folder (vllm-project/vllm#46641)",
        )
    },
)
def check(ctx: Context) -> Iterator[Finding]:
    """What a server reads beside the weights is there, and is what its name says.

    With a base: tokenizer, chat template, processor and generation config, where the base has them
    (in any of the spellings that transformers writes; README and the like are nobody's concern).
    With or without one: known JSON files parse, the code that an ``auto_map`` names is in the
    folder with what it imports, and a tokenizer config has a vocabulary.

    **Why.** The exporter saved the weights only; an upload filter took ``*.safetensors`` and
    ``config.json``; Git LFS left a pointer in place of a file.
    **Hurts.** The server does not start, or starts with another template or without the end-of-turn
    token.
    **Mend.** Copy the files from the source checkpoint.
    """
    ckpt = ctx.checkpoint
    read: dict[str, Any] = {}
    for name in JSON_FILES:
        if name in ckpt.files:
            yield from _parse(ctx, name, read)
    yield from _pointers(ctx)
    if ckpt.config is not None:
        read["config.json"] = ckpt.config
    yield from _code(ctx, read)
    if isinstance(read.get(TOKENIZER_CONFIG), Mapping):
        ctx.tally.see()
        if not _vocabulary(ckpt.files) and not _brings_code(read[TOKENIZER_CONFIG]):
            yield _absent(
                ctx,
                "tokenizer.json",
                "a tokenizer config, and no vocabulary for it",
                "a vocabulary",
            )
        named = read[TOKENIZER_CONFIG].get("processor_class")
        sees = any(k in (ckpt.config or {}) for k in ("vision_config", "audio_config"))
        if named and sees and not any(n in ckpt.files for n in (PROCESSOR, *PROCESSORS)):
            yield ctx.finding(
                "the tokenizer config names a processor, and no processor config is here",
                where=Where(None, PROCESSOR),
                observed="absent",
                expected=str(named)[:80],
                severity="warning",
            )
    if ctx.base is None:
        if ctx.tally.checked:
            ctx.tally.miss(1, "without a base nobody knows which further files belong here")
        return
    yield from _against(ctx, ctx.base.checkpoint, read)


def _against(ctx: Context, base: Checkpoint, read: Mapping[str, Any]) -> Iterator[Finding]:
    """Yield what the base has and the candidate lacks in every spelling."""
    files = ctx.checkpoint.files
    for name in ("generation_config.json", TOKENIZER_CONFIG):
        if name in base.files:
            ctx.tally.see()
            if name not in files:
                yield _absent(ctx, name, f"{name} is missing, and the base has it", "the base's")
    if _vocabulary(base.files):
        ctx.tally.see()
        if not _vocabulary(files):
            name = next(
                n
                for n in (*VOCABULARIES, *sorted(base.files))
                if n in base.files and _vocabulary([n])
            )
            yield _absent(ctx, name, "no vocabulary of a tokenizer, and the base has one", name)
    template = _template(base, {})
    broken = any(n in files and n not in read for n in (TOKENIZER_CONFIG, PROCESSOR))
    if template and not broken:
        ctx.tally.see()
        if not _template(ctx.checkpoint, read):
            yield _absent(
                ctx, template, "no chat template in any form, and the base has one", template
            )
    for name, keys in PROCESSORS.items():
        whole = _object(base, PROCESSOR)
        if name in base.files or any(k in whole for k in keys):
            ctx.tally.see()
            mine = read.get(PROCESSOR)
            if name not in files and not (
                isinstance(mine, Mapping) and any(k in mine for k in keys)
            ):
                yield _absent(
                    ctx,
                    name,
                    f"{name} is missing, and the base has it",
                    f"{name}, or a part of {PROCESSOR}",
                )
    if PROCESSOR in base.files and not any(
        k in _object(base, PROCESSOR) for ks in PROCESSORS.values() for k in ks
    ):
        ctx.tally.see()
        if PROCESSOR not in files:
            yield _absent(
                ctx, PROCESSOR, f"{PROCESSOR} is missing, and the base has it", "the base's"
            )


def _parse(ctx: Context, name: str, read: dict[str, Any]) -> Iterator[Finding]:
    """Parse one file into ``read``; yield what is wrong with it."""
    ckpt = ctx.checkpoint
    ctx.tally.see()
    said = ""
    try:
        value = _ends(ckpt, name) if ckpt.files[name] > MAX_BYTES else json.loads(_text(ckpt, name))
        said = "" if isinstance(value, dict) else f"a JSON {type(value).__name__}"
    except RecursionError:
        said = "nested too deeply"
    except (ValueError, ContainerError) as error:
        said = str(error)[:160]
    if said:
        yield ctx.finding(
            f"{name} is no JSON object",
            where=Where(None, name),
            observed=said,
            expected="a JSON object",
        )
    else:
        read[name] = value


def _text(ckpt: Checkpoint, name: str) -> str:
    return ckpt.source.read(name, 0, ckpt.files[name]).tobytes().decode("utf-8")


def _ends(ckpt: Checkpoint, name: str) -> dict[str, Any]:
    """Return an empty object for a large file that begins and ends as an object does.

    Raises:
        ValueError: it does not.
    """
    size = ckpt.files[name]
    first, last = (ckpt.source.read(name, start, 256).tobytes() for start in (0, size - 256))
    if not first.lstrip().startswith(b"{") or not last.rstrip().endswith(b"}"):
        raise ValueError("it does not begin with { and end with }: cut, or another kind of file")
    return {}


def _pointers(ctx: Context) -> Iterator[Finding]:
    """Yield each vocabulary or template that is a Git LFS pointer, or empty; JSON files do not
    parse then.
    """
    ckpt = ctx.checkpoint
    for name, size in ckpt.files.items():
        if name.endswith(".json") or not (
            _vocabulary([name]) or name.endswith((".jinja", "merges.txt"))
        ):
            continue
        ctx.tally.see()
        if size == 0 or (
            size < 300
            and ckpt.source.read(name, 0, size).tobytes().startswith(b"version https://git-lfs")
        ):
            what = "a Git LFS pointer" if size else "empty"
            yield ctx.finding(
                f"{name} is {what}",
                where=Where(None, name),
                observed=f"{size} bytes",
                expected="the file",
            )


def _code(ctx: Context, read: Mapping[str, Any]) -> Iterator[Finding]:
    """Yield each module of Python code that an ``auto_map``, or such a module, names and that is
    not in the folder.
    """
    ckpt = ctx.checkpoint
    wanted: dict[str, str] = {}
    for name in CODED:
        value = read.get(name)
        if isinstance(value, Mapping):
            ctx.tally.see()
            for module in _modules(value.get("auto_map")):
                wanted.setdefault(f"{module}.py", name)
    queue = list(wanted)
    while queue:
        file = queue.pop()
        source = wanted[file]
        ctx.tally.see()
        if file not in ckpt.files:
            verb = "imports" if source.endswith(".py") else "names in auto_map"
            habit = (
                ctx.base is not None
                and file not in ctx.base.checkpoint.files
                and file in _named(ctx.base.checkpoint)
            )
            yield ctx.finding(
                f"{source} {verb} code that is not in the folder{', nor in the base' if habit else ''}",
                where=Where(None, file),
                observed="absent",
                expected=file,
                severity="warning" if habit else "error",
            )
        elif ckpt.files[file] <= MAX_BYTES and len(wanted) < 256:
            text = ckpt.source.read(file, 0, ckpt.files[file]).tobytes().decode("utf-8", "replace")
            for module in _IMPORT.findall(text):
                if f"{module}.py" not in wanted:
                    wanted[f"{module}.py"] = file
                    queue.append(f"{module}.py")


def _named(ckpt: Checkpoint) -> set[str]:
    """Return the code that a checkpoint's own config.json names."""
    return {f"{m}.py" for m in _modules((ckpt.config or {}).get("auto_map"))}


def _modules(auto_map: object) -> Iterator[str]:
    """Yield the modules of an ``auto_map`` that belong in this folder: no other repository's, no
    subfolder's.
    """
    if not isinstance(auto_map, Mapping):
        return
    for value in list(auto_map.values())[:64]:
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and "--" not in text and re.fullmatch(r"\w+\.\w+", text):
                yield text.partition(".")[0]


def _brings_code(tokenizer: Mapping[str, Any]) -> bool:
    """Whether a tokenizer is none of transformers' own that need a file of words."""
    own = tokenizer.get("tokenizer_class")
    return "auto_map" in tokenizer or own in (
        "ByT5Tokenizer",
        "CanineTokenizer",
        "PerceiverTokenizer",
    )


def _vocabulary(files: Iterable[str]) -> bool:
    return any(n in VOCABULARIES or n.endswith(".tiktoken") for n in files)


def _template(ckpt: Checkpoint, read: Mapping[str, Any]) -> str:
    """Return the file that holds a chat template, or ''."""
    for name in ("chat_template.jinja", "chat_template.json"):
        if name in ckpt.files:
            return name
    for name in (TOKENIZER_CONFIG, PROCESSOR):
        value = read.get(name) if read else _object(ckpt, name)
        if isinstance(value, Mapping) and value.get("chat_template"):
            return name
    return ""


def _object(ckpt: Checkpoint, name: str) -> Mapping[str, Any]:
    """Return the object of a base's JSON file, or an empty one."""
    if not 0 < ckpt.files.get(name, 0) <= MAX_BYTES:
        return {}
    try:
        value = json.loads(_text(ckpt, name))
    except (ValueError, RecursionError, ContainerError):
        return {}
    return value if isinstance(value, dict) else {}


def _absent(ctx: Context, file: str, message: str, expected: str) -> Finding:
    return ctx.finding(message, where=Where(None, file), observed="absent", expected=expected)
