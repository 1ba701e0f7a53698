"""Weights that a batched product repeats: one member's matrix for each input, as broadcasting and ``vmap`` make them.

``x[:, None, None, :] @ W`` with W of (members, in, out) multiplies inputs x members matrices, of which only those of
different members are different.
"""

from __future__ import annotations

import torch
from torch import Tensor

from relu_doctor.observe.graph.edges import Edge, children_of, edge_shape, is_leaf

_RESHAPES = {"ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "UnsqueezeBackward0", "SqueezeBackward1"}
_KEEP = {"CloneBackward0", "AliasBackward0", "ToCopyBackward0"}


def members_of(operand: Edge) -> tuple[Tensor, Edge] | None:
    """Which matrix each one of a batch of matrices is.

    Args:
        operand: (matrices, rows, columns).

    Returns:
        int64 (matrices,): the member that each is, and the edge of the members' matrices, whose last two axes are the
        operand's; ``None`` where none is repeated.
    """
    index = torch.arange(edge_shape(operand)[0])
    matrix = edge_shape(operand)[-2:]
    edge, found = operand, None
    while not is_leaf(edge[0]):
        name, child = edge[0].name(), children_of(edge[0])[0]
        if child is None:
            break
        shape, inner = edge_shape(edge), edge_shape(child)
        if name in {"ExpandBackward0", "RepeatBackward0"} and inner[-2:] == matrix == shape[-2:]:
            lead = (1,) * (len(shape) - len(inner)) + tuple(inner[:-2])
            index = _folded(index, tuple(shape[:-2]), lead)
            found = index, child
        elif not (name in _KEEP or (name in _RESHAPES and inner[-2:] == matrix)):
            break
        edge = child
    return found if found is not None and len(found[0].unique()) < len(index) else None


def _folded(index: Tensor, outer: tuple[int, ...], inner: tuple[int, ...]) -> Tensor:
    """A place in the outer axes as a place in the inner ones, which are repeated along them."""
    folded, stride, rest = torch.zeros_like(index), 1, index
    for size, own in zip(reversed(outer), reversed(inner), strict=True):
        folded += (rest % size) % own * stride
        stride *= own
        rest = rest // size
    return folded


def joined(rows: Tensor, members: Tensor) -> Tensor:
    """Values by matrix as values by member.

    Args:
        rows: (matrices, rest).
        members: int64 (matrices,): the member that each matrix is, each as often.

    Returns:
        (members, rest of each of its matrices).
    """
    order = members.to(rows.device).argsort(stable=True)
    return rows[order].reshape(int(members.max()) + 1, -1, *rows.shape[1:])
