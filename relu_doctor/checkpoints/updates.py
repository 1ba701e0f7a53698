"""How far the weights of each unit moved, from optimizer state and from an earlier checkpoint of the same run."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from relu_doctor.checkpoints.formats import Checkpoint
from relu_doctor.checkpoints.optimizer import OptimizerState
from relu_doctor.diagnose.origins import LearningRateEvidence, Ratios
from relu_doctor.observe.graph.names import strip_wrappers
from relu_doctor.observe.parameters import weight_norms
from relu_doctor.observe.sites import ActivationSite
from relu_doctor.scanning import Observation

_STANDING = 0.1  # of their norm: weight decay takes the rest where no gradient holds against it
_COUNTED = ("step", "iter", "iteration", "epoch")  # what stands before the number that tells when a file was saved
_MOST = 2**53  # beyond that a number in a name is no step
_FAMILIES = {"adam-like": "Adam-like", "sgd": "SGD"}


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """A scanned checkpoint, as far as the size of updates is concerned.

    Attributes:
        checkpoint: with its optimizer tied to the model's parameters.
        observation: what its scan saw.
        weights: the model's parameters by qualified name, whatever the file called them.
    """

    checkpoint: Checkpoint
    observation: Observation
    weights: Mapping[str, Tensor]


def learning_rate_evidence(now: Snapshot, earlier: Sequence[Snapshot] = ()) -> LearningRateEvidence | None:
    """What a checkpoint's file, and earlier ones of its run, record about the size of updates.

    The movement of a unit that fell silent is taken from the last file in which it fired to the next one, so that the
    steps after its death do not dilute it; of every other unit from the latest earlier file to this one.

    Args:
        now: the checkpoint that is judged.
        earlier: checkpoints of the same run, in the order of training.

    Returns:
        ``None`` where the files record nothing.
    """
    optimizer = now.checkpoint.optimizer
    if optimizer is None and not earlier:
        return None
    sites = now.observation.sites
    last: Ratios = {}
    if optimizer is not None and optimizer.mapped:
        updates = {name: update for name in now.weights if (update := optimizer.last_update(name)) is not None}
        last = _ratios(sites, updates, now.weights)
    full: Ratios = _full_steps(sites, optimizer, now.weights)
    if earlier:
        last = _of_standing_weights(last, now, earlier[0])
        full = _of_standing_weights(full, now, earlier[0])
    moved, per_update, newly = _history(now, earlier)
    return LearningRateEvidence(
        learning_rates=() if optimizer is None else optimizer.learning_rates,
        optimizer="" if optimizer is None else _FAMILIES.get(optimizer.kind, ""),
        last_update=last,
        full_step=full,
        between=moved,
        per_update=per_update,
        earlier=_called(earlier),
        from_start=bool(earlier) and earlier[0].checkpoint.step == 0,
        at_start=now.checkpoint.step == 0,
        newly_silent=newly,
    )


def _called(earlier: Sequence[Snapshot]) -> str:
    if not earlier:
        return ""
    return earlier[0].checkpoint.path.name if len(earlier) == 1 else f"{len(earlier)} earlier checkpoints of the run"


def _history(now: Snapshot, earlier: Sequence[Snapshot]) -> tuple[Ratios, Ratios, dict[str, NDArray[np.bool_]]]:
    """Movement and movement per update of each unit, and which fired in any earlier file and are silent now."""
    moved: dict[str, NDArray[np.float64]] = {}
    per_update: dict[str, NDArray[np.float64]] = {}
    newly: dict[str, NDArray[np.bool_]] = {}
    chain = [*earlier, now]
    silent_now = _fired(now)
    for before, after in pairwise(chain):
        steps = _steps(before.checkpoint, after.checkpoint)
        changes = {
            name: tensor.float() - before.weights[name].float()
            for name, tensor in after.weights.items()
            if name in before.weights and tensor.shape == before.weights[name].shape
        }
        fired = _fired(before)
        for key, ratio in _ratios(now.observation.sites, changes, before.weights).items():
            if key not in silent_now:
                continue
            if key not in fired or len(fired[key]) != len(silent_now[key]):
                continue
            fell = fired[key] & ~silent_now[key]  # the last file in which it fired decides, so later pairs overwrite
            last_pair = after is now
            chosen = fell | (last_pair & ~newly.get(key, np.zeros_like(fell)))
            rate = ratio / steps if steps else np.full_like(ratio, np.nan)
            moved[key] = np.where(chosen, ratio, moved.get(key, np.full_like(ratio, np.nan)))
            per_update[key] = np.where(chosen, rate, per_update.get(key, np.full_like(ratio, np.nan)))
            newly[key] = newly.get(key, np.zeros_like(fell)) | fell
    return moved, per_update, newly


def _of_standing_weights(ratios: Ratios, now: Snapshot, first: Snapshot) -> Ratios:
    """Ratios of units whose weights have not all but vanished since: those that did say nothing of the rate."""
    standing = _ratios(now.observation.sites, now.weights, first.weights)
    return {
        key: np.where(standing[key] > _STANDING, ratio, np.nan) if key in standing else ratio
        for key, ratio in ratios.items()
    }


def _steps(before: Checkpoint, after: Checkpoint) -> int | None:
    return None if before.step is None or after.step is None else after.step - before.step


def _fired(snapshot: Snapshot) -> dict[str, NDArray[np.bool_]]:
    groups = snapshot.observation.table.units.groupby("site_id", sort=False)
    return {str(key): rows["inputs_fired"].to_numpy() > 0 for key, rows in groups}


def earlier_of_run(now: Snapshot, scanned: Iterable[Snapshot]) -> list[Snapshot]:
    """The earlier checkpoints of the same run among those scanned, in the order of training.

    Taken for the same run: the same folder, names that differ in their numbers only, the same tensors, and a smaller
    step (or epoch, where no step is recorded).
    """
    members = [
        other
        for other in scanned
        if _same_run(now.checkpoint, other.checkpoint) and _progress(other.checkpoint) < _progress(now.checkpoint)
    ]
    return sorted(members, key=lambda each: _progress(each.checkpoint))


def tie_optimizer(checkpoint: Checkpoint, model: nn.Module) -> Checkpoint:
    """The checkpoint with its optimizer's state under the names of a model's parameters."""
    pairs = [(strip_wrappers(name), tuple(parameter.shape)) for name, parameter in model.named_parameters()]
    return checkpoint.with_parameters(pairs)


def _progress(checkpoint: Checkpoint) -> tuple[float, float]:
    step = checkpoint.step if checkpoint.step is not None else -1
    epoch = checkpoint.epoch if checkpoint.epoch is not None else -1
    return (step, epoch)


def run_name(checkpoint: Checkpoint) -> str:
    """What the names of one run's checkpoints have in common: the file's name less its numbers."""
    words = re.split(r"[^A-Za-z]*\d+[^A-Za-z]*", checkpoint.path.stem)
    return "-".join(word for word in words if word) or "run"


def steps_of(saved: Sequence[tuple[str, int | None, int | None]]) -> list[int]:
    """When each of several checkpoints was saved, on one scale.

    The scale is the first that is known of all: the step that the file records, its epoch, the number in which the
    names differ, and the place among the names in natural order, in which 9 comes before 10.

    Args:
        saved: path, recorded step and recorded epoch of each, in any order.

    >>> steps_of([("step100.pt", None, None), ("step1000.pt", None, None), ("step200.pt", None, None)])
    [100, 1000, 200]
    """
    for recorded in ([step for _, step, _ in saved], [epoch for _, _, epoch in saved]):
        known = [each for each in recorded if each is not None]
        if len(known) == len(saved):
            return known
    parts = [re.split(r"(\d+)", path) for path, _, _ in saved]  # texts at even places, numbers at odd ones
    if len(saved) > 1 and all(each[::2] == parts[0][::2] for each in parts):
        columns = [place for place in range(1, len(parts[0]), 2) if len({int(each[place]) for each in parts}) > 1]
        named = [place for word in _COUNTED for place in columns if re.search(rf"{word}\W*_?$", parts[0][place - 1])]
        if named or len(columns) == 1:
            numbers = [int(each[(named or columns)[0]]) for each in parts]
            if max(numbers) < _MOST and len(set(numbers)) == len(numbers):
                return numbers
    keys = [[int(part) if place % 2 else part for place, part in enumerate(each)] for each in parts]
    order = sorted(range(len(saved)), key=keys.__getitem__)
    return [order.index(place) for place in range(len(saved))]


def _same_run(one: Checkpoint, other: Checkpoint) -> bool:
    shapes = [{name: tensor.shape for name, tensor in each.state_dict.items()} for each in (one, other)]
    return one.path.parent == other.path.parent and run_name(one) == run_name(other) and shapes[0] == shapes[1]


def _ratios(
    sites: Iterable[ActivationSite], changes: Mapping[str, Tensor], weights: Mapping[str, Tensor]
) -> dict[str, NDArray[np.float64]]:
    found: dict[str, NDArray[np.float64]] = {}
    for site in sites:
        if not site.num_units:
            continue
        ratio = weight_norms(site, changes) / weight_norms(site, weights)
        if not bool(ratio.isnan().all()):
            found[site.site_id] = ratio.numpy()
    return found


def _full_steps(
    sites: Iterable[ActivationSite], optimizer: OptimizerState | None, weights: Mapping[str, Tensor]
) -> dict[str, NDArray[np.float64]]:
    if optimizer is None or not optimizer.mapped or optimizer.kind != "adam-like":
        return {}
    steps = {
        name: torch.tensor(group.lr).expand(tensor.shape)
        for name, tensor in weights.items()
        if (group := optimizer.group_of(name)) is not None and group.lr is not None
    }
    ratios = _ratios(sites, steps, weights)
    # Where the weights have all but vanished (weight decay of a unit that is dead) the ratio says nothing.
    return {key: np.where(ratio < 1, ratio, np.nan) for key, ratio in ratios.items()}
