"""tap: a mark that a model's author sets inside a forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

Post = TypeVar("Post", bound=Tensor)


def tap(name: str, pre: Tensor, post: Post, *, fires: Callable[[Tensor, Tensor], Tensor] | None = None) -> Post:
    """Mark a place inside a forward where an activation function of your own is applied.

    A scan lists it as a site under this name. Outside a scan this does nothing.

    Args:
        name: of the site.
        pre: the pre-activation, of any shape.
        post: the output, of the same shape; returned as it is.
        fires: tells where it fires, from ``(pre, post)``, as a boolean tensor of their shape; by default where the
            output is not zero.

    Returns:
        ``post`` itself.

    >>> import torch, relu_doctor
    >>> class Net(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.layer = torch.nn.Linear(4, 3)
    ...     def forward(self, x):
    ...         z = self.layer(x)
    ...         return relu_doctor.tap("gate", z, (z + z.abs()) / 2)
    >>> relu_doctor.scan(Net(), torch.randn(2000, 4)).sites["site"].tolist()
    ['gate']
    """
    if has_torch_function((pre, post)):
        marked: Callable[..., Any] = tap
        seen: Post = handle_torch_function(marked, (pre, post), name, pre, post, fires=fires)
        return seen
    return post
