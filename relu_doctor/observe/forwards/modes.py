"""What every mode that watches a forward does: it sees torch calls, and measures those that rectify."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator

from relu_doctor.errors import UnsupportedModelError
from relu_doctor.observe.forwards.calls import Open, UnknownCallError, Watch
from relu_doctor.observe.forwards.dispatch import OPERATORS, function_of, is_foreign, perform_higher_order
from relu_doctor.observe.forwards.layout import Sample
from relu_doctor.observe.forwards.recorder import Pending, Recorder
from relu_doctor.observe.forwards.recurrent import (
    RECURRENT,
    RecurrentLayer,
    drops_between_inner_layers,
    recurrent_layers,
)
from relu_doctor.observe.forwards.registry import Reading, Witness
from relu_doctor.observe.forwards.selection import TOP_K, Choice, Selection
from relu_doctor.observe.forwards.watching import WatchingMode
from relu_doctor.observe.graph.sharding import arrived, is_spread, whole
from relu_doctor.observe.graph.slices import Slices, is_cut
from relu_doctor.observe.inputs.owners import RowFollower, Rows
from relu_doctor.observe.models.writes import may_write
from relu_doctor.observe.rectifiers.bends import Bend
from relu_doctor.observe.rectifiers.custom import fires_by
from relu_doctor.observe.rectifiers.facts import Chosen, Output, Refined
from relu_doctor.observe.rectifiers.gates import Ledger, is_followed
from relu_doctor.observe.rectifiers.kinds import ANY, Applied, Rectifier, argument, name_of, recognise
from relu_doctor.observe.rectifiers.tapping import tap
from relu_doctor.observe.rectifiers.transforms import outside_of_transforms, without_vmap
from relu_doctor.observe.sites import ActivationSite
from relu_doctor.text import clean_text


class ForwardMode(WatchingMode):
    """Sees torch calls, collects the witness, and stages one forward's statistics."""

    def __init__(self, watch: Watch, reading: Reading, phase: str) -> None:
        super().__init__()
        self.watch = watch
        self.reading = reading
        self.phase = phase
        samples = watch.sampled == phase
        self.recorder = Recorder(watch.known, reading, watch.statistics, tokens=watch.tokens, samples=samples)
        self.ledger = Ledger()
        self.slices = Slices(watch.known.names)
        self.rows = RowFollower(reading.num_inputs, reading.axis)
        self.whose: Rows | None = None  # the rows of the call that is being measured are a selection
        self.called: set[int] = set()
        self.used: dict[str, None] = {}
        self.running: list[Open] = []
        self.waiting: list[Pending] = []  # calls whose output may yet be chosen from
        self.num_calls = 0
        self.sample: Sample | None = None
        self.mark = ""  # the name of the tap that is being looked at
        self.marked: int | None = None  # the call whose output it marks, where a rectifier was seen there already
        self.foreign = 0  # operators that are not torch's own and are running

    def see(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        """Look at a call and perform it."""
        result = self._see(func, types, args, kwargs)
        self.rows.follow(func, args, kwargs, result)
        return result

    def _see(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        if _is_plain(func) and "out" not in kwargs:
            self._note_parameters(args, kwargs)
            result = self.call(func, args, kwargs)
            self.passed(result)
            return result
        if func is tap:
            return self._tap(*args, **kwargs)
        if isinstance(func, OPERATORS):
            return self._operate(func, types, args, kwargs)
        if not self.watch.inside_custom:
            applied = recognise(func, args, kwargs) or self.ledger.recognise(func, args, kwargs)
            if isinstance(applied, Applied):
                return self._apply(applied, func, args, kwargs)
            if isinstance(applied, Refined):
                return self._refine(applied, func, args, kwargs)
            if func in TOP_K:
                return self._choose(func, args, kwargs)
            if func in RECURRENT:
                return self._recur(func, args, kwargs)
        if getattr(func, "__name__", "") != "__get__":  # to ask a parameter for its shape is no use of it
            self.watch.writes.expect(func, args, kwargs)
            self._note_parameters(args, kwargs)
        result = self.slices.follow(func, args, kwargs, self.call(func, args, kwargs))
        self.ledger.follow(func, args, kwargs, result)
        self.passed(result)
        return result

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Perform a torch call that applies no rectifier."""
        return self.perform(func, args, kwargs)

    def passed(self, result: Any) -> None:
        """The ledger has taken in the call before."""

    def _operate(self, operator: Any, types: Any, args: Any, kwargs: Any) -> Any:
        """Python code calls an operator itself: ``torch.ops.aten.relu(x)``, as exported programs do."""
        if not isinstance(operator, HigherOrderOperator):
            self.enter_operator(operator)
            foreign = is_foreign(operator)
            self.foreign += foreign
            try:
                return self._see(function_of(operator), types, args, kwargs)
            finally:
                self.foreign -= foreign
        with torch._C._EnableTorchFunction(), self:
            result = perform_higher_order(operator, args, kwargs)
        if result is not NotImplemented:
            return result
        if any(isinstance(value, nn.Module) for value in args):
            self.watch.known.note(f"{operator.name()}() calls a part of the model where it was not observed")
        return self.caller(operator, args, kwargs)

    def enter_operator(self, operator: Any) -> None:
        """The next call is that of an operator."""

    def settle(self) -> None:
        """An operator of the dispatcher is about to run: the one before it has returned."""

    def hidden(self, name: str) -> None:
        """An operator of the dispatcher rectifies inside, where nothing can be measured."""
        if name not in self.watch.known.hidden:
            self.note_error(error := UnknownCallError())  # it may come out of scripted code as another one
            raise error

    def _note_parameters(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        names = self.watch.known.names
        for value in (*args, *kwargs.values()) if kwargs else args:
            name = names.of(value) or self.slices.of(value) if isinstance(value, Tensor) else None
            if name is not None:
                self.used[name] = None

    def _apply(self, applied: Applied, func: Any, args: Any, kwargs: Any) -> Any:
        bend = self.ledger.output_of(applied)
        self.consume(self.ledger.read(func, args, kwargs) - set(applied.replaces))
        pre = self.perform(torch.neg, (applied.pre,), {}) if applied.flipped else applied.pre
        if without_vmap(pre) is None:
            self.watch.known.note(f"{applied.name}() inside a transform of torch.func was not observed")
            return self.perform(func, args, kwargs)
        self.enter(applied.rectifier, pre, applied.pre, applied.name)
        self.replaced(applied.replaces)
        result = self.perform(func, args, kwargs)
        self.leave(result if applied.written is None else applied.written, applied.fires, bend)
        return result

    def _refine(self, refined: Refined, func: Any, args: Any, kwargs: Any) -> Any:
        """A rectifier's output goes through a mask: it fires where something is left of it."""
        result = self.perform(func, args, kwargs)
        output = refined.output
        if refined.gate is None:
            self.ledger.note(result, Output(output.index, output.pre, output.record, chosen=True))
        plain = without_vmap(result) if output.record is not None else None
        if plain is not None:
            with outside_of_transforms():
                selection = Selection.by_mask(plain.detach() != 0)
            self.refine(output.record, selection, gate=refined.gate, further=output.chosen)
        return result

    def consume(self, calls: set[int]) -> None:
        """Something else than a choice is made of the outputs of calls."""

    def replaced(self, calls: tuple[int, ...]) -> None:
        """The rectifiers of some calls turn out to be parts of the one that was called now."""

    def enter(self, rectifier: Rectifier, pre: Tensor, behind: Tensor | None = None, name: str = "") -> None:
        """A rectifier is about to be applied.

        Args:
            rectifier: what is applied.
            pre: to what.
            behind: the model's own tensor of which ``pre`` is a copy or the negative.
            name: of what is called, where that is not the rectifier's.

        Raises:
            UnsupportedModelError: a transform of ``torch.func`` does not show the values.
        """
        plain = without_vmap(pre)
        if plain is None:
            raise UnsupportedModelError(f"{name or rectifier.name} is called inside a transform that shows no values.")
        with nullcontext() if plain is pre else outside_of_transforms():
            self.before(name or rectifier.name, rectifier, plain, pre if behind is None else behind)

    def leave(self, post: Any, fires: Tensor | None = None, bend: Bend | None = None) -> None:
        """It was applied.

        Args:
            post: its output, where that is a tensor.
            fires: where it fired, of the pre-activation's shape, where no interval tells.
            bend: what the output is of the tensor behind it.
        """
        mask = None if fires is None else without_vmap(fires)
        plain = without_vmap(post) if isinstance(post, Tensor) else None
        if plain is post or plain is None:
            self.after(plain, mask, bend)
            return
        call = self.running[-1]
        with outside_of_transforms():
            self.after(plain, mask, bend)
        self.ledger.note(post, self.ledger.about(plain) or Output(call.index, call.pre))

    def before(self, name: str, rectifier: Rectifier, pre: Tensor, behind: Tensor | None = None) -> None:
        """A rectifier is about to be applied: measure its input, which it may overwrite.

        Args:
            name: of what is called.
            rectifier: what is applied.
            pre: to what.
            behind: the model's own tensor of which ``pre`` is the negative.
        """
        behind = pre if behind is None else behind
        witness = self._witness(name, rectifier, pre)
        choice = self.ledger.output(behind)
        if choice is not None and choice.chosen:
            self.absorb(witness, rectifier, choice)
            self.running.append(Open(choice.index, choice.pre, None, choice))
            return
        if pre.is_nested:
            raise UnsupportedModelError(
                f"{name}() is applied to a nested tensor, whose inputs and units do not show; pad its sequences: "
                "torch.nested.to_padded_tensor(x, 0), and give mask=."
            )
        here = self.perform(whole, (pre,), {}) if is_spread(pre) else pre
        site = self.identify(witness, name, rectifier, here)
        if site is not None and (site.rectifier.low, site.rectifier.high) != (rectifier.low, rectifier.high):
            edges = replace(site.rectifier, low=rectifier.low, high=rectifier.high)  # they are data
            site = replace(site, rectifier=edges)
        self.whose = self.rows.of(behind)
        self.running.append(Open(self.num_calls, weakref.ref(behind), self.measure(site, arrived(here.detach()))))
        self.num_calls += 1

    def _witness(self, name: str, rectifier: Rectifier, pre: Tensor) -> Witness:
        used, self.used = tuple(self.used), {}
        return name, pre.dim(), *rectifier.shape, used

    def measure(self, site: ActivationSite | None, pre: Tensor) -> Pending | None:
        """Measure a call of a site."""
        whose, self.whose = self.whose, None
        return None if site is None or not site.num_units else self.recorder.begin(site, pre, self.sample, whose)

    def after(self, post: Any, fires: Tensor | None = None, bend: Bend | None = None) -> None:
        """The rectifier was applied.

        Args:
            post: its output.
            fires: where it fired, of the pre-activation's shape, where no interval tells.
            bend: what the output is of the tensor behind it.
        """
        call = self.running.pop()
        awaits = call.pending is not None and self.awaits(call.pending.site)
        if isinstance(post, Tensor):
            made = None if bend is None else bend.by_call(call.index)
            self.ledger.note(post, call.choice or Output(call.index, call.pre, call if awaits else None, bend=made))
        if call.pending is None:
            return
        post = arrived(whole(post)) if isinstance(post, Tensor) else post
        blocked = self.below and isinstance(post, Tensor) and post.is_mkldnn  # a layout that only its own kernels read
        self.recorder.end(call.pending, post.to_dense() if blocked else post)
        if fires is not None:
            Selection.by_mask(fires).apply(call.pending)
        if awaits:
            self.waiting.append(call.pending)
        else:
            self.recorder.stage(call.pending)

    def _choose(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A top-k: it decides what fires, of a rectifier's output or by itself."""
        pre = argument(args, kwargs, 0, "input")
        if not pre.is_floating_point() or not argument(args, kwargs, 3, "largest", True):
            return self.call(func, args, kwargs)
        output, bend = self.ledger.output(pre), self.ledger.bend(pre)
        if output is None and bend is not None:
            output = bend.made_of
        if output is None or output.chosen:
            return self.choose(self._witness("topk", ANY, pre), func, args, kwargs)
        result = self.perform(func, args, kwargs)
        chosen = Output(output.index, output.pre, output.record, chosen=True)
        self._note_choice(pre, result, chosen)
        choice = self.choice_of(args, kwargs, result) if output.record is not None else None
        if choice is not None:
            self.refine(output.record, choice.selection(0.0))
        return result

    def choice_of(self, args: Any, kwargs: Any, result: Any) -> Choice | None:
        """What a top-k chose, outside of every ``vmap``; ``None`` inside another transform."""
        pre = argument(args, kwargs, 0, "input")
        dim = argument(args, kwargs, 2, "dim", -1)
        dim = dim - pre.dim() if dim >= 0 else dim  # the axes that vmap hides come first
        whole, values, indices = (without_vmap(tensor) for tensor in (pre, *result))
        return None if whole is None or values is None or indices is None else Choice(whole, values, indices, dim)

    def _note_choice(self, pre: Tensor, result: Any, output: Output) -> None:
        """Remember what a top-k returned."""
        self.ledger.note(result[0], output)
        self.ledger.note(result[1], Chosen(weakref.ref(self.ledger.origin(pre)[0]), output.index, output))

    def _tap(self, name: str, pre: Any, post: Any, *, fires: Callable[[Tensor, Tensor], Tensor] | None = None) -> Any:
        """A mark in the model's own code."""
        mark = clean_text(str(name)) or "tap"
        if not isinstance(pre, Tensor) or not isinstance(post, Tensor) or pre.shape != post.shape:
            shapes = (str(tuple(x.shape)) if isinstance(x, Tensor) else type(x).__name__ for x in (pre, post))
            raise UnsupportedModelError(
                f"tap({mark!r}, pre, post) expects two tensors of one shape, found {' and '.join(shapes)}."
            )
        if self.watch.inside_custom:
            return post
        with torch.no_grad():
            mask = post.detach() != 0 if fires is None else fires_by(f"tap {mark!r}", self._asked(fires), pre, post)
        self.mark, parts = mark, self.ledger.parts(post, pre)
        known = fires is None and len(parts) == 1 and self.ledger.output(post) is not None
        self.marked = parts[0] if known else None
        try:
            self.enter(replace(ANY, applied="tap"), pre, name=f"tap {mark}")
        finally:
            self.mark, self.marked = "", None
        self.replaced(() if known else parts)
        self.leave(None if known else post, mask)
        return post

    def _asked(self, fires: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Any]:
        """A function of the user's own, which other modes of theirs are to see."""

        def ask(pre: Tensor, post: Tensor) -> Any:
            return self.caller(fires, (pre, post), {})

        return ask

    def _recur(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A recurrent layer with ReLU inside one fused call: only its outputs are seen."""
        result = self.call(func, args, kwargs)
        rows = self.rows.of_packed(argument(args, kwargs, 0, "input"))
        if rows is not None:
            self.rows.note_packed(result[0], rows)
        if drops_between_inner_layers(func, args):
            self.watch.known.note(
                "a recurrent layer with dropout: its inner layers were computed once more, without it"
            )
        for layer in recurrent_layers(func, args, kwargs, result):
            names = [self.watch.known.names.of(weight) for weight in layer.weights]
            used = tuple(name for name in names if name is not None)
            witness: Witness = ("rnn_relu", layer.output.dim(), 0.0, math.inf, used)
            site = self.identify_recurrent(witness, layer, result)
            self.whose = rows
            pending = self.measure(site, layer.output.detach())
            self.num_calls += 1
            if pending is not None:
                self.recorder.end(pending, layer.output)
                pending.summary.stats.positions = pending.summary.stats.positions - layer.num_padding
                self.recorder.stage(pending)
        self.used = {}
        return result

    def finish(self) -> None:
        """The forward is over: stage what waited for a choice."""
        while self.waiting:
            self.recorder.stage(self.waiting.pop(0))

    def identify(self, witness: Witness, name: str, rectifier: Rectifier, pre: Tensor) -> ActivationSite | None:
        """Which site a call belongs to; ``None`` where it is none."""
        raise NotImplementedError

    def identify_recurrent(self, witness: Witness, layer: RecurrentLayer, result: Any) -> ActivationSite | None:
        """Which site a layer of a recurrent call is."""
        raise NotImplementedError

    def awaits(self, site: ActivationSite) -> bool:
        """Whether a later call of the forward may choose from a site's output."""
        raise NotImplementedError

    def refine(self, call: Open, selection: Selection, *, gate: Tensor | None = None, further: bool = False) -> None:
        """What a call fires goes on only where something else selects it.

        Args:
            call: of a rectifier.
            selection: what is selected of its output.
            gate: what the selection was made by, where that is another tensor.
            further: of what was selected of it before.
        """
        raise NotImplementedError

    def choose(self, witness: Witness, func: Any, args: Any, kwargs: Any) -> Any:
        """Perform a top-k that does not choose from a rectifier's output."""
        raise NotImplementedError

    def absorb(self, witness: Witness, rectifier: Rectifier, choice: Output) -> None:
        """A rectifier is applied to the values of a top-k, and belongs to it."""
        raise NotImplementedError


@lru_cache(maxsize=1024)
def _is_plain(func: Any) -> bool:
    """Whether a function is one of the many of whose calls only the parameters matter: convolutions, norms, pools."""
    special = func is tap or isinstance(func, OPERATORS) or func in TOP_K or func in RECURRENT
    name = getattr(func, "__name__", "__get__")
    return not (special or name == "__get__" or may_write(func) or is_cut(func) or is_followed(func) or name_of(func))
