"""Building the model that a checkpoint belongs to, and putting the checkpoint into it."""

from __future__ import annotations

import copy
import tomllib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from relu_doctor.checkpoints.formats import Checkpoint, StateDict
from relu_doctor.checkpoints.nodes import ArrayNode, Global, OrderedItems, Placeholder, TensorRef
from relu_doctor.checkpoints.optimizer import strip_prefix
from relu_doctor.checkpoints.specs import call, importable, resolve
from relu_doctor.errors import ModelSpecError, StateDictMismatchError, UnsupportedModelError
from relu_doctor.text import clean_text, closest_name

__all__ = ["build_model", "load_into", "parse_arguments", "resolve"]

_MOST_LISTED = 5
_MOST_COMPARED = 2000
_PLAIN_LOADING = (nn.Module._load_from_state_dict, nn.Module.load_state_dict, nn.Module.set_extra_state)
_PYTHON_WORDS = {"True": True, "False": False, "None": None}  # TOML would spell them in lower case, or not at all


def parse_arguments(args: Sequence[str], *, option: str = "--model-arg") -> dict[str, object]:
    """Keyword arguments from ``key=value`` texts.

    A value is read as TOML (``3``, ``1e-3``, ``true``, ``[1, 2]``, ``"text"``); Python's ``True``, ``False`` and
    ``None`` are taken as such; anything else is the bare string.

    Raises:
        ModelSpecError: an argument has no ``=``, its key is no identifier, or a key comes twice.
    """
    arguments: dict[str, object] = {}
    for text in args:
        key, equals, value = text.partition("=")
        key = key.strip()
        if not equals or not key.isidentifier():
            raise ModelSpecError(f"{option} '{clean_text(text)}' is not of the form key=value.")
        if key in arguments:
            raise ModelSpecError(f"{option} gives '{clean_text(key)}' twice.")
        arguments[key] = _parse_value(value.strip())
    return arguments


def _parse_value(text: str) -> object:
    if text in _PYTHON_WORDS:
        return _PYTHON_WORDS[text]
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (tomllib.TOMLDecodeError, ValueError, RecursionError):
        return text
    return parsed["value"] if list(parsed) == ["value"] else text


def build_model(spec: str, args: Sequence[str] = ()) -> nn.Module:
    """Build the model that ``--model`` names.

    Args:
        spec: a callable that returns an ``nn.Module``, a module class, or a module that exists already.
        args: ``key=value`` texts for the callable.

    Raises:
        ModelSpecError: not importable, not callable, other arguments are needed, the callable raised, or what it
            returned is no ``nn.Module``.
    """
    target = resolve(spec, what="--model")
    shown = f"--model '{clean_text(spec)}'"
    arguments = parse_arguments(args)
    if isinstance(target, nn.Module):
        if arguments:
            raise ModelSpecError(f"{shown} is a finished {type(target).__name__}; --model-arg has nothing to go to.")
        return target
    if not callable(target):
        raise ModelSpecError(
            f"{shown} is a {type(target).__name__}; a class or function that makes the model is needed."
        )
    with importable(spec):
        model = call(target, arguments, shown=shown, option="--model-arg")
    if not isinstance(model, nn.Module):
        raise ModelSpecError(f"{shown} returned a {type(model).__name__}; a torch.nn.Module is needed.")
    return model


def load_into(model: nn.Module, checkpoint: Checkpoint) -> tuple[str, ...]:
    """Put a checkpoint's tensors into a model, all or none.

    Names are compared without what DataParallel, ``torch.compile`` and FSDP put into them, on both sides. A prefix that
    all names of the file have and the model has not (``model.`` of a Lightning module) is left out. Tensors are copied
    into the model's own, on its device and in its dtype.

    Returns:
        What is worth saying about the load, in whole sentences.

    Raises:
        UnsupportedModelError: the model is on the meta device.
        StateDictMismatchError: tensors are missing, unexpected or of another shape; the model is as it was.
    """
    own: Mapping[str, Tensor | object] = model.state_dict(keep_vars=True)
    if any(isinstance(value, Tensor) and value.is_meta for value in own.values()):
        raise UnsupportedModelError(
            f"{type(model).__name__} has tensors on the meta device, which hold nothing; build it on the CPU."
        )
    plain, _ = strip_prefix(own)
    full = {short: name for name, short in plain.items()}
    given, prefix = _without_foreign_prefix(checkpoint.state_dict, set(full))
    notes = [f"The names in the file were read without their prefix '{clean_text(prefix)}'."] if prefix else []
    tensors = {full.get(name, name): tensor for name, tensor in given.items()}
    _add_aliases(tensors, own)
    extra_notes = _add_extra_state(tensors, own, {f"{prefix}{short}": name for short, name in full.items()}, checkpoint)
    problems = _compare(tensors, own)
    state = StateDict(tensors)
    state._metadata = getattr(checkpoint.state_dict, "_metadata", None)
    if problems and not _accepted_on_trial(model, state):
        names = f"{len(checkpoint.state_dict):,} tensors of '{clean_text(checkpoint.path)}'"
        raise StateDictMismatchError(
            f"the {names} do not fit {type(model).__name__}: {'; '.join(problems)}. "
            "Is this the right --model, and are its --model-arg those of the training?"
        )
    absent_extra = any(name.endswith("_extra_state") and name not in tensors for name in own)
    backup = _back_up(model, own)
    try:
        with torch.no_grad():
            model.load_state_dict(state, strict=not absent_extra)
    except Exception as error:
        _restore(own, backup)
        raise StateDictMismatchError(
            f"'{clean_text(checkpoint.path)}' could not be loaded into {type(model).__name__}: "
            f"{type(error).__name__}: {clean_text(error)}"
        ) from error
    return (*notes, *extra_notes, *_note_casts(tensors, own))


def _without_foreign_prefix(state_dict: Mapping[str, Tensor], wanted: set[str]) -> tuple[dict[str, Tensor], str]:
    """The file's tensors without a leading component that all have and the model has not, where they fit then."""
    given = dict(state_dict)
    if not given or wanted.intersection(given):
        return given, ""
    prefix = ""
    while True:
        heads = {name.partition(".")[0] for name in given}
        if len(heads) != 1 or not all("." in name for name in given):
            return dict(state_dict), ""
        head = heads.pop() + "."
        prefix += head
        given = {name.removeprefix(head): tensor for name, tensor in given.items()}
        if wanted.intersection(given):
            return given, prefix


def _add_aliases(tensors: dict[str, Tensor], own: Mapping[str, object]) -> None:
    """Fill in the names of a tied tensor that the file holds under one of its names only, as safetensors does."""
    by_identity: dict[int, Tensor] = {id(own[name]): tensor for name, tensor in tensors.items() if name in own}
    for name, value in own.items():
        if name not in tensors and isinstance(value, Tensor) and id(value) in by_identity:
            tensors[name] = by_identity[id(value)]


def _add_extra_state(
    tensors: dict[str, Tensor], own: Mapping[str, object], full: Mapping[str, str], checkpoint: Checkpoint
) -> list[str]:
    left_out = []
    for name, value in checkpoint.extra_state.items():
        place = full.get(name, name)
        if place not in own:
            continue
        if _is_plain(value):
            tensors[place] = value  # type: ignore[assignment]  # torch passes it to set_extra_state as it is
        else:
            left_out.append(name)
    return [f"The extra state {_list(left_out)} holds objects that were not made; left out."] if left_out else []


def _is_plain(value: object) -> bool:
    waiting, seen = [value], set[int]()
    while waiting:
        part = waiting.pop()
        if isinstance(part, Placeholder | Global | TensorRef | ArrayNode | OrderedItems):
            return False
        if id(part) not in seen and isinstance(part, dict | list | tuple | set | frozenset):
            seen.add(id(part))
            waiting.extend(part.items() if isinstance(part, dict) else part)
    return True


def _compare(tensors: Mapping[str, Tensor], own: Mapping[str, object]) -> list[str]:
    """What keeps the tensors from fitting, one clause per kind of trouble; empty when they fit."""
    missing = [name for name in own if name not in tensors and not name.endswith("_extra_state")]
    unexpected = [name for name in tensors if name not in own]
    shaped, kinds = [], []
    for name, tensor in tensors.items():
        mine = own.get(name)
        if not isinstance(mine, Tensor) or is_lazy(mine) or name.endswith("_extra_state"):
            continue
        scalar = mine.dim() == 0 and tensor.shape == (1,)  # files of PyTorch 0.3 keep scalars so, and torch takes them
        if mine.shape != tensor.shape and not scalar:
            shaped.append(f"{clean_text(name, 100)} is {_shape(tensor)}, {_shape(mine)} expected")
        elif tensor.is_complex() and not mine.is_complex():
            kinds.append(f"{clean_text(name, 100)} is {tensor.dtype}, {mine.dtype} expected")
    problems = []
    if tensors and not any(name in own for name in tensors):
        problems.append("no name is common to both, so it may be another model's checkpoint")
    if missing:
        problems.append(f"{len(missing)} missing: {_list(missing, unexpected, 'in the file')}")
    if unexpected:
        problems.append(f"{len(unexpected)} unexpected: {_list(unexpected, missing, 'in the model')}")
    if shaped:
        problems.append(f"{len(shaped)} of another shape: {_cut(shaped)}")
    if kinds:
        problems.append(f"{len(kinds)} complex where real numbers are needed: {_cut(kinds)}")
    return problems


def _list(names: Sequence[str], choices: Sequence[str] = (), where: str = "") -> str:
    """A handful of names, each with the closest of the choices."""
    entries = []
    for name in names[:_MOST_LISTED]:
        near = closest_name(name, choices[:_MOST_COMPARED])
        entries.append(clean_text(name, 100) + (f" ({clean_text(near, 100)} {where}?)" if near else ""))
    return _cut(entries, len(names))


def _cut(entries: Sequence[str], total: int | None = None) -> str:
    rest = (len(entries) if total is None else total) - min(len(entries), _MOST_LISTED)
    return ", ".join(entries[:_MOST_LISTED]) + (f" and {rest} more" if rest else "")


def _shape(tensor: Tensor) -> str:
    return "x".join(str(extent) for extent in tensor.shape) or "a scalar"


def _accepted_on_trial(model: nn.Module, state: Mapping[str, Tensor]) -> bool:
    """Whether the modules' own loading code takes the names nevertheless (old names that it knows); tried on a copy."""
    if not any(_loading_code(module) for module in model.modules()):
        return False
    try:
        copy.deepcopy(model).load_state_dict(state, strict=True)
    except Exception:  # noqa: BLE001  # copying and loading run the model's own code
        return False
    return True


def _loading_code(module: nn.Module) -> list[str]:
    """The Python modules of the code by which a module loads its state in a way of its own."""
    kind = type(module)
    methods = [kind._load_from_state_dict, kind.load_state_dict, kind.set_extra_state]
    code = [method for method in methods if method not in _PLAIN_LOADING]
    code.extend(module._load_state_dict_pre_hooks.values())
    code.extend(module._load_state_dict_post_hooks.values())
    return [str(getattr(function, "__module__", "")) for function in code]


def _back_up(model: nn.Module, own: Mapping[str, object]) -> dict[str, Tensor]:
    """The model's tensors, if code that is not torch's own takes part in the load and may raise half way."""
    places = [place for module in model.modules() for place in _loading_code(module)]
    if all(place.startswith("torch.nn.") for place in places):
        return {}
    return {name: v.detach().clone() for name, v in own.items() if isinstance(v, Tensor) and not is_lazy(v)}


def _restore(own: Mapping[str, object], backup: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, saved in backup.items():
            value = own[name]
            if isinstance(value, Tensor):
                value.data.copy_(saved)


def _note_casts(tensors: Mapping[str, Tensor], own: Mapping[str, object]) -> list[str]:
    """Which dtypes were turned into others."""
    casts: dict[tuple[torch.dtype, torch.dtype], int] = {}
    for name, tensor in tensors.items():
        mine = own.get(name)
        if isinstance(mine, Tensor) and not name.endswith("_extra_state") and mine.dtype != tensor.dtype:
            casts[tensor.dtype, mine.dtype] = casts.get((tensor.dtype, mine.dtype), 0) + 1
    return [f"{count} tensors were saved as {old} and loaded as {new}." for (old, new), count in casts.items()]
