"""GradientWatch: silent units, read off the gradients at the cost of reading the biases.

The gradient of a bias is the sum of what passes its unit: exactly 0 where the unit was silent on the whole batch, if
every path from it to the loss leads through the rectifier. Zeros also come from underflow, dropout and readers that let
nothing back: a gradient that is not 0 proves that a unit fired, one that is 0 is a reason to look.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from relu_doctor.observe.graph.names import strip_wrappers
from relu_doctor.observe.graph.passing import Speaker
from relu_doctor.observe.sites import ActivationSite


@dataclass(slots=True)
class _Followed:
    """A site that is followed, and where its units stand among all of them."""

    site_id: str
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
            if speaker is None or parameter is None or not _fits(parameter, speaker):
                continue
            in_order = len(parameter) == site.num_units and bool((speaker.rows == torch.arange(site.num_units)).all())
            rows = None if in_order else speaker.rows.to(parameter.device)
            stop = start + site.num_units
            self._followed.append(_Followed(site.site_id, parameter, rows, speaker.additive, start, stop))
            start = stop
        self.sites = tuple(each.site_id for each in self._followed)
        device = self._followed[0].parameter.device if self._followed else torch.device("cpu")
        self.last_fired = torch.full((start,), -1, dtype=torch.int64, device=device)
        sizes = [each.stop - each.start for each in self._followed]
        self._owner = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes, dtype=torch.int64)).to(
            device
        )
        self._share = (1 / torch.tensor(sizes, dtype=torch.float32).clamp_min(1)).to(device)
        self.silent = torch.zeros(len(sizes), device=device)
        self._sent: tuple[Tensor, torch.cuda.Event] | None = None  # on its way from a device

    def __len__(self) -> int:
        """How many units are followed."""
        return len(self.last_fired)

    @property
    def sizes(self) -> Tensor:
        """Units of each site that is followed: float32 (sites,)."""
        return 1 / self._share.cpu() if len(self._share) else self._share

    def shares(self) -> Tensor | None:
        """The share of each site's units that had no gradient, float (sites,); ``None`` while a device is at work."""
        if self.silent.device.type == "cpu":
            return self.silent
        if self._sent is not None and self._sent[1].query():
            told, self._sent = self._sent[0], None
            return told
        if self._sent is None:
            event = torch.cuda.Event()
            copy = self.silent.to("cpu", non_blocking=True)
            event.record()
            self._sent = copy, event
        return None

    def go_on_from(self, other: GradientWatch) -> None:
        """Take over what another watch knows of the same sites."""
        for each in self._followed:
            span = other.span(each.site_id)
            if span is not None and span.stop - span.start == each.stop - each.start:
                self.last_fired[each.start : each.stop] = other.last_fired[span]

    def heard(self) -> dict[str, Tensor]:
        """Per ``site_id``, when each unit had a gradient last: int64 (units,), on the CPU."""
        return {each.site_id: self.last_fired[each.start : each.stop].to("cpu", copy=True) for each in self._followed}

    def remember(self, heard: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`heard` told in another process."""
        for each in self._followed:
            last = heard.get(each.site_id)
            if last is not None and len(last) == each.stop - each.start:
                self.last_fired[each.start : each.stop] = last.to(self.last_fired.device)

    def span(self, site_id: str) -> slice | None:
        """Where the units of a site stand in :attr:`last_fired`; ``None`` for one that is not followed."""
        for each in self._followed:
            if each.site_id == site_id:
                return slice(each.start, each.stop)
        return None

    @torch.no_grad()
    def read(self, step: int) -> bool:
        """Read the gradients as they are now.

        Args:
            step: under which number they count.

        Returns:
            Whether there were any; else nothing has changed.
        """
        found = [_gradient(each) for each in self._followed]
        if not found or any(gradient is None for gradient in found):
            return self._read_some(found, step)
        gradients = torch.cat(found)  # type: ignore[arg-type]  # none is None
        return self._take(gradients, slice(None), step)

    def _read_some(self, found: list[Tensor | None], step: int) -> bool:
        """Where some parameters have no gradient: frozen, or not reached by this step's loss."""
        some = False
        for each, gradient in zip(self._followed, found, strict=True):
            if gradient is not None:
                some = self._take(gradient, slice(each.start, each.stop), step)
        return some

    def _take(self, gradients: Tensor, place: slice, step: int) -> bool:
        fired = (gradients != 0) & gradients.isfinite()
        self.last_fired[place].masked_fill_(fired.to(self.last_fired.device), step)
        owners = self._owner[place]
        if place == slice(None):
            self.silent.zero_()
        else:
            self.silent[owners[:1]] = 0
        silent = (~fired).to(self.silent.device, torch.float32)
        self.silent.index_add_(0, owners, silent * self._share[owners])
        return True


def before_steps(optimizers: Iterable[Optimizer], call: Callable[[bool], None]) -> list[RemovableHandle]:
    """Call a function before each step of some optimizers.

    Args:
        optimizers: whose steps.
        call: is told whether the gradients are there, or a closure is going to make them within the step.
    """

    def hook(optimizer: Optimizer, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        call(not _has_closure(args, kwargs))

    return [optimizer.register_step_pre_hook(hook) for optimizer in optimizers]


def after_steps(optimizers: Iterable[Optimizer], call: Callable[[bool], None]) -> list[RemovableHandle]:
    """Call a function after each step of some optimizers; it is told what :func:`before_steps` tells."""

    def hook(optimizer: Optimizer, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        call(not _has_closure(args, kwargs))

    return [optimizer.register_step_post_hook(hook) for optimizer in optimizers]


def _fits(parameter: nn.Parameter, speaker: Speaker) -> bool:
    """Whether a parameter has the rows that are spoken of, in this process."""
    if type(parameter) not in {nn.Parameter, Tensor} or parameter.layout is not torch.strided or not parameter.dim():
        return False
    return not len(speaker.rows) or int(speaker.rows.max()) < len(parameter)


def _gradient(each: _Followed) -> Tensor | None:
    """A number per unit that is 0 where its row has no gradient; ``None`` where there is none."""
    gradient = each.parameter.grad
    if gradient is None or gradient.layout is not torch.strided:
        return None
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
    return kwargs.get("closure") is not None or any(arg is not None for arg in args[1:2])
