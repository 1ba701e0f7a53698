"""What watching costs: time and peak memory as ratios to the plain forward, for this project, a naive hook and rivals.

    python scripts/bench_overhead.py [--workloads …] [--contestants …] [--quick] [--growth] [--json FILE]

Needs the environment that `python scripts/test.py` makes, and Linux for the memory. The rivals that are installed take
part:

    pip install torchlens==2.36.1 neural-observatory==0.5.1 torchdiag==0.1.0 dead-relu-viz==0.1.0 \
        torchmortem==0.1.1 torch-audit==0.3.0 -c scripts/constraints.txt

Time: each contestant has a process of its own. In each round every contestant has its turn (A B C A B C …), and in a
turn every batch is preceded by a plain forward (eval mode, no_grad) of a twin of the model. The ratio is the median
over all batches of all rounds, with its quartiles. The first batch of a turn does not count: what it takes (discovery)
is told in rows of its own, as is what a scan takes after the last batch (the verdict). Tools that keep all activations
and evaluate them in the end have that evaluation counted, in equal parts, with the batches. Batches during which other
processes had more than 8 % of the cores are left out, unless too few remain; the table says how many.

Memory: in another process of its own, with an allocator that hands back what is freed (MALLOC_MMAP_THRESHOLD_), the
peak of resident memory (VmHWM) above what the process held before; as a ratio to that of the plain forward. On CUDA,
torch's peak of allocated memory. It includes the forward itself.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from bench_models import WORKLOADS
from bench_worker import OURS, RUNS
from rivals import TOOLS

DISTURBED = 0.08  # share of the cores that other processes have
ENOUGH = 8  # undisturbed batches
WORKER = Path(__file__).resolve().parent / "bench_worker.py"


class WorkerError(Exception):
    """The last line of what a worker wrote to standard error before it ended."""


class Worker:
    """A contestant in its own process; a context manager."""

    def __init__(self, name: str, workload: str, count: int, **environment: str) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.errors = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115 as long as the worker
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(WORKER), name, workload, device, str(count)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True, encoding="utf-8",
            env={**os.environ, **environment},
        )  # fmt: skip
        self._answer()

    def ask(self, command: str) -> Any:
        """What the worker measures on a command."""
        assert self.process.stdin is not None
        print(command, file=self.process.stdin, flush=True)
        return json.loads(self._answer())

    def _answer(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.errors.seek(0)
            raise WorkerError((self.errors.read().strip() or "ended without a word").splitlines()[-1])
        return line

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.process.kill()
        self.process.communicate()
        self.errors.close()


@dataclass
class Measured:
    """What was measured of one contestant on one workload.

    Attributes:
        turns: seconds of each turn.
        memory: bytes.
        error: why there is nothing.
    """

    turns: list[dict[str, Any]] = field(default_factory=list)
    memory: dict[str, Any] | None = None
    error: str = ""

    @contextmanager
    def noting_errors(self) -> Iterator[None]:
        """A contestant that fails is told as such, and the others go on."""
        try:
            yield
        except WorkerError as error:
            self.error = str(error)

    def batches(self) -> list[tuple[float, float, float]]:
        """Of the batches but the first of each turn: seconds spent, of the plain forward, and after the last, shared.

        Only those during which nobody disturbed, where they are enough.
        """
        found = [
            (others, (spent, plain, turn["after"] / len(turn["spent"])))
            for turn in self.turns
            for others, spent, plain in zip(*(turn[key][1:] for key in ("others", "spent", "plain")), strict=True)
        ]
        quiet = [batch for others, batch in found if others < DISTURBED]
        return quiet if len(quiet) >= ENOUGH else [batch for _, batch in found]

    def ratios(self, *, with_end: bool) -> list[float]:
        """What each batch took beside the plain forward; with its share of what came in the end."""
        return [(spent + (after if with_end else 0)) / plain for spent, plain, after in self.batches()]

    def plain(self) -> list[float]:
        """Seconds of plain forwards."""
        return [plain for _, plain, _ in self.batches()]

    def left_out(self) -> int:
        """How many batches were disturbed, and do not count."""
        return sum(len(turn["spent"]) - 1 for turn in self.turns) - len(self.batches())

    def forwards(self, *, end: bool) -> float:
        """What comes once, in plain forwards: the verdict in the end, or discovery with the first batch."""
        ratios: list[float] = [
            (turn["after"] if end else turn["before"] + turn["spent"][0]) / statistics.median(turn["plain"])
            for turn in self.turns
        ]
        return statistics.median(ratios)

    def peak(self, of: str) -> str:
        """Peak memory beside the plain forward's: of the ``first`` batch, of the other ``batches``, or of ``all``."""
        if self.memory is None:
            return "–"
        peaks, after = self.memory["peaks"], self.memory["after"]
        chosen = {"first": peaks[:1], "batches": peaks[1:], "end": [after], "all": [*peaks, after]}[of]
        return f"{max(chosen) / self.memory['plain']:.2f}"


def measure(workload: str, names: Sequence[str], *, rounds: int, batches: int, weigh: bool) -> dict[str, Measured]:
    """Every contestant on one workload, turn by turn; rivals, which take long, in every second round."""
    found = {name: Measured() for name in names}
    with ExitStack() as stack:
        workers = {}
        for name in names:
            tell(f"{workload}: starting {name}")
            with found[name].noting_errors():
                workers[name] = stack.enter_context(Worker(name, workload, batches))
        for turn in range(rounds):
            for name, worker in workers.items():
                if not found[name].error and (name in OURS or turn % 2 == 0):
                    tell(f"{workload}: turn {turn + 1} of {rounds}, {name}")
                    with found[name].noting_errors():
                        found[name].turns.append(worker.ask("time"))
    for name in names if weigh else ():
        tell(f"{workload}: weighing {name}")
        with (
            found[name].noting_errors(),
            Worker(name, workload, min(batches, 3), MALLOC_MMAP_THRESHOLD_="65536") as worker,
        ):
            found[name].memory = worker.ask("weigh")
    return found


def tell(progress: str) -> None:
    """Show what is going on, on standard error, where a person watches."""
    if sys.stderr.isatty():
        print(f"\r\033[K{progress}", end="", file=sys.stderr, flush=True)


def row(name: str, found: Mapping[str, Measured]) -> list[str]:
    """Cells of one contestant: time and memory per workload."""
    cells = []
    for measured in found.values():
        if measured.error or not measured.turns:
            cells += [measured.error or "–", "–"]
            continue
        ratios = measured.ratios(with_end=name in TOOLS and TOOLS[name].batches < 100)
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        cells += [f"{middle:.2f} ({low:.2f}–{high:.2f})", measured.peak("batches" if name in OURS else "all")]
    return cells


def table(found: Mapping[str, Mapping[str, Measured]]) -> str:
    """Everything in Markdown: a line per contestant, two columns per workload."""
    titles = [cell for workload in found for cell in (f"{WORKLOADS[workload].title}: time", "memory")]
    lines = [f"| | {' | '.join(titles)} |", f"|---|{'---|' * len(titles)}"]
    names = list(next(iter(found.values())))
    plain = []
    for by_name in found.values():
        seconds = [each for measured in by_name.values() for each in measured.plain()]
        weight = next((measured.memory["plain"] for measured in by_name.values() if measured.memory), None)
        plain += [f"{statistics.median(seconds):.3f} s" if seconds else "–"]
        plain += [f"{weight / 2**20:.0f} MiB" if weight else "–"]
    lines.append(f"| plain forward | {' | '.join(plain)} |")
    for name in names:
        label = name if name == "naive hook" or name not in OURS else f"**relu-doctor, {name}**"
        label += f" {TOOLS[name].version}" if name in TOOLS else ""
        by_workload = {workload: by_name[name] for workload, by_name in found.items()}
        lines.append(f"| {label} | {' | '.join(row(name, by_workload))} |")
    if "full" in names:
        for end, label in ((False, "the first batch, with discovery"), (True, "the verdict, once")):
            cells = []
            for by_name in found.values():
                one = by_name["full"]
                cells += [f"{one.forwards(end=end):.2f} forwards" if one.turns else "–"]
                cells += [one.peak("end" if end else "first")]
            lines.append(f"| **relu-doctor, {label}** | {' | '.join(cells)} |")
    return "\n".join(lines)


def once(*, with_growth: bool) -> list[str]:
    """What is measured once, in lines."""
    with Worker("once", "tiny", 10_000) as worker:
        held = worker.ask("bytes")
        lines = [f"bytes held per unit: {held['full']:.0f} (full), {held['minimal']:.0f} (minimal)"]
        if with_growth:
            lines.append(f"growth over 10,000 batches: {worker.ask('growth'):.0f} bytes per batch of 8 inputs")
    with tempfile.TemporaryDirectory() as cache:
        seconds = []
        for _ in range(2):
            with Worker("once", "tiny", 1, NUMBA_CACHE_DIR=cache) as worker:
                seconds.append(worker.ask("first use"))
    lines.append(f"first use of the kernel: {seconds[0]:.1f} s; in a later process, from its cache: {seconds[1]:.1f} s")
    return lines


def machine() -> str:
    """The machine and the versions, in a line."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    cpu = names[0].split(":")[1].strip() if names else platform.processor()
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    load = f"load {os.getloadavg()[0]:.1f}"
    return f"{os.cpu_count()} cores of an {cpu}{gpu}; torch {torch.__version__}; {platform.platform()}; {load}"


def main() -> None:
    """Parses the arguments, measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    usual = ["resnet18", "transformer", "mlp", *(["resnet50"] if torch.cuda.is_available() else [])]
    installed = [name for name in RUNS if name in OURS or TOOLS[name].version]
    parser.add_argument("--workloads", nargs="*", choices=list(WORKLOADS), default=usual)
    parser.add_argument("--contestants", nargs="*", choices=list(RUNS), default=installed)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=6, help="of a turn; the first does not count")
    parser.add_argument("--quick", action="store_true", help="one round of three batches")
    parser.add_argument("--no-memory", action="store_true", help="time only")
    parser.add_argument("--growth", action="store_true", help="also 10,000 small batches")
    parser.add_argument("--json", type=Path, help="write every measurement to this file")
    arguments = parser.parse_args()
    rounds, batches = (1, 3) if arguments.quick else (arguments.rounds, arguments.batches)
    print(machine())
    found = {
        workload: measure(
            workload, arguments.contestants, rounds=rounds, batches=batches, weigh=not arguments.no_memory
        )
        for workload in arguments.workloads
    }
    tell("")
    print(table(found))
    for workload, by_name in found.items():
        counted = sum(len(each.batches()) for each in by_name.values())
        print(
            f"{workload}: {counted} batches counted, {sum(map(Measured.left_out, by_name.values()))} disturbed ones not"
        )
    if any(name in OURS and name != "naive hook" for name in arguments.contestants) and not arguments.quick:
        print("\n".join(once(with_growth=arguments.growth)))
    if arguments.json:
        plain = {w: {name: vars(each) for name, each in by_name.items()} for w, by_name in found.items()}
        arguments.json.write_text(json.dumps(plain, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
