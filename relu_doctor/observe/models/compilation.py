"""Compiled models: which module is compiled, and how its calls are seen from outside of the compiled graph."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn


def is_compiled(module: nn.Module) -> bool:
    """Whether a module is what ``torch.compile`` returned, or was compiled in place (``Module.compile``)."""
    return isinstance(module, _wrapper_class()) or vars(module).get("_compiled_call_impl") is not None


def compiled_around(model: nn.Module) -> nn.Module | None:
    """What compiled code calls a model: itself, where it was compiled in place, or a wrapper that holds it.

    Wrappers are looked for among all objects of the process, which takes some tenths of a second.
    """
    if is_compiled(model):
        return model
    kind = _wrapper_class()
    wrappers = [] if kind == () else [each for each in gc.get_objects() if type(each) is kind]
    return next((wrapper for wrapper in wrappers if wrapper._orig_mod is model), None)


def compiled_calls(
    module: nn.Module, before: Callable[[nn.Module, tuple[Any, ...], Mapping[str, Any]], None]
) -> Callable[[], None]:
    """See the calls of a module that was compiled in place: its hooks would be compiled with it.

    Args:
        module: that was compiled in place.
        before: called before each call, with its arguments.

    Returns:
        Takes it away again.
    """
    attributes = vars(module)
    compiled = attributes["_compiled_call_impl"]

    def call(*args: Any, **kwargs: Any) -> Any:
        before(module, args, kwargs)
        return compiled(*args, **kwargs)

    attributes["_compiled_call_impl"] = call

    def put_back() -> None:
        if attributes.get("_compiled_call_impl") is call:
            attributes["_compiled_call_impl"] = compiled

    return put_back


def _wrapper_class() -> Any:
    """The class of what ``torch.compile`` returns; no class where nothing was compiled."""
    return getattr(sys.modules.get("torch._dynamo.eval_frame"), "OptimizedModule", ())
