# SPDX-License-Identifier: Apache-2.0
"""State dicts between the hub's layout and a training framework's; MXFP8 is decoded on load."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from exporter.adapters import keys, shards
from exporter.adapters.keys import SCALES, Key, StackPart
from exporter.adapters.tables import NativeStack, Table
from verifier.errors import EncodeError, PlanError
from verifier.schemes import SCALE_LEAVES

StateDict = dict[str, torch.Tensor]
LISTED = 5


@dataclass(frozen=True, slots=True)
class _HubWeight:
    """One weight of a hub state dict, by the names it has there."""

    key: Key
    weight: str
    scale: str | None

    @property
    def part(self) -> StackPart:
        """The part of a stack that it is."""
        if self.key.part is None:
            raise ValueError(f"{self.weight} is not part of a stack")
        return self.key.part


class StateDictAdapter:
    """Converts one checkpoint's state dicts; every method works on whole tensors and on DTensors.

    ``from_hf`` and ``to_hf`` follow the interface of NeMo AutoModel's adapters. A `Table` holds the
    framework's names for a family, `verifier.layouts.family` the tensors of the family, and the
    config's declaration what is quantized; another family is another table. Further keyword
    arguments that frameworks pass are ignored.
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
            dtype: that MXFP8 weights are decoded to: float32, bfloat16 or float16. Other tensors
                keep theirs.
            names: the tensors of the checkpoint (the ``weight_map`` of its index), where they are
                known: then they, not the declaration, decide what is quantized, and which spelling
                of a name `to_hf` writes.

        Raises:
            PlanError: no table for the model type, a name that no rule or two rules match.
        """
        self.config, self.dtype = config, dtype
        self._keys = keys.build(config, table, names)
        self._any_quantized = any(k.algo for k in self._keys.hub.values())

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
        """Return the native state dict of a hub state dict, which is emptied in the process.

        Every name is checked before the first tensor is removed; an error up to there leaves the
        dict unchanged. Then one native tensor is made at a time and its sources are dropped, so
        that memory holds input, result and at most one stack of experts more. Parts that are still
        views of their native stack (from `to_hf`) give that stack back without a copy.

        Args:
            hf_state_dict: hub name to tensor: the whole checkpoint or any set of whole layers or
                tensors of it.
            device_mesh: where experts are sharded over ranks: a mesh with a dimension ``ep``, or of
                one dimension. Experts of other ranks are dropped; stacks become DTensors,
                ``Shard(0)`` on that dimension.
            exclude_key_regex: hub names that it matches from their start are dropped.

        Raises:
            PlanError: a name that the family does not have, a scale without its weight, an FP8
                weight without its scale, a stack without all of its experts, one tensor under two
                names, a sharding that a stack cannot have.
            EncodeError: parts that do not fit one another, NaN or infinity after decoding.
        """
        excluded = _matcher(exclude_key_regex)
        dropped = [n for n in hf_state_dict if excluded(n)]
        weights = self._weights(hf_state_dict, frozenset(dropped))
        experts = range(0)
        if self._keys.experts:
            experts = shards.expert_range(device_mesh, self._keys.experts)
        by_native: dict[str, list[_HubWeight]] = {}
        for weight in weights:
            part = weight.key.part
            if part is None or part.expert in experts:
                by_native.setdefault(weight.key.native, []).append(weight)
            else:
                dropped += [n for n in (weight.weight, weight.scale) if n is not None]
        for native, own in by_native.items():
            self._require_complete(native, own, experts)
        for name in dropped:
            del hf_state_dict[name]
        result: StateDict = {}
        for native, own in by_native.items():
            if own[0].key.part is None:
                result[native] = self._take(hf_state_dict, own[0])
            else:
                stacked, first = self._stack(hf_state_dict, own, experts)
                stack = own[0].part.stack
                result[native] = shards.join(
                    stacked, stack, first, device_mesh, self._keys.experts, native
                )
        return result

    def _weights(self, state: StateDict, dropped: frozenset[str]) -> list[_HubWeight]:
        """Return the weights of a hub state dict with their scales, every name accounted for.

        Raises:
            PlanError: names that do not fit the family or one another.
        """
        weights: list[_HubWeight] = []
        names: dict[int, str] = {}
        scales: set[str] = set()
        for name in state:
            if name in dropped:
                continue
            head, _, leaf = name.rpartition(".")
            if leaf in SCALES:
                if f"{head}.weight" not in state or f"{head}.weight" in dropped:
                    raise PlanError(f"{name}: a scale, and {head}.weight is not in the state dict")
                scales.add(name)
                continue
            if leaf in SCALE_LEAVES:
                raise PlanError(f"{name}: not a tensor of MXFP8, which this adapter decodes")
            key = self._key(name)
            other = names.setdefault(id(key), name)
            if other != name:
                raise PlanError(f"{name} and {other} are two names of one tensor, {key.native}")
            weights.append(_HubWeight(key, name, self._scale_of(name, key, state, dropped)))
        unused = scales - {w.scale for w in weights}
        if unused:
            raise PlanError(f"{_listed(sorted(unused))}: scales without a weight in the state dict")
        return weights

    @staticmethod
    def _scale_of(name: str, key: Key, state: StateDict, dropped: frozenset[str]) -> str | None:
        """Return the scale of a weight, None for an unquantized one.

        Raises:
            PlanError: two scales, a scale that is missing or not expected, a format other than
                MXFP8.
        """
        head = name.removesuffix("weight")
        scales = [head + leaf for leaf in SCALES if head + leaf in state]
        scales = [scale for scale in scales if scale not in dropped]
        if len(scales) > 1:
            raise PlanError(f"{name}: two scales, {' and '.join(scales)}")
        dtype = state[name].dtype
        if dtype not in shards.CODES:
            if scales:
                raise PlanError(
                    f"{scales[0]}: a scale of a {dtype} weight; MXFP8 weights are float8_e4m3fn"
                )
            return None
        if not scales:
            raise PlanError(
                f"{name}: {dtype} without a scale; {head}{key.scale} is not in the state dict"
            )
        if key.algo not in (None, "MXFP8"):
            raise PlanError(f"{name}: declared {key.algo}; this adapter decodes MXFP8 only")
        with _named(name):
            shards.require_pair(state[name], state[scales[0]])
        return scales[0]

    def _key(self, name: str) -> Key:
        key = self._keys.hub.get(name)
        if key is None:
            raise PlanError(self._keys.unknown(name))
        return key

    def _require_complete(self, native: str, weights: list[_HubWeight], experts: range) -> None:
        """Check that a stack has all parts of this rank's experts.

        Raises:
            PlanError: naming the missing parts.
        """
        if weights[0].key.part is None:
            return
        present = {id(w.key) for w in weights}
        missing = [
            key.hub
            for key in self._keys.native[native]
            if key.part is not None and key.part.expert in experts and id(key) not in present
        ]
        if missing:
            total = len(experts) * len(weights[0].part.stack.hub)
            hint = ""
            if len(experts) == self._keys.experts:
                hint = "; experts that are sharded over ranks need device_mesh="
            raise PlanError(
                f"{native}: {len(missing)} of its {total} parts are not in the state dict: "
                f"{_listed(missing)}{hint}"
            )

    def _take(self, state: StateDict, weight: _HubWeight) -> torch.Tensor:
        """Remove a weight and its scale from the state dict and return its values."""
        value = state.pop(weight.weight)
        if weight.scale is None:
            return value
        with _named(weight.weight):
            return shards.dequantize_mxfp8(value, state.pop(weight.scale), dtype=self.dtype)

    def _stack(
        self, state: StateDict, weights: list[_HubWeight], experts: range
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Remove the parts of one stack from the state dict; return the local stack and its first
        part.
        """
        weights.sort(key=lambda w: w.key.order)
        stack = weights[0].part.stack
        first = self._take(state, weights[0])
        matrix = shards.local(first)
        if matrix.ndim != 2:
            raise EncodeError(
                f"{weights[0].weight}: shape {list(matrix.shape)}; parts of a stack are [out, in]"
            )
        views = self._original_stack(state, matrix, weights, experts)
        if views is not None:
            for weight in weights[1:]:
                self._take(state, weight)
            return views, first
        stacked = shards.allocate(stack, len(experts), matrix)
        for i, weight in enumerate(weights):
            value = first if i == 0 else self._take(state, weight)
            self._require_same(value, first, weight.weight, weights[0].weight)
            part = weight.part
            target = shards.view(stacked, stack, part.expert - experts.start, part.index)
            target.copy_(shards.local(value))
        return stacked, first

    @staticmethod
    def _original_stack(
        state: StateDict, matrix: torch.Tensor, weights: list[_HubWeight], experts: range
    ) -> torch.Tensor | None:
        """Return the native stack that all parts are views of, None where they are not."""
        stack: NativeStack = weights[0].part.stack
        stacked = shards.whole(stack, matrix, len(experts))
        if stacked is None:
            return None
        for weight in weights[1:]:
            expert, index = weight.part.expert - experts.start, weight.part.index
            if not shards.same_memory(state[weight.weight], stacked, stack, expert, index):
                return None
        return stacked

    @staticmethod
    def _require_same(value: torch.Tensor, first: torch.Tensor, name: str, first_name: str) -> None:
        """Check that two parts of a stack have the same shape, dtype and sharding.

        Raises:
            EncodeError: naming both.
        """
        for attribute in ("shape", "dtype", "device_mesh", "placements"):
            a, b = getattr(value, attribute, None), getattr(first, attribute, None)
            if a != b:
                raise EncodeError(
                    f"{name}: {attribute} {_text(a)}, but {first_name} of the same stack has "
                    f"{_text(b)}"
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
            tensor: whole, or a DTensor; of a stack that is sharded over experts, this rank's
                experts are returned.
            exclude_key_regex: names, native or hub, that it matches from their start are left out.
            quantization: for loading the quantized checkpoint: each weight that it keeps in MXFP8
                as float8_e4m3fn (the values with a scale of 1, rounded and clamped; the load
                overwrites them) and the placeholder of `create_mxfp8_scale_inv`. Not a way to
                quantize. Without it parts of a stack are views.

        Raises:
            PlanError: a name that is not in the table, a stack that does not split,
                ``quantization`` where the config declares no MXFP8, or a different format for this
                tensor.
        """
        excluded = _matcher(exclude_key_regex)
        if excluded(fqn):
            return []
        own = self._keys.native.get(fqn)
        if own is None:
            raise PlanError(
                f"{fqn}: the family has no such native tensor under this config; "
                "exclude_key_regex= leaves it out"
            )
        if quantization:
            self._require_declared()
        result: list[tuple[str, torch.Tensor]] = []
        for key, value in self._hub_values(fqn, own, tensor):
            if excluded(key.hub):
                continue
            if not quantization or key.algo is None:
                result.append((key.hub, value))
                continue
            if key.algo != "MXFP8":
                raise PlanError(f"{key.hub}: declared {key.algo}; this adapter loads MXFP8 only")
            result.append((key.hub, shards.codes(value)))
            if not excluded(key.scale_name):
                result.append((key.scale_name, shards.create_mxfp8_scale_inv(value)))
        return result

    def _hub_values(
        self, native: str, own: tuple[Key, ...], tensor: torch.Tensor
    ) -> list[tuple[Key, torch.Tensor]]:
        """Return the keys of a native tensor with their values."""
        part = own[0].part
        if part is None:
            return [(own[0], tensor)]
        by_order = {key.order: key for key in own}
        cuts = shards.cut(tensor, part.stack, self._keys.experts, native)
        return [(by_order[expert, index], value) for expert, index, value in cuts]

    def _require_declared(self) -> None:
        declaration = self._keys.declaration
        if declaration is not None and not declaration.modelopt:
            method = declaration.method or "an unknown method"
            raise PlanError(f"quantization=True, but quantization_config is {method}, not MXFP8")
        if not self._any_quantized:
            raise PlanError("quantization=True, but the config declares no quantized weight")


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Prefix the message of an `EncodeError` with a tensor's name."""
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
            f"exclude_key_regex {pattern} is not a regular expression: {error}"
        ) from error


def _listed(names: list[str]) -> str:
    rest = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f" and {rest} more" if rest > 0 else "")


def _text(value: Any) -> str:
    return str(list(value)) if isinstance(value, torch.Size) else str(value)
