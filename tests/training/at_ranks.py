"""What several processes on the loopback do that train one model together, each with a monitor."""

from __future__ import annotations

import copy
import multiprocessing
import os
import signal
import socket
import time
import warnings
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

from relu_doctor.observe.gradients import GradientWatch
from relu_doctor.training import meeting
from relu_doctor.training.history import History
from relu_doctor.training.monitor import Monitor
from relu_doctor.training.windows import Window

EVERY, WINDOW, STEPS = 4, 10, 37
Act = Callable[[int], dict[str, Any]]


def run(act: Act, count: int, folder: Path, *, seconds: float = 60, ends: int | None = None) -> list[dict[str, Any]]:
    """What each of several processes finds.

    Args:
        act: what a process does, by its rank.
        count: how many there are.
        folder: for the results.
        seconds: the time-out of their process group.
        ends: how many of them come to an end; the rest is killed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # it imports once for all
    works = [
        context.Process(target=_work, args=(rank, count, port, str(folder), act, seconds)) for rank in range(count)
    ]
    for work in works:
        work.start()
    try:
        for work in works[: count if ends is None else ends]:
            work.join(120)
    finally:
        for work in works:
            if work.is_alive():
                os.kill(work.pid, signal.SIGKILL)
            work.join()
    return [torch.load(path, weights_only=False) for path in sorted(folder.glob("*.pt"))]


def _work(rank: int, count: int, port: int, folder: str, act: Act, seconds: float) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    os.environ["FOLDER"] = folder
    timeout = timedelta(seconds=seconds)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", timeout=timeout, world_size=count, rank=rank)
    found = act(rank)
    torch.save(found, Path(folder) / f"{rank}.pt")
    if dist.is_initialized():
        dist.destroy_process_group()


class Branching(nn.Module):
    """Layers that only some ranks run, or only later."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(6, 12), nn.Linear(12, 3), nn.Linear(6, 10), nn.Linear(6, 9)
        self.c_out, self.d_out = nn.Linear(10, 3), nn.Linear(9, 3)

    def forward(self, x: Tensor, ways: Tensor) -> Tensor:
        """(inputs, 6) to (inputs, 3), also through ``c`` and ``d`` where the two ``ways`` say so."""
        y = self.b(F.relu(self.a(x)))
        if ways[0, 0]:
            y = y + self.c_out(F.relu(self.c(x)))
        if ways[0, 1]:
            y = y + self.d_out(F.relu(self.d(x)))
        return y


def branching() -> Branching:
    """With dead units, and some that fire seldom."""
    torch.manual_seed(0)
    model = Branching()
    with torch.no_grad():
        model.a.bias[:2] = -100
        model.c.bias[3] = -100
        model.d.bias[4] = -100
        model.a.bias[2:5] = torch.tensor([-0.9, -1.1, -1.3])
    return model


def batches_of(rank: int, count: int, steps: int = STEPS) -> list[tuple[Tensor, Tensor]]:
    """A rank's own inputs: the last batch is uneven, ``c`` is never run by rank 0, and ``d`` late by the last only."""
    made = []
    for step in range(1, steps + 1):
        size = 24 if step < steps else 24 - 5 * rank
        ways = torch.tensor([[rank > 0, rank == count - 1 and step > WINDOW + 3]]).expand(size, 2)
        seen_before = {(0, 13): (0, 5)}.get((rank, step), (0, 9) if step == 17 else (rank, step))
        made.append((inputs_of(*seen_before, size), ways))
    return made


def inputs_of(rank: int, step: int, size: int) -> Tensor:
    """Other ones in each rank and step."""
    return torch.randn(size, 6, generator=torch.Generator().manual_seed(1000 * rank + step))


class Kept:
    """A sink that keeps what can be compared."""

    def __init__(self) -> None:
        self.windows: list[dict[str, Any]] = []

    def __call__(self, window: Window) -> None:
        """Take a window."""
        coverage = window.diagnosis.table.coverage
        self.windows.append(
            {
                "steps": (window.first_step, window.last_step),
                "units": window.diagnosis.units.to_dict("list"),
                "lives": window.units.to_dict("list"),
                "coverage": (coverage.num_inputs, coverage.distinct_inputs),
                "notes": coverage.notes,
                "numbers": dict(window.numbers),
                "effective_rank": dict(zip(window.sites["site_id"], window.sites["effective_rank"], strict=True)),
            }
        )


def merging(rank: int) -> dict[str, Any]:
    """A run by several processes, and in the first of them one that replays it all."""
    count = dist.get_world_size()
    model = branching()
    wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = torch.optim.SGD(wrapped.parameters(), 0.05)
    kept, states, losses, returned = Kept(), [], [], []
    with Monitor(wrapped, optimizer=optimizer, every=EVERY, window=WINDOW, sinks=[kept]) as monitor:
        for x, ways in batches_of(rank, count):
            states.append(copy.deepcopy(model.state_dict()))
            loss = wrapped(x, ways).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            returned.append(monitor.step(loss=loss) is not None)
    told: list[Any] = [None] * count
    dist.all_gather_object(told, losses)
    found: dict[str, Any] = {"windows": kept.windows, "returned": returned, "losses": told}
    found["diagnosed"] = monitor.diagnosis is not None
    if rank == 0:
        found["replayed"] = replayed(states, count)
    dist.barrier()
    return found


def replayed(states: list[dict[str, Tensor]], count: int) -> list[dict[str, Any]]:
    """One process that runs every rank's batches with each step's weights."""
    model, kept = branching(), Kept()
    data = [batches_of(rank, count) for rank in range(count)]
    with Monitor(model, every=EVERY, window=WINDOW, sinks=[kept], ranks="alone") as monitor:
        for step, state in enumerate(states):
            model.load_state_dict(state)
            model.zero_grad()
            for batches in data:
                model(*batches[step]).square().mean().backward()
            monitor.step()
    return kept.windows


def treatment(rank: int) -> dict[str, Any]:
    """Each rank tells its monitor of a treated unit; the first replays what all of them saw, and their treatments."""
    count = dist.get_world_size()
    found = treated([rank], count, "all")
    if rank == 0:
        found["replayed"] = treated(range(count), count, "alone")["windows"]
    dist.barrier()
    return found


def treated(whose: Iterable[int], count: int, ranks: str) -> dict[str, Any]:
    """A run on the batches of some ranks, in which a unit is treated."""
    model, kept, site = branching(), Kept(), ""
    data = [batches_of(rank, count, 45) for rank in whose]
    options: dict[str, Any] = {"every": 1, "window": WINDOW, "effective_rank": True, "maturity": 9}
    with Monitor(model, sinks=[kept], ranks=ranks, **options) as monitor:
        for step in range(45):
            for batches in data:
                model(*batches[step])
            monitor.step()
            if step == 22:
                site = monitor._sites[0].site_id
                monitor.treated(site, [0])
    with torch.no_grad():
        outputs = F.relu(model.a(data[0][-1][0]))
    return {"windows": kept.windows, "site": site, "outputs": outputs}


def sequence(group: Any) -> int:
    """How many collectives a group has made."""
    return int(group._get_backend(torch.device("cpu"))._get_sequence_number_for_group())


def quiet(rank: int) -> dict[str, Any]:
    """Collectives of steps with a monitor, without one, and with the gradient watch alone."""
    counts: dict[str, Any] = {}
    for name in ("bare", "monitor", "watch"):
        model = branching()
        sites = _sites(model)
        wrapped = nn.parallel.DistributedDataParallel(model)
        optimizer = torch.optim.SGD(wrapped.parameters(), 0.05)
        monitor = Monitor(wrapped, optimizer=optimizer, every=5, window=1000) if name == "monitor" else None
        watch = GradientWatch(model, sites) if name == "watch" else None
        before, own = sequence(dist.group.WORLD), 0 if monitor is None else sequence(monitor._ranks._group)
        for step in range(1, 21):
            x = torch.randn(8, 6, generator=torch.Generator().manual_seed(10 * step + rank)).abs()
            x = -x if rank == 0 else x  # some units fire on one rank's inputs only
            wrapped(x, torch.ones(8, 2)).square().mean().backward()
            if watch is not None:
                watch.read(step)
            optimizer.step()
            optimizer.zero_grad()
            if monitor is not None:
                monitor.step()
        counts[name] = sequence(dist.group.WORLD) - before
        if watch is not None:
            counts["heard"] = watch.last_fired.tolist()
            with torch.no_grad():
                counts["fires here"] = (model.a(x) > 0).any(0).tolist()
        if monitor is not None:
            counts["own"] = sequence(monitor._ranks._group) - own
            monitor.close()
    return counts


def _sites(model: nn.Module) -> list[Any]:
    with Monitor(model, every=1, window=1, ranks="alone") as monitor:
        model(torch.randn(4, 6), torch.ones(4, 2)).sum().backward()
        monitor.step()
        model.zero_grad()
        return monitor._sites


def sharded(model: Branching, mesh: Any) -> nn.Module:
    """Each layer and the root."""
    for layer in (model.a, model.b, model.c, model.d, model.c_out, model.d_out):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def fully_sharded(rank: int) -> dict[str, Any]:
    """FSDP2: a run without a monitor, the same with one, and a replay."""
    count = dist.get_world_size()
    mesh = init_device_mesh("cpu", (count,))
    found: dict[str, Any] = {}
    states: list[dict[str, Tensor]] = []
    for name in ("bare", "monitored"):
        model = sharded(branching(), mesh)
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        kept, losses = Kept(), []
        monitor = None
        if name == "monitored":
            options: dict[str, Any] = {"every": EVERY, "window": WINDOW, "effective_rank": True}
            monitor = Monitor(model, optimizer=optimizer, sinks=[kept], **options)
        for x, ways in batches_of(rank, count):
            ways = torch.stack([ways[:, 0] | True, ways[:, 1] & False], 1)
            if name == "bare":
                states.append({key: value.full_tensor().clone() for key, value in model.state_dict().items()})
            loss = model(x, ways).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            if monitor is not None:
                monitor.step(loss=loss)
        if monitor is not None:
            monitor.close()
            found["failures"] = dict(monitor._live.failures)
        found[name] = losses
        found["windows"] = kept.windows
        found[f"{name} weights"] = {key: value.full_tensor() for key, value in model.state_dict().items()}
    if rank == 0:
        plain, kept = branching(), Kept()
        data = [batches_of(each, count) for each in range(count)]
        with Monitor(plain, every=EVERY, window=WINDOW, sinks=[kept], ranks="alone") as monitor:
            for step, state in enumerate(states):
                plain.load_state_dict(state)
                for batches in data:
                    x = batches[step][0]
                    plain(x, torch.tensor([[True, False]]).expand(len(x), 2))
                monitor.step()
        found["replayed"] = kept.windows
    dist.barrier()
    return found


def new_ways(rank: int) -> dict[str, Any]:
    """FSDP2: from some step on the data of one rank take another way through the same layers."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)
    model: Any = TwoWays()
    for layer in (model.a, model.b):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer, kept = torch.optim.SGD(model.parameters(), 0.01), Kept()
    with Monitor(model, optimizer=optimizer, every=2, window=10, sinks=[kept]) as monitor:
        for step in range(45):
            x = torch.randn(8, 6, generator=torch.Generator().manual_seed(2 * step + rank))
            model(x, torch.full((8,), rank == 1 and step >= 14)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            monitor.step()
    return {"windows": kept.windows, "failures": dict(monitor._live.failures)}


class TwoWays(nn.Module):
    """The same layers, and another rectifier between them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        """(inputs, 6) to (inputs, 5)."""
        z = self.a(x)
        return self.b(torch.clamp(z - 1, 0, 6) if other[0] else F.relu(z))


def uneven(rank: int) -> dict[str, Any]:
    """No wrapper, and ranks that make different numbers of steps."""
    model, kept, folder = branching(), Kept(), Path(os.environ["FOLDER"]) / "history"
    with Monitor(model, every=1, window=WINDOW, sinks=[kept], history=folder) as monitor:
        for x, ways in batches_of(rank, 2)[: 36 if rank else 13]:
            model(x, ways).sum().backward()
            monitor.step()
    told = History.read(folder).windows["last_step"].tolist()
    return {"windows": kept.windows, "counted": monitor.windows, "history": told}


def apart(rank: int) -> dict[str, Any]:
    """Each process trains a model of its own."""
    torch.manual_seed(rank)
    model, kept = Branching(), Kept()
    with Monitor(model, every=1, window=5, sinks=[kept]) as monitor:
        for x, ways in batches_of(rank, 2)[:5]:
            model(x, ways).sum().backward()
            monitor.step()
    return {"windows": kept.windows}


def destroyed(rank: int) -> dict[str, Any]:
    """The processes leave each other before the monitor is closed."""
    model, kept = branching(), Kept()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with Monitor(model, every=1, window=5, sinks=[kept]) as monitor:
            for x, ways in batches_of(rank, 2)[:8]:
                model(x, ways).sum().backward()
                monitor.step()
            dist.barrier()
            dist.destroy_process_group()
    return {"windows": kept.windows, "warned": [str(each.message) for each in caught]}


def one_monitor(rank: int) -> dict[str, Any]:
    """Only one rank has one."""
    meeting.PATIENCE = timedelta(seconds=1)
    model, kept = branching(), Kept()
    if rank:
        dist.barrier()
        return {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with Monitor(model, every=1, window=5, sinks=[kept]) as monitor:
            for x, ways in batches_of(rank, 2)[:10]:
                model(x, ways).sum().backward()
                monitor.step()
    dist.barrier()
    return {"windows": kept.windows, "warned": [str(each.message) for each in caught]}


def in_error(rank: int) -> dict[str, Any]:
    """One rank leaves its loop by an exception."""
    model, kept, started = branching(), Kept(), time.monotonic()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            with Monitor(model, every=1, window=5, sinks=[kept]) as monitor:
                for step, (x, ways) in enumerate(batches_of(rank, 2)[:22]):
                    if rank == 1 and step == 12:
                        raise KeyError("on purpose")
                    model(x, ways).sum().backward()
                    monitor.step()
        except KeyError:
            pass
    took = time.monotonic() - started
    dist.barrier()
    return {"windows": kept.windows, "took": took, "warned": [str(each.message) for each in caught]}


def several(rank: int) -> dict[str, Any]:
    """All that two processes can do after each other."""
    acts = {
        "merging": merging,
        "quiet": quiet,
        "fully sharded": fully_sharded,
        "new ways": new_ways,
        "uneven": uneven,
        "one monitor": one_monitor,
        "in error": in_error,
        "apart": apart,
        "treatment": treatment,
        "destroyed": destroyed,
    }
    return {name: act(rank) for name, act in acts.items()}


def lost(rank: int, how: str) -> dict[str, Any]:
    """A rank that is killed, or that stops answering."""
    model, kept, started = branching(), Kept(), time.monotonic()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with Monitor(model, every=1, window=5, sinks=[kept]) as monitor:
            for step, (x, ways) in enumerate(batches_of(rank, 2)[:32]):
                if rank == 1 and step == 12:
                    os.kill(os.getpid(), signal.SIGKILL if how == "killed" else signal.SIGSTOP)
                model(x, ways).sum().backward()
                monitor.step()
                time.sleep(0.01)
    took = time.monotonic() - started
    return {"windows": kept.windows, "took": took, "warned": [str(each.message) for each in caught]}
