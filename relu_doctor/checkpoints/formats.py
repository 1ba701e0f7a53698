"""A checkpoint file as one object: the model's tensors, the optimizer's state, and how far training had come."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from relu_doctor.checkpoints.archives import SAFETENSORS, ZIP, check_file, check_zip, read_archive, tell_format
from relu_doctor.checkpoints.nodes import OrderedItems, Placeholder, TensorRef
from relu_doctor.checkpoints.optimizer import (
    NamesAndShapes,
    OptimizerState,
    plain_name,
    read_optimizer,
    read_settings,
    strip_prefix,
)
from relu_doctor.checkpoints.search import (
    as_mapping,
    as_tensor,
    find_epoch,
    find_optimizers,
    find_placeholders,
    find_state_dict,
    find_step,
    holds_tensors,
)
from relu_doctor.checkpoints.specs import importable
from relu_doctor.errors import CheckpointError, UnsafeCheckpointError
from relu_doctor.text import clean_text, name_some

_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
_STEP_METADATA = ("step", "global_step", "iteration")


class StateDict(dict[str, Tensor]):
    """A state dict that keeps the module versions (``_metadata``) that ``load_state_dict`` looks at."""

    _metadata: Mapping[str, object] | None = None


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One checkpoint, read.

    Attributes:
        path: the file.
        format: ``"PyTorch zip"``, ``"PyTorch legacy"`` or ``"safetensors"``, told by the content.
        state_dict: the model's tensors on the CPU, by names without wrapper prefixes; none requires a gradient.
        key: where in the file they were found: ``""`` at the top, else a dotted path.
        prefix: what was stripped from the front of every name.
        optimizer: the optimizer's state. Where its parameters could not be told apart it has ``mapped`` False.
        step: optimizer steps made, or ``None``.
        epoch: as the file counts it, or ``None``.
        placeholders: objects that were not made, as ``"args: argparse.Namespace"``.
        notes: what a report should say about the reading, in whole sentences.
        extra_state: the entries of the state dict that are no tensors (``…_extra_state``), where they are plain.
        raw_optimizers: the optimizers' own state dicts with their paths, for :meth:`with_parameters`.
    """

    path: Path
    format: str
    state_dict: Mapping[str, Tensor] = field(repr=False)
    key: str = ""
    prefix: str = ""
    optimizer: OptimizerState | None = field(default=None, repr=False)
    step: int | None = None
    epoch: int | None = None
    placeholders: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    extra_state: Mapping[str, object] = field(default_factory=dict, repr=False)
    raw_optimizers: tuple[tuple[str, Mapping[Any, Any]], ...] = field(default=(), repr=False)

    def with_parameters(self, names_and_shapes: NamesAndShapes) -> Checkpoint:
        """The same checkpoint, its optimizer tied to the parameters of a model.

        A state dict does not say which entries are parameters, nor their order in the optimizer. The model does: give
        ``((name, parameter.shape) for name, parameter in model.named_parameters())``.
        """
        if not self.raw_optimizers:
            return self
        pairs = list(names_and_shapes.items() if isinstance(names_and_shapes, Mapping) else names_and_shapes)
        plain, _ = strip_prefix(name for name, _ in pairs)
        optimizer, notes = _pick_optimizer(self.raw_optimizers, [(plain[name], shape) for name, shape in pairs])
        if optimizer is None or (not optimizer.mapped and self.optimizer is not None):
            return self
        kept = tuple(note for note in self.notes if not note.startswith(_OPTIMIZER_NOTE))
        step = self.step if self.step is not None else optimizer.step
        return replace(self, optimizer=optimizer, notes=kept + notes, step=step)


_OPTIMIZER_NOTE = "Optimizer state: "


def load_checkpoint(path: str | Path, *, trust: bool = False, key: str | None = None) -> Checkpoint:
    """Read a checkpoint without running any code in it.

    Args:
        path: a file of ``torch.save`` (either format) or a ``.safetensors`` file; the content decides, not the name.
        trust: unpickle with everything the file asks for. That runs code from the file.
        key: the dotted path of the state dict in the file, instead of searching for it.

    Raises:
        UnsafeCheckpointError: the model's tensors depend on an object that only code in the file could make.
        CheckpointError: missing, a directory, truncated, damaged, of no known format, or without a state dict.
    """
    file = Path(path)
    check_file(file)
    kind = tell_format(file)
    if kind == SAFETENSORS:
        return _load_safetensors(file)
    root = _load_trusted(file, kind) if trust else read_archive(file, kind).root
    shown = clean_text(file)
    found = find_state_dict(root, shown=shown, key=key)
    placeholders = find_placeholders(root)
    tensors, extra, notes = _load_tensors(found.items, shown)
    state_dict, prefix = _without_prefix(tensors, _module_versions(found.items))
    if found.others:
        notes.append(f"The file also holds tensors under {name_some(found.others, 6)}; not used.")
    optimizers = tuple(find_optimizers(root))
    candidates = [(name, t.shape) for name, t in state_dict.items() if not name.endswith(_BUFFERS)]
    optimizer, optimizer_notes = _pick_optimizer(optimizers, candidates)
    step = find_step(root, container=found.key)
    return Checkpoint(
        path=file,
        format=kind,
        state_dict=state_dict,
        key=found.key,
        prefix=prefix,
        optimizer=optimizer,
        step=step if step is not None or optimizer is None else optimizer.step,
        epoch=find_epoch(root, container=found.key),
        placeholders=placeholders,
        notes=(*notes, *optimizer_notes),
        extra_state={name.removeprefix(prefix): value for name, value in extra.items()},
        raw_optimizers=optimizers,
    )


def _load_trusted(path: Path, kind: str) -> object:
    """What ``torch.load`` makes of the file, its code included."""
    if kind == ZIP:
        check_zip(path)
    try:
        with warnings.catch_warnings(), importable(""):  # the user's own classes lie in the current directory
            warnings.simplefilter("ignore")  # about the file's age, not about the user's data
            return torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:
        raise CheckpointError(
            f"'{clean_text(path)}' could not be unpickled, even with --trust: "
            f"{type(error).__name__}: {clean_text(error)}. The code that it needs must be importable."
        ) from error


def _load_tensors(items: Mapping[Any, Any], shown: str) -> tuple[dict[str, Tensor], dict[str, object], list[str]]:
    """The tensors of a state dict, read; its extra entries; and what to note."""
    tensors: dict[str, Tensor] = {}
    extra: dict[str, object] = {}
    unmade: dict[str, str] = {}
    skipped: list[object] = []
    cache: dict[tuple[str, torch.dtype], torch.UntypedStorage] = {}
    for name, value in items.items():
        tensor = value.load(cache) if isinstance(value, TensorRef) else as_tensor(value)
        if tensor is not None and isinstance(name, str):
            tensors[name] = tensor
        elif isinstance(name, str) and name.endswith("_extra_state"):
            extra[name] = value
        elif isinstance(value, Placeholder) and (value.dotted.startswith("torch._utils._") or holds_tensors(value)):
            unmade[str(name)] = value.dotted
        else:
            skipped.append(name)
    if unmade:
        raise UnsafeCheckpointError(
            f"{len(unmade)} of the tensors in '{shown}' depend on code that the file would have to run: "
            f"{name_some(unmade)}, made by {name_some(dict.fromkeys(unmade.values()), 3)}. "
            "Run again with --trust if you trust the file: that runs its code."
        )
    notes = [f"Entries of the state dict that are no tensors were left out: {name_some(skipped)}."] if skipped else []
    return tensors, extra, notes


def _module_versions(items: Mapping[Any, Any]) -> dict[str, dict[str, int]]:
    """The versions of the modules that were saved, per module path: nothing else of ``_metadata`` is passed on."""
    attributes = as_mapping(items.state) if isinstance(items, OrderedItems) else getattr(items, "__dict__", None)
    metadata = as_mapping((attributes or {}).get("_metadata")) or {}
    versions = {}
    for path, entry in metadata.items():
        version = (as_mapping(entry) or {}).get("version")
        if isinstance(path, str) and type(version) is int:
            versions[path] = {"version": version}
    return versions


def _without_prefix(tensors: dict[str, Tensor], versions: dict[str, dict[str, int]]) -> tuple[StateDict, str]:
    plain, prefix = strip_prefix(tensors)
    state_dict = StateDict((plain[name], tensor) for name, tensor in tensors.items())
    if versions:
        state_dict._metadata = {
            plain_name(f"{path}.".removeprefix(prefix).removesuffix(".")): entry
            for path, entry in versions.items()
            if f"{path}.".startswith(prefix)
        }
    return state_dict, prefix


def _pick_optimizer(
    optimizers: Iterable[tuple[str, Mapping[Any, Any]]], names_and_shapes: NamesAndShapes
) -> tuple[OptimizerState | None, tuple[str, ...]]:
    """The optimizer whose parameters are the model's, and a note where that is not certain."""
    given, pairs = list(optimizers), dict(names_and_shapes)
    tied = [state for key, raw in given if (state := read_optimizer(raw, pairs, key=key)) is not None]
    if len(tied) > 1:
        names = name_some(state.key for state in tied)
        return tied[0], (f"{_OPTIMIZER_NOTE}{names} all fit the model; '{tied[0].key}' was taken.",)
    if tied:
        return tied[0], ()
    if len(given) == 1:
        settings = read_settings(given[0][1], key=given[0][0])
        return settings, (
            f"{_OPTIMIZER_NOTE}it could not be told which parameter is which, so only its settings are used.",
        )
    if given:
        return None, (f"{_OPTIMIZER_NOTE}none of {name_some(key for key, _ in given)} fits the model's parameters.",)
    return None, ()


def _load_safetensors(path: Path) -> Checkpoint:
    shown = clean_text(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata: dict[str, str] = file.metadata() or {}
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"'{shown}' is a damaged or truncated safetensors file: {clean_text(error)}. Copy or save it again."
        ) from error
    if not tensors:
        raise CheckpointError(f"'{shown}' holds no tensors.")
    state_dict, prefix = _without_prefix(tensors, {})
    step = next((count for name in _STEP_METADATA if (count := _as_whole(metadata.get(name))) is not None), None)
    return Checkpoint(path, SAFETENSORS, state_dict, prefix=prefix, step=step, epoch=_as_whole(metadata.get("epoch")))


def _as_whole(text: str | None) -> int | None:
    return int(text) if text is not None and text.isascii() and text.isdigit() and len(text) < 19 else None
