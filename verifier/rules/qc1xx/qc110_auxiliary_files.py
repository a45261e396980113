# SPDX-License-Identifier: Apache-2.0
"""QC110: auxiliary file is missing or invalid."""

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
from verifier.text import counted, json_type

MAX_BYTES = 4_000_000
"""Of larger JSON files, which are vocabularies, only the first and last character are checked:
parsing costs ten times as much."""
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
"""Any of these, or a file ``*.tiktoken``, is the vocabulary of a tokenizer."""
# The config of a part of a processor, and the keys of processor_config.json under which
# transformers 5 stores it instead.
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
AUTO_MAP_FILES = ("config.json", TOKENIZER_CONFIG, PROCESSOR, *PROCESSORS)
"""Files whose ``auto_map`` names code."""
_IMPORT = re.compile(r"^[ \t]*from[ \t]+\.(\w+)[ \t]+import\b", re.MULTILINE)


@rule(
    "QC110",
    "auxiliary file is missing or invalid",
    severity="error",
    depth="header",
    unit="auxiliary files",
    repairable=True,
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
            "loads the weights, but its server does not start without a tokenizer "
            "(vllm-project/vllm#46641), and a lost template or end token is silent",
        )
    },
)
def check(ctx: Context) -> Iterator[Finding]:
    """Tokenizer, chat template, processor and remote code are present, and each file is valid.

    **What it does.** With a base: checks that the tokenizer, chat template, processor and
    generation config are here if the base has them, in any of the spellings that transformers
    writes. Other files, such as a README, are not checked.

    With or without a base: known JSON files parse, the code that an ``auto_map`` names is here
    together with what it imports, and a tokenizer config comes with a vocabulary.

    **Why it happens.** The exporter saved only the weights; an upload filter took ``*.safetensors``
    and ``config.json``; or Git LFS left a pointer in place of a file.

    **Impact.** Engines load weights without these files. Without a tokenizer, a processor or the
    code that an ``auto_map`` names the server does not start; without a chat template or generation
    config it does, with the wrong prompt or without the end-of-turn token.

    **Fix.** Copy the files from the source checkpoint.
    """
    ckpt = ctx.checkpoint
    parsed: dict[str, Any] = {}
    for name in JSON_FILES:
        if name in ckpt.files:
            yield from _parse(ctx, name, parsed)
    yield from _check_not_placeholders(ctx)
    if ckpt.config is not None:
        parsed["config.json"] = ckpt.config
    yield from _check_code(ctx, parsed)
    if isinstance(parsed.get(TOKENIZER_CONFIG), Mapping):
        ctx.tally.see()
        yield from _check_tokenizer(ctx, parsed[TOKENIZER_CONFIG])
    if ctx.base is not None:
        yield from _compare_with_base(ctx, ctx.base.checkpoint, parsed)
    elif ctx.tally.checked:
        ctx.tally.miss(1, "pass --base to know which files are expected")


def _check_tokenizer(ctx: Context, tokenizer: Mapping[str, Any]) -> Iterator[Finding]:
    """Yield a missing vocabulary, and a missing config of the processor that it names."""
    ckpt = ctx.checkpoint
    if not _has_vocabulary(ckpt.files) and not _needs_no_vocabulary(tokenizer):
        message = "tokenizer_config.json is here without a vocabulary"
        yield _absent(ctx, "tokenizer.json", message, "a vocabulary")
    processor = tokenizer.get("processor_class")
    multimodal = any(k in (ckpt.config or {}) for k in ("vision_config", "audio_config"))
    if processor and multimodal and not any(n in ckpt.files for n in (PROCESSOR, *PROCESSORS)):
        yield ctx.finding(
            "tokenizer_config.json names a processor, but there is no processor config",
            cause="no processor config",
            where=Where(None, PROCESSOR),
            observed="absent",
            expected=str(processor)[:80],
            severity="warning",
        )


def _compare_with_base(
    ctx: Context, base: Checkpoint, parsed: Mapping[str, Any]
) -> Iterator[Finding]:
    """Yield the files of the base that are missing here in every spelling."""
    files = ctx.checkpoint.files
    for name in ("generation_config.json", TOKENIZER_CONFIG):
        if name in base.files:
            ctx.tally.see()
            if name not in files:
                yield _absent(ctx, name, f"{name} is missing; the base has it", "the base's")
    if _has_vocabulary(base.files):
        ctx.tally.see()
        if not _has_vocabulary(files):
            candidates = (*VOCABULARIES, *sorted(base.files))
            name = next(n for n in candidates if n in base.files and _has_vocabulary([n]))
            yield _absent(ctx, name, "no tokenizer vocabulary; the base has one", name)
    template = _chat_template_file(base, {})
    unreadable = any(n in files and n not in parsed for n in (TOKENIZER_CONFIG, PROCESSOR))
    if template and not unreadable:
        ctx.tally.see()
        if not _chat_template_file(ctx.checkpoint, parsed):
            yield _absent(ctx, template, "no chat template in any form; the base has one", template)
    yield from _compare_processors(ctx, base, parsed.get(PROCESSOR))


def _compare_processors(ctx: Context, base: Checkpoint, processor: object) -> Iterator[Finding]:
    """Yield the processor configs of the base that are missing here."""
    files = ctx.checkpoint.files
    base_processor = _json_object(base, PROCESSOR)
    for name, keys in PROCESSORS.items():
        if name in base.files or any(k in base_processor for k in keys):
            ctx.tally.see()
            inside = isinstance(processor, Mapping) and any(k in processor for k in keys)
            if name not in files and not inside:
                message = f"{name} is missing; the base has it"
                yield _absent(ctx, name, message, f"{name}, or its keys in {PROCESSOR}")
    parts = [k for keys in PROCESSORS.values() for k in keys]
    if PROCESSOR in base.files and not any(k in base_processor for k in parts):
        ctx.tally.see()
        if PROCESSOR not in files:
            yield _absent(ctx, PROCESSOR, f"{PROCESSOR} is missing; the base has it", "the base's")


def _parse(ctx: Context, name: str, parsed: dict[str, Any]) -> Iterator[Finding]:
    """Parse one JSON file into ``parsed``; yield a finding if it is not a JSON object."""
    ckpt = ctx.checkpoint
    ctx.tally.see()
    problem = ""
    try:
        large = ckpt.files[name] > MAX_BYTES
        value = _check_ends(ckpt, name) if large else json.loads(_text(ckpt, name))
        problem = "" if isinstance(value, dict) else json_type(value)
    except RecursionError:
        problem = "nested too deeply"
    except (ValueError, ContainerError) as error:
        problem = str(error)[:160]
    if problem:
        yield ctx.finding(
            f"{name} is not a JSON object",
            cause="not an object",
            where=Where(None, name),
            observed=problem,
            expected="a JSON object",
        )
    else:
        parsed[name] = value


def _text(ckpt: Checkpoint, name: str) -> str:
    return ckpt.source.read(name, 0, ckpt.files[name]).tobytes().decode("utf-8")


def _check_ends(ckpt: Checkpoint, name: str) -> dict[str, Any]:
    """Return an empty object for a large file that begins and ends like a JSON object.

    Raises:
        ValueError: it does not begin or end like one.
    """
    size = ckpt.files[name]
    first, last = (ckpt.source.read(name, start, 256).tobytes() for start in (0, size - 256))
    if not first.lstrip().startswith(b"{") or not last.rstrip().endswith(b"}"):
        raise ValueError("does not begin with { and end with }: truncated, or not JSON")
    return {}


def _check_not_placeholders(ctx: Context) -> Iterator[Finding]:
    """Yield each vocabulary or template that is empty or a Git LFS pointer.

    JSON files are left out: they do not parse then.
    """
    ckpt = ctx.checkpoint
    for name, size in ckpt.files.items():
        relevant = _has_vocabulary([name]) or name.endswith((".jinja", "merges.txt"))
        if name.endswith(".json") or not relevant:
            continue
        ctx.tally.see()
        head = ckpt.source.read(name, 0, size).tobytes() if 0 < size < 300 else b""
        if size == 0 or head.startswith(b"version https://git-lfs"):
            yield ctx.finding(
                f"{name} is {'a Git LFS pointer' if size else 'empty'}",
                cause="empty",
                where=Where(None, name),
                observed=counted(size, "byte"),
                expected="the file",
            )


def _check_code(ctx: Context, parsed: Mapping[str, Any]) -> Iterator[Finding]:
    """Yield each missing Python file that an ``auto_map``, or a file named by one, refers to."""
    ckpt = ctx.checkpoint
    required_by: dict[str, str] = {}
    for name in AUTO_MAP_FILES:
        value = parsed.get(name)
        if isinstance(value, Mapping):
            ctx.tally.see()
            for module in _modules(value.get("auto_map")):
                required_by.setdefault(f"{module}.py", name)
    queue = list(required_by)
    while queue:
        file = queue.pop()
        source = required_by[file]
        ctx.tally.see()
        if file not in ckpt.files:
            verb = "imports" if source.endswith(".py") else "names in auto_map"
            same_in_base = (
                ctx.base is not None
                and file not in ctx.base.checkpoint.files
                and file in _auto_map_files(ctx.base.checkpoint)
            )
            yield ctx.finding(
                f"{source} {verb} code that is missing{' (also in the base)' * same_in_base}",
                cause="missing code",
                where=Where(None, file),
                observed="absent",
                expected=file,
                severity="warning" if same_in_base else "error",
            )
        elif ckpt.files[file] <= MAX_BYTES and len(required_by) < 256:
            text = ckpt.source.read(file, 0, ckpt.files[file]).tobytes().decode("utf-8", "replace")
            for module in _IMPORT.findall(text):
                if f"{module}.py" not in required_by:
                    required_by[f"{module}.py"] = file
                    queue.append(f"{module}.py")


def _auto_map_files(ckpt: Checkpoint) -> set[str]:
    """Return the Python files that the ``auto_map`` of config.json names."""
    return {f"{m}.py" for m in _modules((ckpt.config or {}).get("auto_map"))}


def _modules(auto_map: object) -> Iterator[str]:
    """Yield the modules that an ``auto_map`` names in this directory, not in other repositories."""
    if not isinstance(auto_map, Mapping):
        return
    for value in list(auto_map.values())[:64]:
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and "--" not in text and re.fullmatch(r"\w+\.\w+", text):
                yield text.partition(".")[0]


def _needs_no_vocabulary(tokenizer: Mapping[str, Any]) -> bool:
    """Whether a tokenizer works on bytes, or comes with code of its own."""
    byte_tokenizers = ("ByT5Tokenizer", "CanineTokenizer", "PerceiverTokenizer")
    return "auto_map" in tokenizer or tokenizer.get("tokenizer_class") in byte_tokenizers


def _has_vocabulary(files: Iterable[str]) -> bool:
    return any(n in VOCABULARIES or n.endswith(".tiktoken") for n in files)


def _chat_template_file(ckpt: Checkpoint, parsed: Mapping[str, Any]) -> str:
    """Return the file that contains a chat template, or ''."""
    for name in ("chat_template.jinja", "chat_template.json"):
        if name in ckpt.files:
            return name
    for name in (TOKENIZER_CONFIG, PROCESSOR):
        value = parsed.get(name) if parsed else _json_object(ckpt, name)
        if isinstance(value, Mapping) and value.get("chat_template"):
            return name
    return ""


def _json_object(ckpt: Checkpoint, name: str) -> Mapping[str, Any]:
    """Return the object in a JSON file of the base, or an empty one."""
    if not 0 < ckpt.files.get(name, 0) <= MAX_BYTES:
        return {}
    try:
        value = json.loads(_text(ckpt, name))
    except (ValueError, RecursionError, ContainerError):
        return {}
    return value if isinstance(value, dict) else {}


def _absent(ctx: Context, file: str, message: str, expected: str) -> Finding:
    return ctx.finding(
        message, cause="absent", where=Where(None, file), observed="absent", expected=expected
    )
