"""Rectifiers that were not recognised: a layer reads values of which many are zero, and nothing seen made them so.

However an activation is written, what it leaves shows: zeros, here in one unit and there in another. Zeros that have
another reason are told apart by where they stand (padding leaves whole positions empty, a pruned unit is zero
everywhere) and by what lies between the layers (joined inputs, dropout, rounding).
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.nn import functional as F

from relu_doctor.observe.graph.edges import Edge, children_of, is_leaf
from relu_doctor.observe.graph.operations import Operations
from relu_doctor.observe.inputs.feeding import tensors_in

_LAST, _SECOND = -1, 1
_LAYERS: dict[Callable[..., Any], int] = {  # functions with weights, and the axis of their data that counts features
    **dict.fromkeys((F.linear, torch.matmul, torch.mm, torch.bmm, torch.einsum), _LAST),
    **dict.fromkeys((Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.__matmul__, torch.addmm, torch.baddbmm), _LAST),
    **dict.fromkeys((torch.conv1d, torch.conv2d, torch.conv3d), _SECOND),
    **dict.fromkeys((torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d), _SECOND),
}
_MAKE_ZEROS = (  # nodes that do, and are no rectifiers
    "Cat", "Stack", "ConstantPad", "Dropout", "Round", "Floor", "Ceil", "Trunc", "FakeQuant", "Unpool", "Embedding",
    "Topk", "Sort", "Tril", "Triu", "Diag", "OneHot", "ToSparse",
)  # fmt: skip
_EXTREMES = ("Amax", "Amin", "Max", "Min")
DROPOUTS: frozenset[Callable[..., Any]] = frozenset(
    getattr(owner, name)
    for owner in (F, torch)
    for name in ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout")
    if hasattr(owner, name)
)
_ENOUGH = 0.1  # of the values are zero, and of the units in some places only
_EACH = 8  # places that are looked at along each axis
_MOST_NODES = 100  # between one layer and the next


def made_zero(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    """What a layer reads of which a good part is zero, here in one unit and there in another.

    Args:
        function: that is called.
        args: of the call.
        kwargs: of the call.
    """
    axis = _LAYERS.get(function)
    for tensor in tensors_in((args, kwargs)) if axis is not None else ():
        if axis is not None and tensor.dim() > 1 and _is_plain(tensor) and _has_zeros(tensor.detach(), axis):
            yield tensor


def _is_plain(tensor: Tensor) -> bool:
    if type(tensor) is not Tensor or tensor.layout is not torch.strided:
        return False
    return tensor.is_floating_point() and not tensor.is_meta and not tensor.is_nested


def _has_zeros(tensor: Tensor, axis: int) -> bool:
    rows = tensor.movedim(axis, -1)
    rows = rows[tuple(slice(None, None, -(-size // _EACH) or 1) for size in rows.shape[:-1])].flatten(0, -2)
    zero = rows == 0
    zero = zero[~zero.all(1)]  # padding
    if len(zero) < 2 or zero.shape[1] < 2:
        return False
    some = zero.any(0) & ~zero.all(0)
    return float(zero.float().mean()) >= _ENOUGH and float(some.float().mean()) >= _ENOUGH


def is_accounted_for(edge: Edge, operations: Operations, rectified: Container[Node]) -> bool:
    """Whether a rectifier that was seen lies before a layer's input, or something else that may have made it zero.

    Args:
        edge: the layer's input.
        operations: tells the layers before it.
        rectified: the outputs of the rectifiers that were seen.
    """
    seen: set[Edge] = set()
    stack, reached = [(edge, False)], False
    while stack:
        current, chosen = stack.pop()
        if current in seen:
            continue
        seen.add(current)
        node, name = current[0], current[0].name()
        if node in rectified or len(seen) > _MOST_NODES:
            return True
        if name.startswith(_MAKE_ZEROS) and not (chosen and name.startswith("Stack")):
            return True
        if is_leaf(node):
            continue
        source = operations.source(current)
        if source is not None and source.kind == "weight":
            reached = True
        else:
            chosen = name.startswith(_EXTREMES)  # the larger of a value and zero
            stack.extend((child, chosen) for child in children_of(node) if child is not None)
    return not reached
