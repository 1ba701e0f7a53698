"""A process of its own for one contestant of the benchmark of overhead: it times and weighs on command.

Each contestant has its own process, so that none works with what another changed or imported. A batch is timed between
two pulls from the iterable that the contestant reads, and a plain forward of a twin of the model in between: what is
compared lies milliseconds apart.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from bench_models import WORKLOADS, perceptron
from rivals import TOOLS
from torch import Tensor, nn

import relu_doctor
from relu_doctor.observe.forwards.registry import Reading
from relu_doctor.observe.probe import Probe
from relu_doctor.terms import Statistics

Run = Callable[[nn.Module, Iterable[Tensor], int], object]
_STATUS, _CORES = Path("/proc/self/status"), Path("/proc/stat")


def naive_hook(model: nn.Module, batches: Iterable[Tensor], dim: int) -> dict[str, Tensor]:
    """What one writes in five minutes: four statistics per unit in a forward hook of every ReLU."""
    highest: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def read(module: nn.Module, args: tuple[Tensor]) -> None:
            z = args[0].detach()
            others = [axis for axis in range(z.dim()) if axis != dim % z.dim()]
            (z > 0).float().mean(others), z.mean(others), z.std(others)
            maximum = z.amax(others)
            highest[name] = torch.maximum(highest.get(name, maximum), maximum)

        return read

    hooks = [
        module.register_forward_pre_hook(hook(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.ReLU)
    ]
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for each in hooks:
        each.remove()
    return highest


def probe_alone(statistics: str) -> Run:
    """This project's probe, without what a scan does besides."""

    def run(model: nn.Module, batches: Iterable[Tensor], dim: int) -> Probe:
        seen = 0
        with Probe(model, statistics=Statistics(statistics)) as probe:
            for batch in batches:
                probe.observe(lambda batch=batch: model(batch), Reading(len(batch), None, seen))  # type: ignore[misc]
                seen += len(batch)
        return probe

    return run


def scan(statistics: str) -> Run:
    """This project's scan, whole."""
    return lambda model, batches, dim: relu_doctor.scan(model, batches, statistics=statistics)


OURS: dict[str, Run] = {
    "naive hook": naive_hook,
    "full": scan("full"),
    "full, probe alone": probe_alone("full"),
    "minimal": scan("minimal"),
    "minimal, probe alone": probe_alone("minimal"),
    "full, no kernel": scan("full"),
    "full, no kernel, probe alone": probe_alone("full"),
}
RUNS: dict[str, Run] = {**OURS, **{name: tool.run for name, tool in TOOLS.items() if name != "relu-doctor"}}


class Paced:
    """Batches that time whoever reads them, with a plain forward of a twin before each.

    Attributes:
        plain, spent: seconds of each plain forward, and of the reader with each batch.
        others: what share of the cores other processes had meanwhile.
    """

    def __init__(self, twin: nn.Module, batches: list[Tensor]) -> None:
        self.twin, self.batches = twin, batches
        self.plain: list[float] = []
        self.spent: list[float] = []
        self.others: list[float] = []
        self.start = self.end = 0.0

    def __iter__(self) -> Iterator[Tensor]:
        self.start = self.start or now()
        for batch in self.batches:
            elsewhere, begun = others_spent(), now()
            with torch.no_grad():
                self.twin(batch)
            between = now()
            yield batch
            self.end = now()
            self.plain.append(between - begun)
            self.spent.append(self.end - between)
            self.others.append((others_spent() - elsewhere) / (self.end - begun) / (os.cpu_count() or 1))


def now() -> float:
    """Seconds, when all that was asked of the device is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def others_spent() -> float:
    """Seconds of any core that all other processes have had since the machine started; 0 where it does not tell."""
    if not _CORES.exists():
        return 0.0
    user, nice, system, _, _, *more = map(int, _CORES.read_text(encoding="ascii").split(maxsplit=9)[1:9])
    return (user + nice + system + sum(more)) / os.sysconf("SC_CLK_TCK") - time.process_time()


def timed(run: Run, model: nn.Module, twin: nn.Module, batches: list[Tensor], dim: int) -> dict[str, Any]:
    """One round: seconds per batch, and before the first and after the last."""
    paced = Paced(twin, batches)
    begun = now()
    run(model, paced, dim)
    sums = {"plain": paced.plain, "spent": paced.spent, "others": paced.others}
    return {**sums, "before": paced.start - begun, "after": now() - paced.end}


class Weighed:
    """Batches that note the peak of memory with each; ``peaks`` in bytes above what was held before."""

    def __init__(self, batches: list[Tensor]) -> None:
        self.batches = batches
        self.held = memory("VmRSS")
        self.peaks: list[int] = []

    def __iter__(self) -> Iterator[Tensor]:
        for batch in self.batches:
            forget_peak()
            yield batch
            self.peaks.append(memory("VmHWM") - self.held)


def weighed(run: Run, model: nn.Module, twin: nn.Module, batches: list[Tensor], dim: int) -> dict[str, Any]:
    """Peaks of memory in bytes above what is held before: of plain forwards, of each batch, of the whole."""
    gc.collect()
    plain = Weighed(batches)
    for batch in plain:
        with torch.no_grad():
            twin(batch)
    gc.collect()
    pulled = Weighed(batches)
    run(model, pulled, dim)
    return {"plain": max(plain.peaks), "peaks": pulled.peaks, "after": memory("VmHWM") - pulled.held}


def memory(key: str) -> int:
    """Resident memory of this process in bytes, now (``VmRSS``) or at its peak (``VmHWM``); the device's on CUDA."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated() if key == "VmRSS" else torch.cuda.max_memory_allocated()
    line = next(line for line in _STATUS.read_text(encoding="ascii").splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def forget_peak() -> None:
    """The peak of memory begins anew."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def bytes_per_unit(statistics: str) -> float:
    """What the probe holds for every unit after some batches."""
    model, batches = WORKLOADS["resnet18"].build("cpu", 2, batch=8)
    probe = probe_alone(statistics)(model, batches, 1)
    assert isinstance(probe, Probe)
    held: dict[int, int] = {}
    for stats in probe.stats["eval"].values():
        for declared in dataclasses.fields(stats):
            value = getattr(stats, declared.name)
            if isinstance(value, Tensor):
                held[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    return sum(held.values()) / sum(site.num_units for site in probe.sites())


def growth(count: int) -> float:
    """Bytes by which a scan grows with each small batch, between the first tenth of them and the end."""
    model, _ = WORKLOADS["tiny"].build("cpu", 1)
    held: list[int] = []

    def batches() -> Iterator[Tensor]:
        for index in range(count):
            if index in {count // 10, count - 1}:
                gc.collect()
                held.append(memory("VmRSS"))
            yield torch.randn(8, 64)

    relu_doctor.scan(model, batches())
    return (held[1] - held[0]) / (count - count // 10)


def first_use() -> float:
    """Seconds that the first scans of a process take beyond the second ones: compiling or loading the kernel."""
    torch.manual_seed(0)
    models: list[tuple[nn.Module, Tensor]] = [
        (perceptron(512, 1), torch.randn(1024, 512)),
        (nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU()), torch.randn(64, 3, 32, 32)),
    ]
    for model, x in models:
        relu_doctor.scan(model, x[:2])  # all but the kernel, which so few values do not need
    spent = []
    for _ in range(2):
        begun = time.perf_counter()
        for model, x in models:
            relu_doctor.scan(model, x)
        spent.append(time.perf_counter() - begun)
    return spent[0] - spent[1]


def main() -> None:
    """Answers commands from standard input, a JSON value per line."""
    name, workload, device, count = sys.argv[1:]
    answer = sys.stdout
    sys.stdout = tempfile.TemporaryFile("w")  # noqa: SIM115 what contestants print goes nowhere
    warnings.simplefilter("ignore")
    if "no kernel" in name:
        sys.modules["numba"] = None  # type: ignore[assignment]  # so that importing it fails
    if name in RUNS:
        about = WORKLOADS[workload]
        limit = TOOLS[name].batches if name in TOOLS else int(count)
        model, batches = about.build(device, min(int(count), limit))
        twin = copy.deepcopy(model)
        commands: dict[str, Callable[[], Any]] = {
            "time": lambda: timed(RUNS[name], model, twin, batches, about.dim),
            "weigh": lambda: weighed(RUNS[name], model, twin, batches, about.dim),
        }
        for _ in range(2):
            with torch.no_grad():
                twin(batches[0])
        RUNS[name](model, batches[:2], about.dim)
    else:
        commands = {
            "bytes": lambda: {each.value: bytes_per_unit(each.value) for each in Statistics},
            "growth": lambda: growth(int(count)),
            "first use": first_use,
        }
    print("ready", file=answer, flush=True)
    for line in sys.stdin:
        print(json.dumps(commands[line.strip()]()), file=answer, flush=True)


if __name__ == "__main__":
    main()
