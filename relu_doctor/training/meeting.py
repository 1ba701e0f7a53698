"""Which processes train a model together, and how their monitors find each other without ever waiting for good."""

from __future__ import annotations

import hashlib
import sys
from collections import Counter
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn

from relu_doctor.errors import ConfigError
from relu_doctor.observe.graph.names import strip_wrappers
from relu_doctor.observe.graph.sharding import is_spread

PATIENCE = timedelta(seconds=60)  # for monitors that are not made: one process alone may have one
_OWN = "each reports what it saw itself"
_SPREAD = (
    "the parameters are spread over processes: gradients and updates are not followed, and units are known by the "
    "forwards that are observed alone"
)
_IN_STEP = "SyncBatchNorm communicates in each forward: units that fall silent together are told at a window's close"
_TOGETHER, _APART, _LATE = "together", "apart", "late"
_MET: Counter[tuple[int, ...]] = Counter()  # how many monitors these processes have made


@dataclass(frozen=True, slots=True)
class Meeting:
    """The processes that train a model together.

    Attributes:
        group: a process group of the monitor's own; ``None`` where it is alone.
        in_step: a forward of the model communicates (FSDP2, SyncBatchNorm), so that none of them may run one alone.
        note: for the report; empty where nothing is to be said.
        warning: to be said at once.
    """

    group: Any = None
    in_step: bool = False
    note: str = ""
    warning: str = ""


def meet(model: nn.Module, inside: nn.Module, ranks: Any) -> Meeting:
    """Find the other processes that train a model, and make a process group with them; all of them must call this.

    Args:
        model: as the user has it, in its wrapper.
        inside: the module that is watched.
        ranks: ``"all"``, ``"alone"`` or a process group.

    Raises:
        ConfigError: ``ranks`` is none of these.
    """
    distributed = torch.distributed
    if ranks not in ("all", "alone") and not _is_group(ranks):
        raise ConfigError(f'ranks must be "all", "alone" or a process group, found {ranks!r}.')
    if ranks == "alone" or not distributed.is_available() or not distributed.is_initialized():
        return Meeting()
    if _is_tensor_parallel(inside):
        return Meeting(note=f"layers are spread over processes (tensor parallel): {_OWN}")
    told = tuple(sorted(distributed.get_process_group_ranks(ranks))) if _is_group(ranks) else ()
    told = told or _told_by_wrapper(model, inside)
    members = told or tuple(range(distributed.get_world_size()))
    if len(members) < 2 or distributed.get_rank() not in members:
        return Meeting()
    in_step = bool(_spread(inside)) or any(isinstance(module, nn.SyncBatchNorm) for module in inside.modules())
    try:
        found = _agreed(members, _fingerprint(inside, values=not told))
        if found == _TOGETHER:
            whole = len(members) == distributed.get_world_size()
            group = distributed.new_group(
                None if whole else list(members),
                backend="gloo",
                timeout=_timeout(),
                use_local_synchronization=not whole,
                group_desc="relu_doctor",
            )
            return Meeting(group, in_step, note=_SPREAD if _spread(inside) else _IN_STEP if in_step else "")
    except Exception as error:  # noqa: BLE001  whatever it is, the training goes on
        return Meeting(warning=f"the ranks could not be brought together ({type(error).__name__}: {error}); {_OWN}.")
    if found == _LATE:
        return Meeting(
            warning=f"monitors were not made by all of the {len(members)} ranks that train this model within "
            f'{PATIENCE.seconds} s; {_OWN}. Make one in each of them, or say ranks="alone".'
        )
    return Meeting(note=f"the processes hold different models, or different weights of one: {_OWN}")


def _is_group(ranks: Any) -> bool:
    return torch.distributed.is_available() and isinstance(ranks, torch.distributed.ProcessGroup)


def _told_by_wrapper(model: nn.Module, inside: nn.Module) -> tuple[int, ...]:
    """The ranks that DistributedDataParallel, around the model or inside it, or FSDP2's mesh says that there are."""
    for module in (model, *model.modules(), *inside.modules()):
        if isinstance(module, nn.parallel.DistributedDataParallel):
            return tuple(sorted(torch.distributed.get_process_group_ranks(module.process_group)))
    return tuple(sorted({int(rank) for each in _spread(inside) for rank in each.device_mesh.mesh.flatten()}))


def _spread(model: nn.Module) -> list[Any]:
    return [parameter for parameter in model.parameters() if is_spread(parameter)]


def _is_tensor_parallel(model: nn.Module) -> bool:
    """Whether something else than FSDP2 deals parameters to processes, which then see the same inputs."""
    kind: Any = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())
    spread = _spread(model)
    dealt = any(sum(placement.is_shard() for placement in each.placements) > 1 for each in spread)
    return bool(spread) and (dealt or not any(isinstance(module, kind) for module in model.modules()))


def _fingerprint(model: nn.Module, *, values: bool) -> str:
    """What must be alike in all processes: names and shapes, and where no wrapper sees to it, the values."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{strip_wrappers(name)} {tuple(parameter.shape)} {parameter.dtype}".encode())
        if values and not is_spread(parameter) and not parameter.is_meta:
            digest.update(_sum(parameter).hex().encode())
    return digest.hexdigest()


def _sum(parameter: Tensor) -> float:
    values = parameter.detach()
    return float((values.abs() if values.is_complex() else values).double().sum())


def _agreed(members: tuple[int, ...], fingerprint: str) -> str:
    """What the processes find of each other; the same in all of them, and none waits longer than it has patience."""
    store: Any = torch.distributed.distributed_c10d._get_default_store()
    while True:
        number, _MET[members] = _MET[members], _MET[members] + 1
        key = f"relu_doctor/{'_'.join(map(str, members))}/{number}"
        if not store.check([f"{key}/found"]):  # else the others have met without this process
            break
    store.set(f"{key}/{torch.distributed.get_rank()}", fingerprint)
    if store.add(f"{key}/arrived", 1) == len(members):
        alike = {store.get(f"{key}/{rank}") for rank in members} == {fingerprint.encode()}
        return _decide(store, key, _TOGETHER if alike else _APART)
    try:
        store.wait([f"{key}/found"], PATIENCE)
    except Exception:  # noqa: BLE001  stores have errors of their own for a wait that was too long
        return _decide(store, key, _LATE)
    return str(store.get(f"{key}/found").decode())


def _decide(store: Any, key: str, found: str) -> str:
    """What the first process that decides has decided."""
    store.compare_set(f"{key}/found", "", found)
    return str(store.get(f"{key}/found").decode())


def _timeout() -> timedelta | None:
    """The time-out that the user gave the process group of the training."""
    group: Any = torch.distributed.group.WORLD
    try:
        timeout = group._get_backend(torch.device("cpu")).options._timeout
    except (RuntimeError, AttributeError):  # another backend, or an earlier torch: its default
        return None
    return timeout if isinstance(timeout, timedelta) else None
