"""Finding things in what a file held: the state dict, the optimizers, the counters, the placeholders."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from relu_doctor.checkpoints.constructors import KNOWN_CLASSES
from relu_doctor.checkpoints.nodes import ArrayNode, Global, Placeholder, StorageRef, TensorRef
from relu_doctor.errors import CheckpointError, UnsafeCheckpointError
from relu_doctor.text import clean_text, name_some

USUAL_KEYS = (
    "state_dict", "model_state_dict", "model", "net", "network", "module", "weights", "params", "model_state",
    "net_state_dict", "policy", "actor", "generator", "g", "netG",
)  # fmt: skip
_STEP_KEYS = ("global_step", "step", "num_updates", "iteration", "iter", "steps", "n_iter", "total_steps")
_EPOCH_KEYS = ("epoch", "current_epoch", "epochs_done")
# Averages and optimizers hold tensors named like the model's, and are not the model.
_SIDE_KEYS = re.compile(
    r"(^|[._\-])(ema|emas|swa|averaged?|shadow|optim\w*|opt|sched\w*|scaler)([._\-\[]|$)", re.IGNORECASE
)
_SETTINGS_KEYS = re.compile(r"arg|conf|cfg|hparam|hyper|param|opt|setting|sched|scaler|callback|loop", re.IGNORECASE)
_DEEPEST = 5
_MOST_CHILDREN = 10_000
_MINOR_FRACTION = 0.01  # of the elements of the largest candidate

TensorLike = Tensor | TensorRef | ArrayNode


@dataclass(frozen=True, slots=True)
class FoundState:
    """A state dict and where it was found: ``key`` is its dotted path, ``others`` those of the ones not taken."""

    key: str
    items: Mapping[Any, Any]
    others: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Candidate:
    path: tuple[str, ...]
    items: Mapping[Any, Any]
    pure: bool  # nothing but tensors
    numel: int

    @property
    def key(self) -> str:
        return ".".join(self.path)


def as_mapping(value: object) -> Mapping[Any, Any] | None:
    """The items of a dict, of an unknown subclass of dict, or of a module that ``--trust`` has loaded."""
    if isinstance(value, nn.Module):
        return value.state_dict()
    if isinstance(value, Placeholder):
        return value.items or None
    return value if isinstance(value, Mapping) else None


def count_elements(value: TensorLike) -> int:
    """How many elements a tensor has, read or not."""
    return value.numel() if isinstance(value, Tensor) else value.numel


def find_state_dict(root: object, *, shown: str, key: str | None = None) -> FoundState:
    """The model's parameters among all that a file holds.

    Args:
        root: what the file held.
        shown: the file's name for messages, already clean.
        key: take the state dict at this dotted path instead of searching.

    Raises:
        UnsafeCheckpointError: the parameters are inside an object that only code could make.
        CheckpointError: none is there, or several and none stands out.
    """
    candidates = list(_candidates(root))
    if key is not None:
        chosen = [candidate for candidate in candidates if candidate.key == key]
        if not chosen:
            there = name_some((candidate.key for candidate in candidates), 8) or "none"
            raise CheckpointError(f"'{shown}' holds no state dict at '{clean_text(key)}'; those there: {there}.")
        return _found(chosen[0], candidates)
    if candidates and not candidates[0].path and candidates[0].pure:
        return _found(candidates[0], candidates)
    main = [candidate for candidate in candidates if not _SIDE_KEYS.search(candidate.key)]
    main = _leave_out_minor(main)
    usual = [candidate for candidate in main if candidate.path and candidate.path[-1] in USUAL_KEYS]
    if usual:
        ranks = [(len(candidate.path), USUAL_KEYS.index(candidate.path[-1])) for candidate in usual]
        main = [candidate for candidate, rank in zip(usual, ranks, strict=True) if rank == min(ranks)]
    else:
        _refuse_needed_placeholder(root, shown, everywhere=not candidates)
        main = main or _leave_out_minor(candidates)
    if not main:
        _refuse_needed_placeholder(root, shown, everywhere=True)
        raise CheckpointError(f"'{shown}' holds no state dict: it is {describe(root)}.")
    if len(main) > 1:
        raise CheckpointError(
            f"'{shown}' holds several state dicts and none stands out: "
            f"{name_some((candidate.key or '(top level)' for candidate in main), 8)}. "
            "Save the one to be scanned in a file of its own."
        )
    return _found(main[0], candidates)


def _leave_out_minor(candidates: list[_Candidate]) -> list[_Candidate]:
    largest = max((candidate.numel for candidate in candidates), default=0)
    return [candidate for candidate in candidates if candidate.numel >= max(_MINOR_FRACTION * largest, min(largest, 1))]


def _found(chosen: _Candidate, candidates: list[_Candidate]) -> FoundState:
    others = tuple(
        candidate.key
        for candidate in candidates
        if candidate.path[: len(chosen.path)] != chosen.path and candidate.pure
    )
    return FoundState(chosen.key, chosen.items, others)


def _candidates(root: object) -> Iterator[_Candidate]:
    """Every mapping that holds tensors under names, shallow ones first; optimizers left out."""
    for path, value in _walk(root):
        items = as_mapping(value)
        if not items or is_optimizer(items):
            continue
        numel = tensors = rest = 0
        for name, part in items.items():
            if isinstance(part, TensorLike) and isinstance(name, str):
                tensors += 1
                numel += count_elements(part) if len(part.shape) else 0  # single numbers are metrics and counters
            elif not (isinstance(name, str) and name.endswith("_extra_state")):
                rest += 1
        if tensors:
            yield _Candidate(path, items, rest == 0, numel)


def _walk(root: object) -> Iterator[tuple[tuple[str, ...], object]]:
    """Containers in the order of their depth, each once; what is inside an optimizer is left out."""
    level: list[tuple[tuple[str, ...], object]] = [((), root)]
    seen: set[int] = set()
    for _ in range(_DEEPEST):
        below: list[tuple[tuple[str, ...], object]] = []
        for path, value in level:
            if id(value) in seen:
                continue
            seen.add(id(value))
            yield path, value
            if not isinstance(value, nn.Module):
                below.extend(((*path, name), child) for name, child in _children(value))
        level = below


def _children(value: object) -> Iterator[tuple[str, object]]:
    items = as_mapping(value)
    pairs: Iterator[tuple[object, object]] = iter(())
    if items is not None:
        if not is_optimizer(items):
            pairs = ((clean_text(name, 80), child) for name, child in items.items())
    elif isinstance(value, list | tuple) and len(value) <= _MOST_CHILDREN:
        pairs = ((f"[{index}]", child) for index, child in enumerate(value))
    for name, child in pairs:
        if isinstance(child, list | tuple | Mapping | Placeholder | nn.Module):
            yield str(name), child


def is_optimizer(items: Mapping[Any, Any]) -> bool:
    """Whether a mapping is the state dict of a ``torch.optim`` optimizer."""
    return isinstance(items.get("param_groups"), list | tuple) and "state" in items


def find_optimizers(root: object) -> list[tuple[str, Mapping[Any, Any]]]:
    """Every optimizer's state dict in the file, with its dotted path."""
    found = []
    for path, value in _walk(root):
        items = as_mapping(value)
        if items and is_optimizer(items):
            found.append((".".join(path), items))
    return found


def find_step(root: object, *, container: str = "") -> int | None:
    """How many optimizer steps had been made, if the file says so."""
    return _find_counter(root, _STEP_KEYS, container)


def find_epoch(root: object, *, container: str = "") -> int | None:
    """The epoch, as the file counts it."""
    return _find_counter(root, _EPOCH_KEYS, container)


def _find_counter(root: object, names: tuple[str, ...], state_key: str) -> int | None:
    places = [
        (path, value)
        for path, value in _walk(root)
        if not any(_SETTINGS_KEYS.search(part) or _SIDE_KEYS.search(part) for part in path)
    ]
    beside = tuple(state_key.split(".")[:-1]) if state_key else ()
    places.sort(key=lambda place: place[0] != beside)  # first what stands beside the state dict
    for _, value in places:
        items = as_mapping(value) if not isinstance(value, nn.Module) else None
        if not items or is_optimizer(items) or all(isinstance(part, TensorLike) for part in items.values()):
            continue
        for name in names:
            number = as_count(items.get(name))
            if number is not None:
                return number
    return None


def as_count(value: object) -> int | None:
    """``value`` as a count, when it is a whole number that is not negative, or a tensor of one such number."""
    if isinstance(value, TensorLike):
        if count_elements(value) != 1:
            return None
        tensor = as_tensor(value)
        if tensor is None or tensor.is_complex():
            return None
        value = tensor.item()
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if not math.isfinite(value) or value < 0 or value != int(value) or value >= 2**63:
        return None
    return int(value)


def as_tensor(value: object) -> Tensor | None:
    """A tensor of any of the kinds met here, read from its file where needed; ``None`` for anything else."""
    if isinstance(value, Tensor):
        return value.detach()
    return value.load() if isinstance(value, TensorRef | ArrayNode) else None


def find_placeholders(root: object, most: int = 50) -> tuple[str, ...]:
    """What stands in place of objects that were not made: ``"args: argparse.Namespace"``, at most ``most`` of them."""
    found: list[str] = []
    seen: set[int] = set()
    waiting: list[tuple[str, object]] = [("", root)]
    while waiting and len(found) < most:
        path, value = waiting.pop()
        if isinstance(value, Placeholder | Global):
            if not (isinstance(value, Global) and value.dotted in KNOWN_CLASSES):
                found.append(f"{clean_text(path, 100) or '(top level)'}: {clean_text(value.dotted, 150)}")
            if isinstance(value, Global):
                continue
        if not isinstance(value, Mapping | list | tuple | set | frozenset | Placeholder) or id(value) in seen:
            continue
        seen.add(id(value))
        children: list[tuple[str, object]] = []
        if isinstance(value, Mapping | Placeholder):
            items = value.items if isinstance(value, Placeholder) else value
            for name, child in items.items():
                if isinstance(name, Placeholder):
                    children.append((f"{path} (a key)", name))
                children.append((f"{path}.{clean_text(name, 60)}" if path else clean_text(name, 60), child))
        else:
            children.extend((f"{path}[{index}]", child) for index, child in enumerate(value))
        waiting.extend(reversed(children))
    return tuple(found)


def _refuse_needed_placeholder(root: object, shown: str, *, everywhere: bool) -> None:
    """Raise when the parameters are inside an object that was not made: the root, or what a usual key holds."""
    places: list[tuple[str, object]] = [("", root)]
    items = as_mapping(root)
    if items is not None:
        places.extend((name, items[name]) for name in USUAL_KEYS if name in items)
        if everywhere:
            places.extend((clean_text(name, 80), child) for name, child in items.items())
    for name, value in places:
        if isinstance(value, Placeholder) and holds_tensors(value):
            where = f"'{name}' in '{shown}'" if name else f"'{shown}'"
            raise UnsafeCheckpointError(
                f"{where} is a pickled object of {clean_text(value.dotted)}, whose parameters only its own code can "
                "take out. Save its state_dict(), or run again with --trust if you trust the file: that runs its code."
            )


def holds_tensors(value: object) -> bool:
    """Whether a tensor, or its data, is anywhere inside."""
    waiting, seen = [value], set[int]()
    while waiting:
        part = waiting.pop()
        if isinstance(part, TensorLike | StorageRef):
            return True
        if id(part) in seen:
            continue
        seen.add(id(part))
        if isinstance(part, Placeholder):
            waiting.extend((part.args, part.kwargs, part.state, part.items, part.elements))
        elif isinstance(part, Mapping):
            waiting.extend(part.values())
        elif isinstance(part, list | tuple):
            waiting.extend(part)
    return False


def describe(value: object) -> str:
    """What a file holds, in a few words."""
    if isinstance(value, Placeholder):
        return f"an object of {clean_text(value.dotted)}"
    if isinstance(value, Mapping):
        return f"a dictionary with {name_some(value, 6)}" if value else "an empty dictionary"
    if isinstance(value, TensorLike):
        return "a single tensor"
    return f"a {type(value).__name__}"
