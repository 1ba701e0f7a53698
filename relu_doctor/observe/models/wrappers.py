"""Wrappers around a model and inside it: what they wrap is what is watched, and they are left as they were.

DataParallel and DistributedDataParallel call the module that they hold; compiled code runs as the Python that it was
made from, since no hook or mode sees the inside of a compiled graph; a module whose forward was captured as a CUDA
graph runs its own forward; FSDP gathers its shards for each forward and is sharded again afterwards.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from relu_doctor.errors import UnsupportedModelError
from relu_doctor.observe.graph.sharding import is_spread
from relu_doctor.observe.models.encoder import unpacked
from relu_doctor.observe.models.keras_models import unbuilt
from relu_doctor.observe.models.scripted import module_at

_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def behind_wrappers(model: Any) -> nn.Module:
    """The module to watch: behind DataParallel, DistributedDataParallel and compile, the original one.

    Of an exported program it is the module that runs it.

    Raises:
        UnsupportedModelError: it cannot be watched: it is no module, it holds no values, a CUDA graph is captured.
    """
    exported: Any = getattr(sys.modules.get("torch.export"), "ExportedProgram", ())
    if isinstance(model, exported):
        return behind_wrappers(model.module())
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"expected a torch.nn.Module, found {type(model).__name__}.")
    if isinstance(getattr(model, "_orig_mod", None), nn.Module):
        return behind_wrappers(model._orig_mod)
    if isinstance(model, _PARALLEL):
        return behind_wrappers(model.module)
    if torch.cuda.is_available() and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise UnsupportedModelError(
            "a CUDA graph is being captured on this stream, where nothing can be read; scan before it or afterwards."
        )
    for path, module in model.named_modules():
        if any(cls.__name__ == "FullyShardedDataParallel" for cls in type(module).__mro__):
            raise UnsupportedModelError(
                f"{path or 'the model'} is a FullyShardedDataParallel, whose parameters lose their identity in flat "
                "tensors; shard the model with torch.distributed.fsdp.fully_shard, or scan it before it is wrapped."
            )
    _refuse_missing_values(model)
    return model


def _refuse_missing_values(model: nn.Module) -> None:
    name = unbuilt(model)
    if name:
        raise UnsupportedModelError(
            f"the Keras model {name} makes its parameters in its first call; run one batch through it before the scan."
        )
    tensors = [*model.named_parameters(), *model.named_buffers()]
    lazy = [name for name, tensor in tensors if torch.nn.parameter.is_lazy(tensor)]
    if lazy:
        raise UnsupportedModelError(
            f"{lazy[0]} is a lazy parameter without a shape; run one batch through the model before the scan."
        )
    empty = [name for name, tensor in tensors if tensor.is_meta and not _hooks_that_fetch(model, name)]
    if empty:
        others = f" ({len(empty)} of {len(tensors)} tensors do)" if len(empty) > 1 else ""
        raise UnsupportedModelError(
            f"{empty[0]} is on the meta device and holds no values{others}; load the weights first."
        )


def _hooks_that_fetch(model: nn.Module, name: str) -> list[tuple[nn.Module, Any]]:
    """The modules on the way to a tensor whose hooks (Accelerate's) fetch values for the length of a forward."""
    found: list[tuple[nn.Module, Any]] = []
    path = name.split(".")[:-1]
    for depth in range(len(path) + 1):
        module = module_at(model, ".".join(path[:depth]))
        hook = getattr(module, "_hf_hook", None)
        if any(getattr(each, "offload", False) for each in getattr(hook, "hooks", (hook,))):
            found.append((module, hook))
    return found


@contextmanager
def fetched(model: nn.Module, name: str, *, gathered: bool = False) -> Iterator[None]:
    """Have the values of an offloaded tensor in their place, as during a forward of its module.

    Args:
        model: the root.
        name: qualified name of a parameter or buffer.
        gathered: also gather the shards of FSDP, since something is computed of them; a matter for all processes.
    """
    hooks = _hooks_that_fetch(model, name)
    shards = []
    if gathered and _fsdp_module() != ():
        ends = [end for end, sign in enumerate(name) if sign == "."]
        on_the_way = [model, *(module_at(model, name[:end]) for end in ends)]
        shards = [module for module in on_the_way if isinstance(module, _fsdp_module())][-1:]
    try:
        for module, hook in hooks:
            hook.pre_forward(module)
        for module in shards:
            module.unshard()
        yield
    finally:
        for module in shards:
            module.reshard()
        for module, hook in reversed(hooks):
            hook.post_forward(module, None)


@contextmanager
def unwrapped(model: nn.Module) -> Iterator[None]:
    """Let every wrapper inside a model call what it wraps; attributes of modules are for the caller to restore."""
    with ExitStack() as stack:
        if "torch._dynamo" in sys.modules:  # else nothing was ever compiled
            stack.enter_context(_EAGER)
        stack.enter_context(_sharded_again(model))
        for module in model.modules():
            forward = vars(module).get("forward")
            if type(module) is nn.TransformerEncoder and forward is None:
                vars(module)["forward"] = unpacked(module)
            elif isinstance(module, _PARALLEL):
                vars(module)["forward"] = module.module.__call__  # neither replicas nor a reducer that awaits gradients
            elif getattr(forward, "__qualname__", "").startswith("make_graphed_callables."):
                del vars(module)["forward"]
        yield


class _Eager(AbstractContextManager[None]):
    """Compiled code runs eagerly in the whole process as long as anyone is within; torch knows one stance for all."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._within = 0
        self._stance: AbstractContextManager[object] | None = None

    def __enter__(self) -> None:
        with self._lock:
            self._within += 1
            if self._within == 1:
                self._stance = torch.compiler.set_stance("force_eager")

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._within -= 1
            if self._within == 0 and self._stance is not None:
                self._stance.__exit__(None, None, None)
                self._stance = None


_EAGER = _Eager()


@contextmanager
def _sharded_again(model: nn.Module) -> Iterator[None]:
    """Shard again what FSDP held in shards, also when a forward stopped half-way."""
    kind = _fsdp_module()
    inside = [module for module in model.modules() if isinstance(module, kind)]
    sharded = [module for module in inside if all(is_spread(own) for own in _own_parameters(module, kind))]
    try:
        yield
    finally:
        for module in inside:
            state = module._get_fsdp_state()
            if state._is_root and state._training_state.name != "IDLE" and hasattr(module, "reset_iter_state"):
                module.reset_iter_state()  # its forward was left half-way
        for module in sharded:
            module.reshard()


def _fsdp_module() -> Any:
    """The class that FSDP2 gives to the modules that it shards; no class where it was never imported."""
    return getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())


def _own_parameters(module: nn.Module, kind: Any) -> Iterator[Tensor]:
    """The parameters of a module and its descendants, less those that are sharded with a descendant."""
    yield from module.parameters(recurse=False)
    for child in module.children():
        if not isinstance(child, kind):
            yield from _own_parameters(child, kind)
