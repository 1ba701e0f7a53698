"""GradientWatch: silent units, read off the gradients at the cost of reading the biases.

The gradient of a bias is the sum of what passes its unit: exactly 0 where the unit was silent on the whole batch, if
every path from it to the loss leads through the rectifier. Zeros also come from underflow, dropout and readers that let
nothing back; and what is not 0 may come from elsewhere (a penalty on the parameters, noise). So it is a reason to look;
and where a forward that is observed in full shows a unit silent that has a gradient, the site is not trusted any more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from relu_doctor.observe.graph.names import strip_wrappers
from relu_doctor.observe.graph.passing import Speaker
from relu_doctor.observe.sites import ActivationSite

Array = np.ndarray[Any, Any]


@dataclass(slots=True)
class _Followed:
    """A site that is followed, and where its units stand among all of them."""

    site_id: str
    name: str
    parameter: nn.Parameter
    rows: Tensor | None  # None where they are all of the parameter's, in order
    additive: bool
    start: int
    stop: int


class GradientWatch:
    """Follows the units of all sites for which a parameter speaks; O(units) memory, no activation is touched.

    Args:
        model: whose parameters.
        sites: those without a speaker are not followed.

    Attributes:
        sites: ``site_id`` of the sites that are followed, in order.
        last_fired: int64 (units,), the last step at which each unit of those sites had a gradient; -1 for never.
        last_checked: int64 (units,), the same of the steps that were observed in full.
        norm: 2-norm of those gradients at the last reading that are sums over the units' inputs; a number or a
            scalar on their device.
        silent: float (sites,), the share of each site's units without a gradient at the last reading; on the
            parameters' device.
    """

    def __init__(self, model: nn.Module, sites: Sequence[ActivationSite]) -> None:
        named = {strip_wrappers(name): p for name, p in model.named_parameters(remove_duplicate=False)}
        self._followed: list[_Followed] = []
        start = 0
        for site in sites:
            speaker = site.speaker
            parameter = named.get(speaker.name) if speaker is not None else None
            if speaker is None or parameter is None or not site.num_units or not _fits(parameter, speaker):
                continue
            in_order = len(parameter) == site.num_units and bool((speaker.rows == torch.arange(site.num_units)).all())
            rows = None if in_order else speaker.rows.to(parameter.device)
            stop = start + site.num_units
            self._followed.append(_Followed(site.site_id, speaker.name, parameter, rows, speaker.additive, start, stop))
            start = stop
        self.sites = tuple(each.site_id for each in self._followed)
        device = self._followed[0].parameter.device if self._followed else torch.device("cpu")
        self.last_fired = torch.full((start,), -1, dtype=torch.int64, device=device)
        self.last_checked = self.last_fired.clone()
        sizes = [each.stop - each.start for each in self._followed]
        self._owner = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes, dtype=torch.int64)).to(
            device
        )
        self._share = (1 / torch.tensor(sizes, dtype=torch.float32).clamp_min(1)).to(device)
        self.silent = torch.zeros(len(sizes), device=device)
        self._sent: tuple[Tensor, torch.cuda.Event] | None = None  # on its way from a device
        self.norm: float | Tensor = 0.0
        additive = torch.tensor([float(each.additive) for each in self._followed])
        self._counts = torch.repeat_interleave(additive, torch.tensor(sizes, dtype=torch.int64)).to(device)
        self._starts = np.array([each.start for each in self._followed], np.int64)
        self._sizes = np.array(sizes, np.float32)

    def __len__(self) -> int:
        """How many units are followed."""
        return len(self.last_fired)

    @property
    def sizes(self) -> Array:
        """Units of each site that is followed: float32 (sites,)."""
        return self._sizes

    def shares(self) -> Array | None:
        """The share of each site's units that had no gradient, float32 (sites,); ``None`` while a device is at work."""
        if self.silent.device.type == "cpu":
            return self.silent.numpy()
        if self._sent is not None and self._sent[1].query():
            told, self._sent = self._sent[0], None
            return told.numpy()
        if self._sent is None:
            event = torch.cuda.Event()
            copy = self.silent.to("cpu", non_blocking=True)
            event.record()
            self._sent = copy, event
        return None

    def fits(self, named: Mapping[str, nn.Parameter]) -> bool:
        """Whether the model still holds the parameters that are followed."""
        return all(named.get(each.name) is each.parameter for each in self._followed)

    def go_on_from(self, other: GradientWatch) -> None:
        """Take over what another watch knows of the same sites."""
        for each in self._followed:
            span = other.span(each.site_id)
            if span is not None and span.stop - span.start == each.stop - each.start:
                self.last_fired[each.start : each.stop] = other.last_fired[span]
                self.last_checked[each.start : each.stop] = other.last_checked[span]

    def heard(self) -> dict[str, Tensor]:
        """Per ``site_id``, when each unit had a gradient last: int64 (units,), on the CPU."""
        return {each.site_id: self.last_fired[each.start : each.stop].to("cpu", copy=True) for each in self._followed}

    def checked(self) -> dict[str, Tensor]:
        """The same of the steps that were observed in full."""
        return {each.site_id: self.last_checked[each.start : each.stop].to("cpu", copy=True) for each in self._followed}

    def belongs_to(self, optimizer: Optimizer) -> bool:
        """Whether an optimizer updates all the parameters that are followed."""
        own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        return all(id(each.parameter) in own for each in self._followed)

    def remember(self, heard: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`heard` told in another process."""
        for each in self._followed:
            last = heard.get(each.site_id)
            if last is not None and len(last) == each.stop - each.start:
                self.last_fired[each.start : each.stop] = last.to(self.last_fired.device)

    def forget(self, site_id: str, units: Tensor) -> None:
        """Forget when units of a site had a gradient: bool (units,)."""
        span = self.span(site_id)
        if span is not None:
            for steps in (self.last_fired, self.last_checked):
                steps[span].masked_fill_(units.to(steps.device), -1)

    def span(self, site_id: str) -> slice | None:
        """Where the units of a site stand in :attr:`last_fired`; ``None`` for one that is not followed."""
        for each in self._followed:
            if each.site_id == site_id:
                return slice(each.start, each.stop)
        return None

    @torch.no_grad()
    def read(self, step: int, *, observed: bool = False, optimizer: Optimizer | None = None) -> bool:
        """Read the gradients as they are now.

        Args:
            step: under which number they count.
            observed: the forward of this step is observed in full.
            optimizer: only of the parameters that it updates; those of others may be of earlier steps.

        Returns:
            Whether there were any; else nothing has changed.
        """
        found = [_gradient(each) for each in self._followed]
        if optimizer is not None:
            own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
            found = [
                gradient if id(each.parameter) in own else None
                for each, gradient in zip(self._followed, found, strict=True)
            ]
        if not found or any(gradient is None for gradient in found):
            return self._read_some(found, step, observed=observed)
        if self.silent.device.type == "cpu":
            try:
                values = [gradient.detach().numpy() for gradient in found]  # type: ignore[union-attr]
                self._take_at_once(values, step, observed=observed)
            except (TypeError, RuntimeError):  # a type that numpy has not, or memory elsewhere
                pass
            else:
                return True
        if len({gradient.device for gradient in found}) > 1:  # type: ignore[union-attr]  # none is None
            return self._read_some(found, step, observed=observed)
        gradients = torch.cat(found)  # type: ignore[arg-type]
        self.norm = self._take(gradients, slice(None), step, observed=observed).sqrt()
        return True

    def _take_at_once(self, gradients: list[Array], step: int, *, observed: bool) -> None:
        """What :meth:`_take` does, on the CPU, where calls of torch would cost more than the work."""
        values = np.concatenate(gradients)
        fired = np.isfinite(values)
        fired &= values != 0
        np.copyto(self.last_fired.numpy(), step, where=fired)
        if observed:
            np.copyto(self.last_checked.numpy(), step, where=fired)
        speaking = np.add.reduceat(fired, self._starts, dtype=np.float32)
        np.subtract(1, speaking / self._sizes, out=self.silent.numpy())
        with np.errstate(over="ignore", invalid="ignore"):  # where the run diverges
            counted = values * self._counts.numpy()
            self.norm = float(np.sqrt(counted.dot(counted)))

    def _read_some(self, found: list[Tensor | None], step: int, *, observed: bool) -> bool:
        """Where some parameters have no gradient (frozen, not reached by this step's loss), or they are on devices."""
        squares = [
            self._take(gradient, slice(each.start, each.stop), step, observed=observed)
            for each, gradient in zip(self._followed, found, strict=True)
            if gradient is not None
        ]
        if squares:
            self.norm = torch.stack(squares).sum().sqrt()
        return bool(squares)

    def _take(self, gradients: Tensor, place: slice, step: int, *, observed: bool) -> Tensor:
        """Take in the gradients of some units; the sum of the squares of those that are sums."""
        fired = ((gradients != 0) & gradients.isfinite()).to(self.silent.device)
        gradients = gradients.to(self.silent.device, torch.float32)
        self.last_fired[place].masked_fill_(fired, step)
        if observed:
            self.last_checked[place].masked_fill_(fired, step)
        owners = self._owner[place]
        if place == slice(None):
            self.silent.zero_()
        else:
            self.silent[owners[:1]] = 0
        self.silent.index_add_(0, owners, (~fired).float() * self._share[owners])
        return (gradients * self._counts[place]).square().sum()


def before_steps(optimizers: Iterable[Optimizer], call: Callable[[Optimizer, bool], None]) -> list[RemovableHandle]:
    """Call a function before each step of some optimizers.

    Args:
        optimizers: whose steps.
        call: is told whose step it is, and whether the gradients are there, or a closure is going to make them within
            it.
    """

    def hook(optimizer: Optimizer, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        call(optimizer, not _has_closure(args, kwargs))

    return [optimizer.register_step_pre_hook(hook) for optimizer in optimizers]


def after_steps(optimizers: Iterable[Optimizer], call: Callable[[Optimizer, bool], None]) -> list[RemovableHandle]:
    """Call a function after each step of some optimizers; it is told what :func:`before_steps` tells."""

    def hook(optimizer: Optimizer, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        call(optimizer, not _has_closure(args, kwargs))

    return [optimizer.register_step_post_hook(hook) for optimizer in optimizers]


def _fits(parameter: nn.Parameter, speaker: Speaker) -> bool:
    """Whether a parameter has the rows that are spoken of, in this process."""
    if type(parameter) not in {nn.Parameter, Tensor} or parameter.layout is not torch.strided or not parameter.dim():
        return False
    return not len(speaker.rows) or int(speaker.rows.max()) < len(parameter)


def _gradient(each: _Followed) -> Tensor | None:
    """A number per unit that is 0 where its row has no gradient; ``None`` where there is none."""
    gradient = each.parameter.grad
    if gradient is None or gradient.layout is not torch.strided or not each.parameter.requires_grad:
        return None  # what was frozen keeps the last gradient that it had
    if gradient.dim() > 1:
        gradient = gradient.flatten(1)
        gradient = gradient[:, 0] if gradient.shape[1] == 1 else gradient.abs().amax(1)
    return gradient if each.rows is None else gradient[each.rows]


def own_optimizer(optimizer: object) -> Optimizer | None:
    """The optimizer that makes the steps, behind those of Accelerate and Lightning; ``None`` for what is none."""
    while not hasattr(optimizer, "_optimizer_step_pre_hooks") and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer if isinstance(optimizer, Optimizer) else None


def _has_closure(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a step was given a closure; the optimizer itself comes first."""
    return kwargs.get("closure") is not None or (len(args) > 1 and args[1] is not None)
