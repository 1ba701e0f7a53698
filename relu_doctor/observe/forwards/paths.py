"""Where in the model a forward is: the modules and the scripted code that are running."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from relu_doctor.observe.forwards.calls import Watch
from relu_doctor.observe.forwards.modes import ForwardMode
from relu_doctor.observe.graph.names import strip_wrappers
from relu_doctor.observe.models.exported import Steps
from relu_doctor.observe.models.keras_models import keras_layers
from relu_doctor.observe.models.scripted import outermost_scripts

Left = Callable[[str, nn.Module, Any, Any, int], None]


class ModulePaths:
    """Follows which module's forward is running, with hooks and with attributes of scripted modules.

    Args:
        watch: whose model.
        mode: that watches the forward, and counts the rectifier calls.
        left: a method of the mode, called when a module's forward has returned: its path, the module, its arguments,
            its output, and how many rectifier calls there had been before.
    """

    def __init__(self, watch: Watch, mode: ForwardMode, left: Left) -> None:
        self._watch = watch
        self._mode = weakref.proxy(mode)  # which holds this
        self._left = weakref.WeakMethod(left)
        self._running: list[tuple[str, nn.Module, Steps, int]] = []  # and the calls seen before each
        self._scripts: list[tuple[str, int]] = []
        self._thread = threading.get_ident()
        self._elsewhere: dict[int, int] = {}  # modules that are running in other threads

    @property
    def here(self) -> tuple[str, nn.Module]:
        """Path and module of the innermost forward."""
        return self._running[-1][:2] if self._running else ("", self._watch.model)

    @property
    def script(self) -> tuple[str | None, int]:
        """Path of the scripted module that is running, and how many rectifier calls there were before it."""
        return self._scripts[-1] if self._scripts else (None, 0)

    def step(self, operator: Any) -> tuple[str, str] | None:
        """Path and class of the module that an exported program has its next operator from."""
        return self._running[-1][2].advance(operator) if self._running else None

    @contextmanager
    def followed(self) -> Iterator[None]:
        """Follow the modules while the body runs."""
        with ExitStack() as stack:
            for name, module in (*self._watch.model.named_modules(), *keras_layers(self._watch.model)):
                if not isinstance(module, torch.jit.ScriptModule):  # which takes no hooks
                    self._follow(strip_wrappers(f"{name}.")[:-1], module, stack)
            for path, module in outermost_scripts(self._watch.model):
                self._follow_script(path, module, stack)
            yield

    def _follow(self, path: str, module: nn.Module, stack: ExitStack) -> None:
        def enter(module: nn.Module, args: Any) -> None:
            if self._is_here(path, 1):
                self._watch.known.ranks.note_module(module, args)
                self._running.append((path, module, Steps(module), self._mode.num_calls))

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            if not self._is_here(path, -1) or not self._running or self._running[-1][1] is not module:
                return  # also where a hook before ours has raised
            *_, called_before = self._running.pop()
            left = self._left()
            if left is not None:
                left(path, module, args, output, called_before)

        stack.callback(module.register_forward_pre_hook(enter, prepend=True).remove)
        stack.callback(module.register_forward_hook(leave, always_call=True).remove)

    def _follow_script(self, path: str, module: nn.Module, stack: ExitStack) -> None:
        """A scripted module takes no hooks, but its forward is an attribute."""
        attributes, forward = vars(module), module.forward
        had, before = "forward" in attributes, attributes.get("forward")

        def run(*args: Any, **kwargs: Any) -> object:
            self._scripts.append((path, self._mode.num_calls))
            try:
                return forward(*args, **kwargs)
            finally:
                self._scripts.pop()

        def put_back() -> None:
            del attributes["forward"]
            if had:
                attributes["forward"] = before

        attributes["forward"] = run
        stack.callback(put_back)

    def _is_here(self, path: str, step: int) -> bool:
        """Whether a module runs for the forward that is discovered, in the thread that is watched.

        Args:
            path: of the module.
            step: 1 where its forward begins, -1 where it ends.
        """
        thread = threading.get_ident()
        if thread != self._thread:
            if not self._elsewhere.get(thread):
                self._watch.known.note(f"{path or 'the model'} ran in another thread, where nothing is observed")
            self._elsewhere[thread] = self._elsewhere.get(thread, 0) + step
            return False
        return not self._mode.asleep
