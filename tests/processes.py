"""Two processes on the loopback, and what they do to models that are spread over them."""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import relu_doctor
from relu_doctor.errors import ReLUDoctorError
from tests.planting import Case, Site, normal
from tests.zoo.registry import Chain

COUNT = 2
COLUMNS = ("site", "site_id", "unit", "inputs", "inputs_fired", "first_fired", "positions", "bias", "weight_l2")


def run(folder: Path) -> list[dict[str, Any]]:
    """What each of two processes finds.

    Args:
        folder: for the results.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(_work, (port, str(folder)), COUNT, start_method="spawn")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(COUNT)]


def _work(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    where = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", where, timeout=timedelta(seconds=60), world_size=COUNT, rank=rank)
    try:
        found = {
            "data parallel": data_parallel(rank),
            "fully sharded": fully_sharded(rank),
            "tensor parallel": tensor_parallel(),
        }
        torch.save(found, Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def batches_of(rank: int) -> list[Tensor]:
    """Each rank has inputs of its own: the same ones in another order."""
    inputs = torch.cat(normal(6)())
    return list((inputs.flip(0) if rank else inputs).split([10, 9, 1]))


PERCEPTRON = Case(
    "perceptron",
    lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 2)).eval(),
    lambda: batches_of(0),
    (Site("1", 8, {1}, {3}, "0.bias"), Site("3", 7, {0, 5}, {2}, "2.bias")),
)


def perceptron() -> nn.Module:
    """A model with planted units."""
    return PERCEPTRON.build()[0]


def table(model: nn.Module, batches: Any, **arguments: Any) -> dict[str, list[Any]]:
    """What a scan finds, in plain lists."""
    diagnosis = relu_doctor.scan(model, batches, exhaustive=True, **arguments)
    found = {name: diagnosis.units[name].tolist() for name in COLUMNS}
    return {
        **found,
        "notes": list(diagnosis.table.coverage.notes),
        "inputs read": [diagnosis.table.coverage.num_inputs],
    }


def state(model: nn.Module) -> list[Any]:
    """What must be as it was: objects, values, flags."""
    held: list[Any] = []
    for name, parameter in model.named_parameters():
        local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        held.append((name, id(parameter), type(parameter.data).__name__, parameter.requires_grad, local.tolist()))
    return held + [module.training for module in model.modules()]


def step(model: nn.Module, batch: Tensor) -> float:
    """Train a step, as a user goes on to do."""
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    loss = model(batch).square().mean()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def data_parallel(rank: int) -> dict[str, Any]:
    """DistributedDataParallel, around a model with a frozen part and inside one."""
    plain = perceptron()
    plain[0].requires_grad_(False)
    found: dict[str, Any] = {"plain": table(plain, batches_of(rank))}
    wrapped = nn.parallel.DistributedDataParallel(plain)
    before = state(wrapped)
    found["around"] = table(wrapped, batches_of(rank))
    found["left"] = before == state(wrapped)
    found["trained"] = [step(wrapped, batches_of(0)[0]) for _ in range(2)]
    found["again"] = table(wrapped, batches_of(rank))
    model = Chain(lambda m, x: F.relu(m.head(m.body(x))), body=nn.Identity(), head=nn.Linear(2, 3)).eval()
    model.body = nn.parallel.DistributedDataParallel(perceptron(), find_unused_parameters=True)
    found["inside"] = table(model, batches_of(rank))
    found["trained inside"] = [step(model, batches_of(0)[0]) for _ in range(2)]
    return found


def sharded(*, frozen: bool = False) -> nn.Module:
    """The perceptron, each layer and the root sharded by FSDP."""
    model = perceptron()
    model[0].requires_grad_(not frozen)
    mesh = init_device_mesh("cpu", (COUNT,))
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def fully_sharded(rank: int) -> dict[str, Any]:
    """FSDP2, with all that may go apart between ranks."""
    found: dict[str, Any] = {"plain": table(perceptron(), batches_of(rank))}
    for name, frozen in (("trainable", False), ("frozen", True)):
        model = sharded(frozen=frozen)
        before = state(model)
        found[name] = table(model, batches_of(rank))
        found[f"{name} left"] = before == state(model)
        found[f"{name} trained"] = step(model, batches_of(0)[0])
    more = [*batches_of(rank), *batches_of(rank)[:rank]]  # rank 1 has a batch more
    found["uneven plain"], found["uneven"] = table(perceptron(), more), table(sharded(), more)
    found["failed"] = _failure(sharded(), [torch.full((3, 6), torch.nan)] if rank else batches_of(rank))
    for name, make in (("computed", _computed), ("rectified first", _rectified_first)):
        found[f"{name} plain"] = table(make(), batches_of(rank))
        model = make()
        for layer in (*model, model):
            fully_shard(layer, mesh=init_device_mesh("cpu", (COUNT,)))
        found[name] = table(model, batches_of(rank))
    model = sharded()
    model[4].register_forward_pre_hook(_refuse)
    before = state(model)
    found["raised"] = _failure(model, batches_of(rank))
    found["raised left"] = before == state(model)
    model[4]._forward_pre_hooks.clear()
    found["after it raised"] = table(model, batches_of(rank))
    found["branches plain"] = table(_branching(shards=False), batches_of(rank))
    found["branches"] = table(_branching(shards=True), batches_of(rank))
    return found


def _computed() -> nn.Module:
    """Weights that parametrizations compute of shards."""
    torch.manual_seed(0)
    layers = (parametrizations.weight_norm(nn.Linear(6, 8)), parametrizations.spectral_norm(nn.Linear(8, 7)))
    return nn.Sequential(nn.Sequential(layers[0], nn.ReLU()), nn.Sequential(layers[1], nn.ReLU())).eval()


def _rectified_first() -> nn.Module:
    """Between a layer and its rectifier, gradients cross the border of a shard."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 8),
        nn.Sequential(nn.ReLU(), nn.Linear(8, 7)),
        nn.Sequential(nn.LayerNorm(7), nn.ReLU(), nn.Linear(7, 2)),
    ).eval()


def _refuse(module: nn.Module, args: Any) -> None:
    raise ValueError("on purpose")


def _failure(model: nn.Module, batches: Any) -> str:
    try:
        table(model, batches)
    except ReLUDoctorError as error:
        return str(error)
    return "nothing"


def _branching(*, shards: bool) -> nn.Module:
    """One rank's data take another way than the other's, through the same layers."""
    torch.manual_seed(0)
    layers = {"a": nn.Linear(6, 8), "b": nn.Linear(8, 5)}
    model = Chain(lambda m, x: m.b(F.relu(z) if (z := m.a(x)).sum() > 0 else torch.tanh(F.relu(z - 1))), **layers)
    if shards:
        mesh = init_device_mesh("cpu", (COUNT,))
        for layer in (model.a, model.b, model):
            fully_shard(layer, mesh=mesh)
    return model.eval()


def _gated() -> nn.Module:
    torch.manual_seed(0)
    layers = {"gate": nn.Linear(6, 8), "up": nn.Linear(6, 8, bias=False), "down": nn.Linear(8, 5)}
    return Chain(lambda m, x: F.relu(m.down(F.relu(m.gate(x)) * m.up(x))), **layers).eval()


def _normed() -> nn.Module:
    torch.manual_seed(0)
    layers = {"a": nn.Linear(6, 8), "norm": nn.LayerNorm(8), "b": nn.Linear(8, 5)}
    return Chain(lambda m, x: F.relu(m.b(F.relu(m.norm(m.a(x))))), **layers).eval()


def tensor_parallel() -> dict[str, Any]:
    """DTensors whose columns and rows are dealt to the ranks, which see the same inputs."""
    columns, rows = ColwiseParallel, RowwiseParallel
    flat, sequences = batches_of(0), normal(4, 6)()
    plans: dict[str, tuple[Any, dict[str, Any], Any]] = {
        "columns and rows": (perceptron, {"0": columns(), "2": rows()}, flat),
        "sequences": (_gated, {"gate": columns(), "up": columns(), "down": rows()}, sequences),
        "rectified while spread": (
            perceptron,
            {"0": columns(use_local_output=False), "2": rows(use_local_output=False), "4": columns()},
            flat,
        ),
        "positions are spread": (
            _normed,
            {"a": columns(output_layouts=_along(1)), "norm": SequenceParallel(), "b": columns(input_layouts=_along(1))},
            sequences,
        ),
    }
    found: dict[str, Any] = {}
    for name, (make, plan, batches) in plans.items():
        found[f"{name} plain"] = table(make(), batches)
        model = parallelize_module(make(), init_device_mesh("cpu", (COUNT,)), plan)
        before = state(model)
        found[name] = table(model, batches)
        found[f"{name} left"] = before == state(model)
    plan = {"a": rows(input_layouts=_whole(), output_layouts=_along(1))}
    model = parallelize_module(_cut(), init_device_mesh("cpu", (COUNT,)), plan)
    diagnosis = relu_doctor.scan(model, sequences)
    found["cut"] = [diagnosis.sites["num_units"].tolist(), [site.note for site in diagnosis.table.sites]]
    return found


def _cut() -> nn.Module:
    torch.manual_seed(0)
    return Chain(lambda m, x: F.relu(m.b(x)).sum() + F.relu(m.a(x)).sum(), a=nn.Linear(6, 8), b=nn.Linear(6, 4)).eval()


def _along(axis: int) -> Any:
    from torch.distributed.tensor import Shard

    return Shard(axis)


def _whole() -> Any:
    from torch.distributed.tensor import Replicate

    return Replicate()
