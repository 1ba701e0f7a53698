"""Hooks of ours on a model, which stay behind when it is copied or pickled in the middle of a training run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Hook:
    """Calls what watches a model; a copy of the model has in its place a hook that does nothing.

    Args:
        call: the hook.
    """

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call it."""
        return self._call(*args, **kwargs)

    def __deepcopy__(self, memo: object) -> Callable[..., None]:
        return nothing

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        return _make_nothing, ()


def nothing(*args: object, **kwargs: object) -> None:
    """A hook that does nothing."""


def _make_nothing() -> Callable[..., None]:
    return nothing
