# SPDX-License-Identifier: Apache-2.0
"""Whole or sharded tensors: decode a shard, cut a native stack into hub weights, and join it again.

The offset of a DTensor's shard is the one that distributed checkpointing reads it from
(``DTensor.__create_chunk_list__``), so that values and scales always belong together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from exporter import codecs
from exporter.adapters.tables import NativeStack
from exporter.codecs.constants import E4M3_MAX, E8M0_BIAS, MX_BLOCK
from verifier.errors import EncodeError, PlanError
from verifier.text import counted

CODES = (torch.float8_e4m3fn, torch.uint8)
_TARGETS = (torch.float32, torch.bfloat16, torch.float16)


def create_mxfp8_scale_inv(weight: torch.Tensor) -> torch.Tensor:
    """Return a placeholder for the scales of a weight [out, in], for a load to write into.

    Returns:
        uint8 [out, ceil(in/32)] of 127 (2^0), of the weight's global shape and never a DTensor, on
        its local device.

    Raises:
        EncodeError: fewer than two dimensions.
    """
    if weight.ndim < 2:
        raise EncodeError(
            f"mxfp8: a weight of shape {list(weight.shape)}; it needs at least [out, in]"
        )
    shape = (*weight.shape[:-1], -(-weight.shape[-1] // MX_BLOCK))
    return torch.full(shape, E8M0_BIAS, dtype=torch.uint8, device=local(weight).device)


def dequantize_mxfp8(
    weight: torch.Tensor, scale_inv: torch.Tensor, *, dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    """Return the values of an MXFP8 weight.

    The local shard of a DTensor is decoded with its slice of the scale.

    Args:
        weight: float8_e4m3fn [out, in] or its bytes as uint8; a DTensor in any sharding, also
            across blocks.
        scale_inv: E8M0 bytes, uint8 or float8_e8m0fnu [out, ceil(in/32)]: whole, or a DTensor whose
            local shard covers the weight's. The last block may be short.
        dtype: of the result: float32, bfloat16 or float16.

    Returns:
        The values, a DTensor with the weight's mesh and placements where the weight is one.

    Raises:
        EncodeError: shapes or dtypes that do not fit, NaN or infinity among the values, a scale
            that does not cover the weight.
    """
    if dtype not in _TARGETS:
        raise EncodeError(f"mxfp8: dtype is {dtype}; use float32, bfloat16 or float16")
    require_pair(weight, scale_inv)
    code = local(weight)
    (row, column), (rows, columns) = _window(weight)
    first, last = column // MX_BLOCK, -(-(column + columns) // MX_BLOCK)
    scale = _scale_slice(scale_inv, (row, row + rows), (first, last))
    values = _decode(code, scale, column % MX_BLOCK, dtype)
    if not values.is_meta and not bool(torch.isfinite(values).all()):
        raise EncodeError(f"mxfp8: the decoded values hold NaN or infinity in {dtype}")
    return like(weight, values)


def require_pair(weight: torch.Tensor, scale: torch.Tensor) -> None:
    """Check that a weight and a scale make one MXFP8 tensor.

    Raises:
        EncodeError: shapes or dtypes that do not fit.
    """
    if weight.ndim != 2 or tuple(scale.shape) != (weight.shape[0], -(-weight.shape[1] // MX_BLOCK)):
        raise EncodeError(
            f"mxfp8: a weight of shape {list(weight.shape)} and a scale of shape "
            f"{list(scale.shape)}; expected [out, in] and [out, ceil(in/32)]"
        )
    if weight.dtype not in CODES or scale.dtype not in (torch.uint8, torch.float8_e8m0fnu):
        raise EncodeError(
            f"mxfp8: a weight of {weight.dtype} and a scale of {scale.dtype}; expected "
            "float8_e4m3fn, and uint8 or float8_e8m0fnu"
        )


def _decode(code: torch.Tensor, scale: torch.Tensor, skip: int, dtype: torch.dtype) -> torch.Tensor:
    """Decode values whose first column is number ``skip`` of its block."""
    if not code.numel():
        return torch.empty(code.shape, dtype=dtype, device=code.device)
    scale = scale.to(code.device)
    head = min(MX_BLOCK - skip, code.shape[1]) if skip else 0
    parts = [(code, scale)]
    if head:
        parts = [(code[:, :head], scale[:, :1]), (code[:, head:], scale[:, 1:])]
    decoded = [
        codecs.decode({"weight": c, "weight_scale": s}, "mxfp8", dtype=dtype)
        for c, s in parts
        if c.shape[1]
    ]
    return decoded[0] if len(decoded) == 1 else torch.cat(decoded, 1)


def _scale_slice(
    scale: torch.Tensor, row_range: tuple[int, int], block_range: tuple[int, int]
) -> torch.Tensor:
    """Return rows and blocks of a scale, by their global numbers; it may itself be a shard."""
    (top, bottom), (first, last) = row_range, block_range
    (row, block), (rows, blocks) = _window(scale)
    inside = row <= top and bottom <= row + rows and block <= first and last <= block + blocks
    if top < bottom and first < last and not inside:
        raise EncodeError(
            f"mxfp8: the local scale holds rows {row} to {row + rows} and blocks {block} to "
            f"{block + blocks}; the weight's shard needs rows {top} to {bottom} and blocks {first} "
            f"to {last}: load the whole scale"
        )
    return local(scale)[top - row : bottom - row, first - block : last - block]


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return a DTensor's local shard, or the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(tensor: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return ``values``, as the local shard of a DTensor where ``tensor`` is one."""
    if not isinstance(tensor, DTensor):
        return values
    return wrap(values, tensor.device_mesh, tensor.placements, tuple(tensor.shape))


def wrap(
    values: torch.Tensor, mesh: DeviceMesh, placements: Sequence[Placement], shape: tuple[int, ...]
) -> DTensor:
    """Return a DTensor of a global shape from this rank's shard, without communication."""
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * max(1, size))
    return DTensor.from_local(
        values,
        mesh,
        list(placements),
        run_check=False,
        shape=torch.Size(shape),
        stride=tuple(strides),
    )


def _window(tensor: torch.Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return offset and size of this rank's part of the global tensor."""
    if not isinstance(tensor, DTensor):
        return (0,) * tensor.ndim, tuple(tensor.shape)
    chunks = tensor.__create_chunk_list__()  # type: ignore[no-untyped-call]
    if len(chunks) != 1:
        raise EncodeError(f"a DTensor has {len(chunks)} chunks on one rank; expected 1")
    return tuple(chunks[0].offsets), tuple(chunks[0].sizes)


# --- stacks


@dataclass(frozen=True, slots=True)
class PartSharding:
    """How the parts of a stack are sharded: the mesh of one part (None: whole), and placements in
    hub dimensions.
    """

    mesh: DeviceMesh | None
    placements: tuple[Placement, ...]


def view(stacked: torch.Tensor, stack: NativeStack, expert: int, index: int) -> torch.Tensor:
    """Return the part [out, in] of a local stack that is projection ``index`` of one expert."""
    matrix = stacked[expert].t() if stack.transpose else stacked[expert]
    out = matrix.shape[0] // len(stack.hub)
    return matrix[index * out : (index + 1) * out]


def allocate(stack: NativeStack, experts: int, part: torch.Tensor) -> torch.Tensor:
    """Return an empty local stack for parts like ``part`` [out, in]."""
    out, in_ = part.shape[0] * len(stack.hub), part.shape[1]
    shape = (experts, in_, out) if stack.transpose else (experts, out, in_)
    return torch.empty(shape, dtype=part.dtype, device=part.device)


def cut(
    tensor: torch.Tensor, stack: NativeStack, experts: int, name: str
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Yield (expert, projection, view [out, in]) of a native stack; of a DTensor, this rank's share
    of each.

    Raises:
        PlanError: a wrong number of experts, an output dimension that the projections do not
            divide, a sharding across the projections.
    """
    count, joint = len(stack.hub), 2 if stack.transpose else 1
    if tensor.ndim != 3 or tensor.shape[0] != experts:
        raise PlanError(
            f"{name}: shape {list(tensor.shape)}; expected 3 dimensions, the first {experts} "
            "experts"
        )
    if tensor.shape[joint] % count:
        raise PlanError(
            f"{name}: shape {list(tensor.shape)}: dimension {joint} does not split into {count} "
            "equal parts"
        )
    stacked = local(tensor)
    sharding, first = PartSharding(None, ()), 0
    if isinstance(tensor, DTensor):
        sharding, first = _part_sharding(tensor, stack, name)
    shape = (tensor.shape[joint] // count, tensor.shape[3 - joint])
    for i in range(stacked.shape[0]):
        for index in range(count):
            part = view(stacked, stack, i, index)
            if sharding.mesh is not None:
                part = wrap(part, sharding.mesh, sharding.placements, shape)
            yield first + i, index, part


def _part_sharding(tensor: DTensor, stack: NativeStack, name: str) -> tuple[PartSharding, int]:
    """Return the sharding of a stack's parts, and the number of this rank's first expert."""
    mesh, keep, placements = tensor.device_mesh, [], []
    for i, placement in enumerate(tensor.placements):
        if type(placement) is Shard and placement.dim == 0:
            continue
        keep.append(i)
        placements.append(_moved(placement, stack, True, mesh.size(i), name))
    (first, *_), _ = _window(tensor)
    if not keep:
        return PartSharding(None, ()), first
    if len(keep) == mesh.ndim:
        return PartSharding(mesh, tuple(placements)), first
    names = mesh.mesh_dim_names
    if names is None:
        raise PlanError(
            f"{name}: sharded on a mesh of {mesh.ndim} dimensions without names; set mesh_dim_names"
        )
    return PartSharding(mesh[tuple(names[i] for i in keep)], tuple(placements)), first


def _moved(
    placement: Placement, stack: NativeStack, to_hub: bool, ranks: int, name: str
) -> Placement:
    """Return a placement in the dimensions of a part [out, in], or of the stack.

    Raises:
        PlanError: neither replicated nor a plain shard, or sharded over several ranks along the
            dimension that joins projections.
    """
    if isinstance(placement, Replicate):
        return placement
    if type(placement) is not Shard:
        raise PlanError(
            f"{name}: its placement is {placement}; only Shard and Replicate are supported"
        )
    to = 2 - placement.dim if stack.transpose else placement.dim + (-1 if to_hub else 1)
    if (to if to_hub else placement.dim) == 0 and len(stack.hub) > 1 and ranks > 1:
        raise PlanError(
            f"{name}: sharded along the output dimension, which joins {len(stack.hub)} "
            "projections: no shard holds a part of each; shard the input dimension or the experts"
        )
    return Shard(to)


def expert_range(mesh: DeviceMesh | None, experts: int) -> range:
    """Return the experts of this rank under expert parallelism: ``Shard(0)`` of the mesh's ``ep``
    (or only) dimension.

    Raises:
        PlanError: a mesh of several dimensions, none of them ``ep``; a rank without experts.
    """
    if mesh is None:
        return range(experts)
    dim = _ep_dim(mesh)
    each = -(-experts // mesh.size(dim))
    first = min(mesh.get_local_rank(dim) * each, experts)
    own = range(first, min(first + each, experts))
    if not own:
        raise PlanError(
            f"{counted(experts, 'expert')} over {counted(mesh.size(dim), 'rank')} leave none for "
            f"rank {mesh.get_local_rank(dim)}"
        )
    return own


def _ep_dim(mesh: DeviceMesh) -> int:
    if mesh.mesh_dim_names is not None and "ep" in mesh.mesh_dim_names:
        return mesh.mesh_dim_names.index("ep")
    if mesh.ndim == 1:
        return 0
    raise PlanError(
        f"a mesh of {mesh.ndim} dimensions without one named ep: the dimension that shards the "
        "experts is unknown"
    )


def join(
    stacked: torch.Tensor,
    stack: NativeStack,
    part: torch.Tensor,
    mesh: DeviceMesh | None,
    experts: int,
    name: str,
) -> torch.Tensor:
    """Return a filled local stack as the framework's parameter: a DTensor where its parts or the
    experts are sharded.

    Args:
        stacked: the local stack.
        stack: its rule.
        part: one of its parts, whole or a DTensor.
        mesh: the mesh that shards the experts, or None.
        experts: their number on all ranks.
        name: for messages.

    Raises:
        PlanError: a sharding that the parts do not allow.
    """
    own = part.device_mesh if isinstance(part, DTensor) else None
    moved: list[Placement] = []
    if own is not None and isinstance(part, DTensor):
        moved = [_moved(p, stack, False, own.size(i), name) for i, p in enumerate(part.placements)]
    out, in_ = part.shape[0] * len(stack.hub), part.shape[1]
    shape = (experts, in_, out) if stack.transpose else (experts, out, in_)
    if mesh is None:
        return stacked if own is None else wrap(stacked, own, moved, shape)
    placements: list[Placement] = [Replicate() for _ in range(mesh.ndim)]
    placements[_ep_dim(mesh)] = Shard(0)
    if own is not None:
        names, all_names = own.mesh_dim_names or (), mesh.mesh_dim_names or ()
        others = {n for i, n in enumerate(all_names) if i != _ep_dim(mesh)}
        if len(names) != own.ndim or not set(names) <= others:
            raise PlanError(
                f"{name}: its parts are on the mesh dimensions "
                f"{', '.join(names) or 'without names'}; "
                f"expected {', '.join(sorted(others)) or 'none'} of device_mesh"
            )
        for dim, placement in zip(names, moved, strict=True):
            placements[all_names.index(dim)] = placement
    return wrap(stacked, mesh, placements, shape)


def codes(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor as contiguous float8_e4m3fn with a scale of 1; a DTensor stays one."""
    values = local(tensor)
    clamped = values if values.is_meta else values.clamp(-E4M3_MAX, E4M3_MAX)
    return like(tensor, clamped.to(torch.float8_e4m3fn, memory_format=torch.contiguous_format))


def whole(stack: NativeStack, part: torch.Tensor, experts: int) -> torch.Tensor | None:
    """Return the local stack that ``part`` is the first view of, or None where its memory cannot be
    such a stack.
    """
    out, in_ = part.shape[0] * len(stack.hub), part.shape[1]
    shape = (experts, in_, out) if stack.transpose else (experts, out, in_)
    strides = (in_ * out, shape[2], 1)
    end = (part.storage_offset() + experts * in_ * out) * part.element_size()
    if part.is_meta or end > part.untyped_storage().nbytes():
        return None
    stacked = part.as_strided(shape, strides)
    return stacked if same_memory(part, stacked, stack, 0, 0) else None


def same_memory(
    part: torch.Tensor, stacked: torch.Tensor, stack: NativeStack, expert: int, index: int
) -> bool:
    """Whether a part already is the memory that it would be copied to."""
    source, target = local(part), view(stacked, stack, expert, index)
    return (
        source.shape == target.shape
        and source.dtype == target.dtype
        and source.stride() == target.stride()
        and source.untyped_storage().data_ptr() == target.untyped_storage().data_ptr()
        and source.storage_offset() == target.storage_offset()
    )
