"""What an optimizer's saved state says: learning rates, and the size of the last update of every parameter."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from relu_doctor.checkpoints.nodes import ArrayNode, TensorRef
from relu_doctor.checkpoints.search import TensorLike, as_count, as_mapping, as_tensor, count_elements
from relu_doctor.text import clean_text

Kind = Literal["adam-like", "sgd", "unknown"]
NamesAndShapes = Mapping[str, Sequence[int]] | Iterable[tuple[str, Sequence[int]]]

_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_flat_param")
_FACTORED = ("_row", "_col")  # Adafactor keeps rows and columns of the second moment, of other shapes
_MOST_EXPANSION = 16  # an expanded tensor is computed on up to this many times its storage


@dataclass(frozen=True, slots=True)
class OptimizerGroup:
    """One parameter group: its settings as saved, and the names of its parameters.

    Settings that the optimizer does not have are ``None``. ``lr`` is the rate *at the time of saving*: with a scheduler
    that steps before the save, it is that of the next update.
    """

    names: tuple[str, ...]
    lr: float | None = None
    momentum: float | None = None
    dampening: float | None = None
    nesterov: bool | None = None
    betas: tuple[float, float] | None = None
    eps: float | None = None
    weight_decay: float | None = None
    amsgrad: bool | None = None
    initial_lr: float | None = None
    step: int | None = None  # apex keeps the step here


@dataclass(frozen=True, slots=True)
class OptimizerState:
    """An optimizer's state, by the names of the parameters.

    Attributes:
        kind: ``"adam-like"`` (first and second moments), ``"sgd"``, or ``"unknown"``.
        groups: the parameter groups, in order.
        state: per parameter name what the optimizer keeps for it; tensors are read when they are asked for.
        step: the largest number of updates that any parameter had, or ``None`` (SGD does not count).
        key: where in the file it was found.
        mapped: False when it could not be told which parameter is which: settings only, no names and no state.
    """

    kind: Kind
    groups: tuple[OptimizerGroup, ...]
    state: Mapping[str, Mapping[str, object]] = field(repr=False)
    step: int | None = None
    key: str = ""
    mapped: bool = True

    @property
    def learning_rates(self) -> tuple[float, ...]:
        """The distinct learning rates of the groups, in order."""
        return tuple(dict.fromkeys(group.lr for group in self.groups if group.lr is not None))

    def group_of(self, name: str) -> OptimizerGroup | None:
        """The group that a parameter belongs to."""
        return next((group for group in self.groups if name in group.names), None)

    def tensor(self, name: str, key: str) -> Tensor | None:
        """One tensor of a parameter's state, for example ``tensor("fc.weight", "exp_avg_sq")``; ``None`` if absent."""
        return as_tensor(self.state.get(name, {}).get(key))

    def last_update(self, name: str) -> Tensor | None:
        """What the last update subtracted from a parameter, as far as the state implies it.

        SGD with momentum: lr·buf, with the momentum buffer of the last update. With Nesterov the true update is
        lr·(g + μ·buf), whose gradient is not in the file; lr·buf is its value for a steady gradient, and an
        approximation. Adam (Kingma & Ba 2015, algorithm 1): lr·m̂ / (√v̂ + ε) with bias correction; with AMSGrad
        (Reddi et al. 2018) v is the running maximum. Decoupled weight decay is left out.

        Returns:
            A floating tensor of the parameter's shape, on the CPU; all NaN where the step or a setting that the
            formula needs is unknown; ``None`` where the state implies nothing (plain SGD, an unknown optimizer).

        Raises:
            CheckpointError: the file has changed since it was opened.
        """
        group, state = self.group_of(name), self.state.get(name)
        if group is None or state is None:
            return None
        needed = ("exp_avg", "exp_avg_sq") if self.kind == "adam-like" else ("momentum_buffer",)
        if self.kind == "unknown" or not all(_is_computable(state.get(key)) for key in needed):
            return None
        first = self.tensor(name, needed[0])
        if first is None or group.lr is None:
            return None if first is None else torch.full_like(_as_float(first), math.nan)
        if self.kind == "sgd":
            return group.lr * _as_float(first)
        largest = "max_exp_avg_sq" if group.amsgrad and _is_computable(state.get("max_exp_avg_sq")) else "exp_avg_sq"
        second = self.tensor(name, largest)
        if second is None or second.shape != first.shape:
            return None
        step = as_count(state.get("step")) or group.step
        if not step or group.betas is None or group.eps is None:
            return torch.full_like(_as_float(first), math.nan)
        beta1, beta2 = group.betas
        mean = _as_float(first) / (1 - beta1**step)
        root = (_as_float(second) / (1 - beta2**step)).sqrt()
        return group.lr * mean / (root + group.eps)


def plain_name(name: str) -> str:
    """A parameter's name without the components that wrappers add anywhere in it (``_orig_mod`` and the like)."""
    parts = name.split(".")
    return (
        ".".join(part for part in parts if part not in _WRAPPERS) if any(part in _WRAPPERS for part in parts) else name
    )


def strip_prefix(names: Iterable[str]) -> tuple[dict[str, str], str]:
    """Names without what DataParallel, DistributedDataParallel, ``torch.compile`` and FSDP put into them.

    Returns:
        Each given name with its plain one, and the leading prefix that all had in common (``"module."``).
    """
    given = list(names)
    plain, prefix = list(given), ""
    leading = ("module.", *(f"{wrapper}." for wrapper in _WRAPPERS))
    while plain:
        common = next((start for start in leading if all(name.startswith(start) for name in plain)), None)
        if common is None or any(name == common for name in plain):
            break
        plain = [name.removeprefix(common) for name in plain]
        prefix += common
    plain = [plain_name(name) for name in plain]
    if len(set(plain)) < len(given):
        return {name: name for name in given}, ""
    return dict(zip(given, plain, strict=True)), prefix


def read_optimizer(raw: object, names_and_shapes: NamesAndShapes, *, key: str = "") -> OptimizerState | None:
    """Tie an optimizer's saved state to parameter names.

    The groups' own ``param_names`` are used where they are saved; else the order of ``names_and_shapes``, and then only
    if there are as many parameters as names and the shape of every tensor in the state agrees.

    Args:
        raw: the ``state_dict()`` of the optimizer.
        names_and_shapes: the model's parameters in the order of ``named_parameters()``, with their shapes.
        key: where in the file it was found, for :attr:`OptimizerState.key`.

    Returns:
        The state, or ``None`` when it cannot be told which parameter is which.
    """
    items = as_mapping(raw)
    groups = _raw_groups(items)
    if items is None or groups is None:
        return None
    pairs = list(names_and_shapes.items() if isinstance(names_and_shapes, Mapping) else names_and_shapes)
    state = as_mapping(items["state"]) or {}
    saved = {name: tuple(shape) for name, shape in pairs}
    by_id = _names_of(groups, list(saved))
    if by_id is None:
        return None
    mapped: dict[str, Mapping[str, object]] = {}
    for identity, name in by_id.items():
        kept = as_mapping(state.get(identity))
        if name in saved and kept and not _shapes_agree(kept, saved[name]):
            return None
        if kept:
            mapped[name] = kept
    if not any(name in saved for name in by_id.values()):
        return None
    return _make_state(groups, state, mapped, by_id, key)


def read_settings(raw: object, *, key: str = "") -> OptimizerState | None:
    """An optimizer's settings alone, where its parameters cannot be told apart (``mapped`` is False)."""
    items = as_mapping(raw)
    groups = _raw_groups(items)
    if items is None or groups is None:
        return None
    return _make_state(groups, as_mapping(items["state"]) or {}, None, {}, key)


def _raw_groups(items: Mapping[Any, Any] | None) -> list[Mapping[Any, Any]] | None:
    groups = [as_mapping(group) for group in items.get("param_groups", ())] if items and "state" in items else []
    valid = [group for group in groups if group is not None and isinstance(group.get("params"), list | tuple)]
    return valid if valid and len(valid) == len(groups) else None


def _names_of(groups: list[Mapping[Any, Any]], names: list[str]) -> dict[int | str, str] | None:
    """The name of every parameter id of the groups, or ``None``."""
    identities = [identity for group in groups for identity in group["params"]]
    if not all(isinstance(identity, int | str) for identity in identities) or len(set(identities)) != len(identities):
        return None
    own: list[object] = []
    for group in groups:
        listed = group.get("param_names")
        own.extend(listed if isinstance(listed, list | tuple) else ())
    if len(own) == len(identities) and all(isinstance(name, str) for name in own):
        listed_names = [str(name) for name in own]
    elif all(isinstance(identity, str) for identity in identities):
        listed_names = [str(identity) for identity in identities]
    elif len(identities) == len(names):
        return dict(zip(identities, names, strict=True))
    else:
        return None
    plain, _ = strip_prefix(listed_names)
    return dict(zip(identities, (plain[name] for name in listed_names), strict=True)) if plain else None


def _shapes_agree(kept: Mapping[str, object], shape: tuple[int, ...]) -> bool:
    for key, value in kept.items():
        if isinstance(value, TensorLike) and not str(key).endswith(_FACTORED):
            own = tuple(value.shape)
            if own != shape and not (math.prod(own) == 1 and len(own) <= 1):
                return False
    return True


def _make_state(
    groups: list[Mapping[Any, Any]],
    raw_state: Mapping[Any, Any],
    mapped: Mapping[str, Mapping[str, object]] | None,
    by_id: Mapping[int | str, str],
    key: str,
) -> OptimizerState:
    kept = [state for state in (as_mapping(value) for value in raw_state.values()) if state]
    built = tuple(_make_group(group, tuple(by_id[i] for i in group["params"]) if by_id else ()) for group in groups)
    steps = [group.step for group in built] + [as_count(state.get("step")) for state in kept]
    return OptimizerState(
        kind=_tell_kind(groups, kept),
        groups=built,
        state=mapped or {},
        step=max((step for step in steps if step is not None), default=None),
        key=clean_text(key),
        mapped=mapped is not None,
    )


def _tell_kind(groups: list[Mapping[Any, Any]], kept: list[Mapping[str, object]]) -> Kind:
    if any("exp_avg" in state and "exp_avg_sq" in state for state in kept):
        return "adam-like"
    first = groups[0]
    known = {"momentum_buffer"}
    if "dampening" in first and "momentum" in first and all(known.issuperset(state) for state in kept):
        return "sgd"
    return "unknown"


def _make_group(raw: Mapping[Any, Any], names: tuple[str, ...]) -> OptimizerGroup:
    betas = raw.get("betas")
    pair = tuple(_as_number(beta) for beta in betas) if isinstance(betas, list | tuple) else ()
    return OptimizerGroup(
        names=names,
        lr=_as_number(raw.get("lr")),
        momentum=_as_number(raw.get("momentum")),
        dampening=_as_number(raw.get("dampening")),
        nesterov=_as_flag(raw.get("nesterov")),
        betas=(pair[0], pair[1]) if len(pair) == 2 and pair[0] is not None and pair[1] is not None else None,
        eps=_as_number(raw.get("eps")),
        weight_decay=_as_number(raw.get("weight_decay")),
        amsgrad=_as_flag(raw.get("amsgrad")),
        initial_lr=_as_number(raw.get("initial_lr")),
        step=as_count(raw.get("step")),
    )


def _as_number(value: object) -> float | None:
    if isinstance(value, TensorLike):  # a tensor learning rate, as capturable optimizers keep it
        tensor = as_tensor(value) if count_elements(value) == 1 else None
        value = None if tensor is None or tensor.is_complex() else tensor.item()
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def _as_flag(value: object) -> bool | None:
    return value if isinstance(value, bool) else None


def _is_computable(value: object) -> bool:
    """A dense tensor, not one that expands a few bytes to a great many elements."""
    if isinstance(value, TensorRef):
        return count_elements(value) * value.dtype.itemsize <= max(_MOST_EXPANSION * value.storage.nbytes, 2**20)
    return isinstance(value, Tensor | ArrayNode)


def _as_float(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
