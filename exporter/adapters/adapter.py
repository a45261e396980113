# SPDX-License-Identifier: Apache-2.0
"""State dicts between the hub's layout and a training framework's, MXFP8 decoded on load."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from exporter.adapters import keys, shards
from exporter.adapters.keys import SCALES, Key
from exporter.adapters.tables import Stack, Table
from verifier.errors import EncodeError, PlanError
from verifier.schemes import SCALE_LEAVES

StateDict = dict[str, torch.Tensor]
SHOWN = 5


@dataclass(frozen=True, slots=True)
class _Part:
    """One weight of a hub state dict, by the names it has there."""

    key: Key
    weight: str
    scale: str | None


class StateDictAdapter:
    """Converts one checkpoint's state dicts; every method works on whole tensors and on DTensors.

    ``from_hf`` and ``to_hf`` follow the interface of NeMo AutoModel's adapters. What a family's
    tensors are called comes from its `Table`, what it has from `verifier.layouts.family`, what is
    quantized from the config's declaration: a further family is a further table. Keywords that
    frameworks pass beside the named ones are taken and not used.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        table: Table | None = None,
        *,
        dtype: torch.dtype = torch.bfloat16,
        names: Iterable[str] | None = None,
    ) -> None:
        """Build the key table.

        Args:
            config: the parsed config.json, with its ``quantization_config``.
            table: the framework's names; by default the one for the config's ``model_type`` in
                `TABLES`.
            dtype: what MXFP8 weights are decoded to: float32, bfloat16 or float16. Other tensors
                keep theirs.
            names: the tensors that the checkpoint has (the ``weight_map`` of its index), where they
                are known: then they, not the declaration, say what is quantized, and which spelling
                of a name `to_hf` writes.

        Raises:
            PlanError: no table for the model type, a name that no rule or two rules claim.
        """
        self.config, self.dtype = config, dtype
        self._keys = keys.build(config, table, names)
        self._any = any(k.algo for k in self._keys.hub.values())

    @property
    def quantized(self) -> tuple[str, ...]:
        """The hub names of the weights that the checkpoint keeps in MXFP8, sorted."""
        return tuple(sorted({k.hub for k in self._keys.hub.values() if k.algo == "MXFP8"}))

    def native_name(self, hub: str) -> str:
        """Return what the framework calls a hub tensor, or the stack that it is a part of.

        Raises:
            PlanError: the family has no such tensor under this config.
        """
        return self._key(hub).native

    # --- from the hub

    def from_hf(
        self,
        hf_state_dict: StateDict,
        device_mesh: DeviceMesh | None = None,
        *,
        exclude_key_regex: str | None = None,
        **_: Any,
    ) -> StateDict:
        """Return the native state dict of a hub state dict, which is emptied on the way.

        Every name is checked before the first tensor is touched; an error up to there leaves the
        dict as it was. Then one native tensor is made at a time and its sources are dropped, so
        that beside input and result no more than one stack of experts is alive. Parts that are
        still views of their native stack (from `to_hf`) give that stack back, uncopied.

        Args:
            hf_state_dict: hub name to tensor: the whole checkpoint or any set of whole layers or
                tensors of it.
            device_mesh: where experts are spread over ranks: a mesh with a dimension ``ep``, or of
                one dimension. Experts of other ranks are dropped; stacks become DTensors,
                ``Shard(0)`` on that dimension.
            exclude_key_regex: hub names that it matches from their start are dropped.

        Raises:
            PlanError: a name that the family does not have, a scale without its weight, codes
                without their scale, a stack without all of its experts, one tensor under two names,
                a layout that a stack cannot have.
            EncodeError: parts that do not fit one another, NaN or infinity after decoding.
        """
        excluded = _matcher(exclude_key_regex)
        dropped = [n for n in hf_state_dict if excluded(n)]
        parts = self._parts(hf_state_dict, frozenset(dropped))
        wanted = (
            shards.expert_range(device_mesh, self._keys.experts) if self._keys.experts else range(0)
        )
        todo: dict[str, list[_Part]] = {}
        for part in parts:
            if part.key.stack is None or part.key.expert in wanted:
                todo.setdefault(part.key.native, []).append(part)
            else:
                dropped += [part.weight] if part.scale is None else [part.weight, part.scale]
        for native, found in todo.items():
            self._complete(native, found, wanted)
        for name in dropped:
            del hf_state_dict[name]
        result: StateDict = {}
        for native, found in todo.items():
            stack = found[0].key.stack
            if stack is None:
                result[native] = self._take(hf_state_dict, found[0])
            else:
                result[native] = self._stack(
                    hf_state_dict, native, stack, found, wanted, device_mesh
                )
        return result

    def _parts(self, given: StateDict, dropped: frozenset[str]) -> list[_Part]:
        """Return the weights of a hub state dict with their scales, every name accounted for.

        Raises:
            PlanError: names that do not fit the family or one another.
        """
        found: list[_Part] = []
        first: dict[int, str] = {}
        scales: set[str] = set()
        for name in given:
            if name in dropped:
                continue
            head, _, leaf = name.rpartition(".")
            if leaf in SCALES:
                if f"{head}.weight" not in given or f"{head}.weight" in dropped:
                    raise PlanError(f"{name}: a scale, and {head}.weight is not in the state dict")
                scales.add(name)
                continue
            if leaf in SCALE_LEAVES:
                raise PlanError(f"{name}: no part of MXFP8, which is what this adapter decodes")
            key = self._key(name)
            if first.setdefault(id(key), name) != name:
                raise PlanError(
                    f"{name} and {first[id(key)]} are two names of one tensor, {key.native}"
                )
            siblings = [f"{name.removesuffix('weight')}{leaf}" for leaf in SCALES]
            beside = [s for s in siblings if s in given and s not in dropped]
            if len(beside) > 1:
                raise PlanError(f"{name}: two scales, {' and '.join(beside)}")
            coded = given[name].dtype in shards.CODES
            if coded and not beside:
                scale = f"{name.removesuffix('weight')}{key.scale}"
                raise PlanError(
                    f"{name}: {given[name].dtype} codes without a scale; {scale} is not in the state dict"
                )
            if beside and not coded:
                raise PlanError(
                    f"{beside[0]}: a scale beside {given[name].dtype}; MXFP8 codes are float8_e4m3fn"
                )
            if coded and key.algo not in (None, "MXFP8"):
                raise PlanError(f"{name}: declared {key.algo}; this adapter decodes MXFP8 alone")
            if coded:
                with _named(name):
                    shards.require_pair(given[name], given[beside[0]])
            found.append(_Part(key, name, beside[0] if beside else None))
        loose = scales - {p.scale for p in found}
        if loose:
            raise PlanError(f"{_some(sorted(loose))}: scales of no weight in the state dict")
        return found

    def _key(self, name: str) -> Key:
        key = self._keys.hub.get(name)
        if key is None:
            raise PlanError(self._keys.unknown(name))
        return key

    def _complete(self, native: str, found: list[_Part], wanted: range) -> None:
        if found[0].key.stack is None:
            return
        have = {id(p.key) for p in found}
        missing = [
            k.hub for k in self._keys.native[native] if k.expert in wanted and id(k) not in have
        ]
        if missing:
            total = len(wanted) * len(found[0].key.stack.hub)
            hint = (
                "; experts that are spread over ranks need device_mesh="
                if len(wanted) == self._keys.experts
                else ""
            )
            lack = f"{len(missing)} of its {total} parts are not in the state dict"
            raise PlanError(f"{native}: {lack}: {_some(missing)}{hint}")

    def _take(self, given: StateDict, part: _Part) -> torch.Tensor:
        """Remove a weight and its scale from the state dict and return its values."""
        weight = given.pop(part.weight)
        if part.scale is None:
            return weight
        with _named(part.weight):
            return shards.dequantize_mxfp8(weight, given.pop(part.scale), dtype=self.dtype)

    def _stack(
        self,
        given: StateDict,
        native: str,
        stack: Stack,
        found: list[_Part],
        wanted: range,
        mesh: DeviceMesh | None,
    ) -> torch.Tensor:
        """Remove the parts of one stack from the state dict and return it."""
        found.sort(key=lambda p: (p.key.expert, p.key.piece))
        first = part = self._take(given, found[0])
        matrix = shards.local(first)
        if matrix.ndim != 2:
            raise EncodeError(
                f"{found[0].weight}: shape {list(matrix.shape)}; a stack is made of [out, in]"
            )
        stacked = shards.whole(stack, matrix, len(wanted))
        kept = stacked is not None and all(
            shards.same_memory(
                given[p.weight], stacked, stack, p.key.expert - wanted.start, p.key.piece
            )
            for p in found[1:]
        )
        if stacked is None or not kept:
            stacked = shards.allocate(stack, len(wanted), matrix)
        for i, each in enumerate(found):
            part = first if i == 0 else self._take(given, each)
            if not kept:
                self._fits(part, first, each.weight, found[0].weight)
                shards.view(stacked, stack, each.key.expert - wanted.start, each.key.piece).copy_(
                    shards.local(part)
                )
        return shards.join(stacked, stack, first, mesh, self._keys.experts, native)

    @staticmethod
    def _fits(part: torch.Tensor, first: torch.Tensor, name: str, first_name: str) -> None:
        for what in ("shape", "dtype", "device_mesh", "placements"):
            a, b = getattr(part, what, None), getattr(first, what, None)
            if a != b:
                raise EncodeError(
                    f"{name}: {what} {_plain(a)} beside {_plain(b)} of {first_name}; one stack holds both"
                )

    # --- to the hub

    def to_hf(
        self,
        state_dict: Mapping[str, torch.Tensor],
        exclude_key_regex: str | None = None,
        quantization: bool = False,
        **_: Any,
    ) -> StateDict:
        """Return the hub state dict of a native one; see `convert_single_tensor_to_hf`."""
        result: StateDict = {}
        for name, tensor in state_dict.items():
            for hub, value in self.convert_single_tensor_to_hf(
                name, tensor, exclude_key_regex=exclude_key_regex, quantization=quantization
            ):
                result[hub] = value
        return result

    def convert_single_tensor_to_hf(
        self,
        fqn: str,
        tensor: torch.Tensor,
        *,
        exclude_key_regex: str | None = None,
        quantization: bool = False,
        **_: Any,
    ) -> list[tuple[str, torch.Tensor]]:
        """Return the hub tensors of one native tensor, in the order of experts.

        Args:
            fqn: its native name.
            tensor: whole, or a DTensor; of a stack that is sharded over experts, this rank's come
                out.
            exclude_key_regex: names, native or hub, that it matches from their start are left out.
            quantization: what a load of the quantized checkpoint asks for: each weight that it
                keeps in MXFP8 as float8_e4m3fn (the values under a scale of 1, rounded and clamped;
                a load overwrites them) and the placeholder of `create_mxfp8_scale_inv`. Not a way
                to quantize. Without it parts of a stack are views.

        Raises:
            PlanError: a name that is none of the table's, a stack that does not split,
                ``quantization`` where the config declares no MXFP8, or another format for this
                tensor.
        """
        excluded = _matcher(exclude_key_regex)
        if excluded(fqn):
            return []
        found = self._keys.native.get(fqn)
        if found is None:
            raise PlanError(
                f"{fqn}: no native tensor of this family under this config; exclude_key_regex= leaves it out"
            )
        if quantization:
            self._declared()
        stack = found[0].stack
        if stack is None:
            pairs = [(found[0], tensor)]
        else:
            at = {(k.expert, k.piece): k for k in found}
            pairs = [
                (at[e, p], part)
                for e, p, part in shards.cut(tensor, stack, self._keys.experts, fqn)
            ]
        result: list[tuple[str, torch.Tensor]] = []
        for key, value in pairs:
            if excluded(key.hub):
                continue
            if not quantization or key.algo is None:
                result.append((key.hub, value))
                continue
            if key.algo != "MXFP8":
                raise PlanError(f"{key.hub}: declared {key.algo}; this adapter loads MXFP8 alone")
            result.append((key.hub, shards.codes(value)))
            if not excluded(key.scale_name):
                result.append((key.scale_name, shards.create_mxfp8_scale_inv(value)))
        return result

    def _declared(self) -> None:
        declared = self._keys.declaration
        if declared is not None and not declared.modelopt:
            method = declared.method or "of no known method"
            raise PlanError(f"quantization=True, and quantization_config is {method}: not MXFP8")
        if not self._any:
            raise PlanError("quantization=True, and the config declares no quantized weight")


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Put a tensor's name before what is wrong with it."""
    try:
        yield
    except EncodeError as error:
        raise EncodeError(f"{name}: {error}") from error


def _matcher(pattern: str | None) -> Callable[[str], object]:
    if pattern is None:
        return lambda _name: False
    try:
        return re.compile(pattern).match
    except re.error as error:
        raise PlanError(
            f"exclude_key_regex {pattern!r} is no regular expression: {error}"
        ) from error


def _some(names: list[str]) -> str:
    rest = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def _plain(value: Any) -> str:
    return str(list(value)) if isinstance(value, torch.Size) else str(value)
