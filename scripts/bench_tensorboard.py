"""What the TensorBoard sink costs: bytes per window per 1,000 units, and time per window beside a training step.

Perceptrons of a few and of many sites are trained with a monitor while some of their units are killed; each window is
written by the sink, which is timed. ``python scripts/bench_tensorboard.py`` prints a row per network.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from torch import nn

import relu_doctor
from relu_doctor.errors import ReLUDoctorWarning
from relu_doctor.reports.tensorboard import TensorBoardSink
from relu_doctor.training.windows import Window

PERIOD = 500  # steps of a window by default, of which a window here has fewer
STEPS = 4


def perceptron(sites: int, units: int) -> nn.Sequential:
    """Kaiming-initialised; every second layer has a norm, so that hundreds of them can be trained."""
    layers: list[nn.Module] = []
    for place in range(sites):
        linear = nn.Linear(units, units)
        nn.init.kaiming_normal_(linear.weight)
        layers += [linear, *([nn.LayerNorm(units)] if place % 2 else []), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(units, 10))


def kill(model: nn.Sequential, window: int) -> None:
    """A few units of every seventh layer."""
    linears = [module for module in model if isinstance(module, nn.Linear)]
    with torch.no_grad():
        for linear in linears[window % 7 : -1 : 7]:
            linear.bias[window :: linear.out_features // 3] = -1e3


def parts(folder: Path) -> Iterator[tuple[str, int]]:
    """Of each value that was written, what it is and its bytes."""
    for path in folder.iterdir():
        for record in RawEventFileLoader(str(path)).Load():
            for value in Event.FromString(record).summary.value:
                kind = value.WhichOneof("value") or "hparams"
                own = value.metadata.plugin_data.plugin_name == "relu_doctor"
                text = value.metadata.plugin_data.plugin_name == "text"
                yield "records" if own else "text" if text else kind, value.ByteSize()


def measure(sites: int, units: int, windows: int, detail: str) -> str:
    """A row: the network, milliseconds, and bytes."""
    torch.manual_seed(0)
    model = perceptron(sites, units)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    spent: list[float] = []
    steps: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        sink = TensorBoardSink(folder, detail="all" if detail == "all" else "worst")

        def timed(window: Window) -> None:
            _ = window.diagnosis.sites, window.diagnosis.findings  # which the history and the report share
            begin = time.perf_counter()
            sink(window)
            spent.append(time.perf_counter() - begin)

        with relu_doctor.Monitor(model, optimizer=optimizer, every=5, window=STEPS, sinks=timed) as monitor:
            for step in range(windows * STEPS):
                inputs = torch.randn(64, units)
                begin = time.perf_counter()
                loss = nn.functional.cross_entropy(model(inputs), inputs[:, :10].argmax(1))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                steps.append(time.perf_counter() - begin)
                monitor.step(loss=loss)
                if step % STEPS == STEPS - 1:
                    kill(model, step // STEPS)
        begin = time.perf_counter()
        sink.close()
        closing = time.perf_counter() - begin
        sizes: Counter[str] = Counter()
        for kind, size in parts(Path(folder)):
            sizes[kind] += size
    pictures = sizes.pop("image", 0)
    each = {kind: size / windows / (sites * units) * 1000 for kind, size in sizes.most_common()}
    share = statistics.median(spent) / (PERIOD * statistics.median(steps))
    return (
        f"{sites} sites x {units} units, detail={detail}, {windows} windows: "
        f"{1e3 * statistics.median(spent):.1f} ms a window, a step takes {1e3 * statistics.median(steps):.1f} ms: "
        f"{share:.2%} of {PERIOD} steps; {sum(each.values()):,.0f} bytes per window per 1,000 units "
        f"({', '.join(f'{kind} {size:,.0f}' for kind, size in each.items())}); "
        f"at the close {1e3 * closing:.0f} ms and {pictures:,} bytes of pictures"
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--small", action="store_true", help="only the network of three sites")
    options = parser.parse_args()
    warnings.simplefilter("ignore", ReLUDoctorWarning)
    print(measure(3, 300, options.windows, "worst"))
    if not options.small:
        print(measure(300, 300, options.windows, "worst"))
        print(measure(300, 300, options.windows, "all"))


if __name__ == "__main__":
    main()
