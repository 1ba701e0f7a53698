"""What a monitor costs: time of a training step with it, as a ratio to the same step without.

    python scripts/bench_training.py [--workloads …] [--contestants …] [--steps N] [--growth STEPS]

Needs the environment that `python scripts/test.py` makes. Each contestant's twin of the model and a plain one make
every step side by side in one process, in turn first and second, so that what is compared lies a step apart. The
steps that a monitor observes in full, those whose gradients it reads, those at which a window closes and all others are
kept apart; of each kind the median ratio is taken, and they are weighted as often as they come in a long run (here they
are made to come more often). In brackets the standard error of that, from the spread of the pairs. `plain again` shows
what the method itself makes of no difference.

Contestants: `defaults` (every 50 steps observed in full, a window of 500), `every step` (each observed in full),
`watch` (the gradients alone), `naive` (four statistics in a forward hook of every ReLU, each step); and, where they are
installed, the other tools that watch training, attached as their documentation says, with their own defaults
(`torchmortem` samples by itself, `torch-audit` looks at every 1000th step; `torch-audit, each` at every one).
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent))

from bench_models import Layer, ResNet, perceptron
from bench_overhead import machine

import relu_doctor
from relu_doctor.errors import ReLUDoctorWarning
from relu_doctor.training.monitor import Monitor
from relu_doctor.training.schedule import EACH, LISTEN

NEVER = 10**9
RATES = {"defaults": (50, 500), "every step": (1, 500)}  # every, window; all others know one kind of step
HERE = {"defaults": (10, 100), "every step": (1, 100)}  # the same as they are measured


@dataclass(frozen=True)
class Workload:
    """A model and the batches that it is trained on."""

    title: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]

    def batches(self, device: str) -> list[tuple[Tensor, Tensor]]:
        """Eight batches of inputs and labels."""
        generator = torch.Generator().manual_seed(1)
        made = [torch.randn(self.shape, generator=generator) for _ in range(8)]
        return [(x.to(device), torch.randint(10, self.shape[:1], generator=generator).to(device)) for x in made]


WORKLOADS = {
    "resnet18": Workload("ResNet-18, 32 x 3 x 32 x 32", lambda: ResNet(18), (32, 3, 32, 32)),
    "transformer": Workload(
        "6-layer transformer, 32 x 128 x 256",
        lambda: nn.Sequential(*(Layer(256, 1024, 4) for _ in range(6))),
        (32, 128, 256),
    ),
    "mlp": Workload("256-256 MLP, 64 x 256", lambda: perceptron(256, 2), (64, 256)),
}


class Trainee:
    """A twin of the model with its own optimizer, and a monitor or not."""

    def __init__(self, model: nn.Module, contestant: str, batches: list[tuple[Tensor, Tensor]]) -> None:
        self.model, self.batches = model, batches
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        self.monitor = MONITORS[contestant](model, self.optimizer)
        self.made = 0

    def step(self) -> float:
        """Seconds that a step takes."""
        begun = now()
        x, y = self.batches[self.made % len(self.batches)]
        output = self.model(x)
        loss = F.cross_entropy(output if output.dim() == 2 else output.mean(1), y)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        if self.monitor is not None:
            self.monitor.step(loss=loss)
        self.made += 1
        return now() - begun

    def kind(self, every: int, window: int) -> str:
        """Of the next step."""
        if (self.made + 1) % window == 0:
            return "closes"
        if self.made % every == 0:
            return "observed"
        return "heard" if self.made < EACH or self.made % LISTEN == 0 else "other"


def naive(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """What one writes in five minutes: four statistics per unit in a forward hook of every ReLU."""
    highest: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def read(module: nn.Module, args: tuple[Tensor]) -> None:
            z = args[0].detach()
            others = [axis for axis in range(z.dim()) if axis != (1 if z.dim() == 4 else z.dim() - 1)]
            (z > 0).float().mean(others), z.mean(others), z.std(others)
            maximum = z.amax(others)
            highest[name] = torch.maximum(highest.get(name, maximum), maximum)

        return read

    for name, module in model.named_modules():
        if isinstance(module, nn.ReLU):
            module.register_forward_pre_hook(hook(name))


def monitored(every: int, window: int) -> Callable[[nn.Module, torch.optim.Optimizer], Monitor]:
    """A monitor at some rate."""
    return lambda model, optimizer: relu_doctor.Monitor(model, optimizer=optimizer, every=every, window=window)


class Watcher(Protocol):
    """What is told of each step, and let go in the end."""

    def step(self, loss: Tensor) -> object:
        """A step was made."""

    def close(self) -> object:
        """The run is over."""


MONITORS: dict[str, Callable[[nn.Module, torch.optim.Optimizer], Watcher | None]] = {
    "plain": lambda model, optimizer: None,
    "plain again": lambda model, optimizer: None,
    "defaults": monitored(*HERE["defaults"]),
    "every step": monitored(*HERE["every step"]),
    "watch": monitored(NEVER, NEVER),
    "naive": naive,
}


class Torchmortem:
    """The autopsy that torchmortem makes of a run."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.autopsy = import_module("torchmortem").Autopsy(model, optimizer)
        self.autopsy.attach()

    def step(self, loss: Tensor) -> None:
        """A step was made."""
        self.autopsy.step(loss=loss.item())

    def close(self) -> None:
        """Let go of the model."""
        self.autopsy.detach()


class TorchAudit:
    """torch-audit's patches around a run."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, **options: int) -> None:
        self.auditor = import_module("torch_audit").autopatch(model, optimizer=optimizer, **options)

    def step(self, loss: Tensor) -> None:
        """It sees the optimizer's steps itself."""

    def close(self) -> None:
        """Let go of the model."""
        self.auditor.unpatch()


if find_spec("torchmortem") is not None:
    MONITORS["torchmortem"] = Torchmortem
if find_spec("torch_audit") is not None:
    MONITORS["torch-audit"] = TorchAudit
    MONITORS["torch-audit, each"] = lambda model, optimizer: TorchAudit(model, optimizer, every_n_steps=1)


def now() -> float:
    """Seconds, when all that was asked of the device is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(workload: Workload, contestant: str, steps: int, device: str) -> tuple[float, float, float, float]:
    """Seconds of a plain step, the ratio and its standard error, and the difference in seconds."""
    torch.manual_seed(0)
    model, batches = workload.build().to(device), workload.batches(device)
    plain, other = (Trainee(copy.deepcopy(model), name, batches) for name in ("plain", contestant))
    every, window = HERE.get(contestant, (NEVER, NEVER))
    for _ in range(6):  # discovery, and the steps at the beginning that are observed one by one
        plain.step(), other.step()
    pairs: dict[str, list[tuple[float, float]]] = {}
    while other.made < steps or (window < NEVER and other.made % window):
        kind = other.kind(every, window)
        first, second = (plain, other) if other.made % 2 else (other, plain)
        times = {id(first): first.step(), id(second): second.step()}
        pairs.setdefault(kind, []).append((times[id(plain)], times[id(other)]))
        tell(f"{workload.title}: {contestant}, step {other.made}")
    if other.monitor is not None:
        other.monitor.close()
    every, window = RATES.get(contestant, (NEVER, NEVER))
    often = {"closes": 1 / window, "observed": 1 / every - (1 / window if every == 1 else 0)}
    often["heard"] = 0.0 if every == 1 else 1 / LISTEN - (1 / every if every % LISTEN == 0 else 0)
    usual = "other" if "other" in pairs else "heard"
    often[usual] = 1 - sum(often[kind] for kind in pairs if kind != usual)
    ratio = error = difference = 0.0
    for kind, found in pairs.items():
        ratios = [b / a for a, b in found]
        weight = often[kind] if kind in {"closes", "observed"} or every > 1 else 0.0
        ratio += weight * statistics.median(ratios)
        error += (weight * 1.25 * _spread(ratios) / len(ratios) ** 0.5) ** 2
        difference += weight * statistics.median(b - a for a, b in found)
    return statistics.median(a for found in pairs.values() for a, _ in found), ratio, error**0.5, difference


def _spread(values: list[float]) -> float:
    """A standard deviation that outliers do not move: from the quartiles."""
    if len(values) < 4:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4)
    return (high - low) / 1.349


def growth(steps: int) -> Iterator[str]:
    """What the monitor of a small model holds after some steps more than after half of them."""
    workload = WORKLOADS["mlp"]
    trainee = Trainee(workload.build(), "defaults", workload.batches("cpu"))
    tracemalloc.start()
    for _ in range(steps // 2):
        trainee.step()
    half = tracemalloc.get_traced_memory()[0]
    for _ in range(steps - steps // 2):
        trainee.step()
    grown = tracemalloc.get_traced_memory()[0] - half
    tracemalloc.stop()
    assert isinstance(trainee.monitor, Monitor)
    trainee.monitor.close()
    yield f"after {steps:,} steps Python holds {grown / 1024:.0f} KiB more than after half of them"


def tell(text: str) -> None:
    """Progress, on a terminal."""
    if sys.stderr.isatty():
        print(f"\r{text:<60}", end="", file=sys.stderr, flush=True)


def main() -> None:
    """Parses the arguments, measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="*", choices=list(WORKLOADS), default=list(WORKLOADS))
    usual = [name for name in MONITORS if name != "plain"]
    parser.add_argument("--contestants", nargs="*", choices=usual, default=usual)
    parser.add_argument("--steps", type=int, default=200, help="that each contestant makes")
    parser.add_argument("--growth", type=int, default=0, metavar="STEPS", help="also watch the memory over some steps")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", ReLUDoctorWarning)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(machine())
    print("| | plain step | " + " | ".join(arguments.contestants) + " |")
    print("|---" * (len(arguments.contestants) + 2) + "|")
    for name in arguments.workloads:
        workload, cells, plain = WORKLOADS[name], [], 0.0
        for contestant in arguments.contestants:
            steps = arguments.steps * (10 if name == "mlp" else 1)
            plain, ratio, error, difference = measure(workload, contestant, steps, device)
            cells.append(f"{ratio:.4f} (±{error:.4f}), {difference * 1e6:+,.0f} µs")
        tell("")
        print(f"| {workload.title} | {plain * 1e3:.2f} ms | " + " | ".join(cells) + " |", flush=True)
    if arguments.growth:
        print("\n".join(growth(arguments.growth)))


if __name__ == "__main__":
    main()
