"""Models in wrappers: the same units are seen, once each, and the model is left as it was."""

from __future__ import annotations

import copy
import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import relu_doctor
from relu_doctor.errors import DataError, UnsupportedModelError
from tests import processes
from tests.left_as_it_was.fingerprint import assert_same, fingerprint
from tests.planting import Case, Site, clone
from tests.processes import PERCEPTRON
from tests.wrapped import assert_found, found_in, planted_in, scan
from tests.zoo.registry import Chain

# Data parallel and compiled models


def test_data_parallel_inside_a_model_calls_what_it_holds():
    """A part that is wrapped is the part: names, ids and units are those of the model without the wrapper."""
    model, batches = PERCEPTRON.build()
    plain = scan(nn.Sequential(model, nn.Identity()), batches)
    wrapped = scan(nn.Sequential(nn.DataParallel(model), nn.Identity()), batches)
    assert wrapped.units.equals(plain.units)
    assert_found(PERCEPTRON, wrapped, "0.")


class Block(nn.Module):
    """A layer and its rectifier, with a forward that can be compiled by itself."""

    def __init__(self, fc: nn.Module, act: nn.Module) -> None:
        super().__init__()
        self.fc, self.act = fc, act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.fc(x))


class Compiled(nn.Module):
    """A model of which a part, a method, or a function is compiled, without breaks allowed in its graph."""

    def __init__(self, how: str, model: nn.Module) -> None:
        super().__init__()
        self.first, self.second = Block(*model[:2]), Block(*model[2:4])
        self.how = how
        options: dict[str, Any] = {"backend": "eager", "fullgraph": True}
        if how == "part":
            self.first = torch.compile(self.first, **options)
        if how == "part in place":
            self.second.compile(**options)
        self.whole = [torch.compile(self._whole, **options)]

    def _whole(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.whole[0](x) if self.how == "method" else self._whole(x)


COMPILED = Case(
    "compiled",
    PERCEPTRON.make,
    PERCEPTRON.batches,
    (Site("first.act", 8, {1}, {3}), Site("second.act", 7, {0, 5}, {2})),
)


@pytest.mark.parametrize("called", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("how", ["around", "in place", "part", "part in place", "method"])
def test_compiled_models_are_observed_through_the_original(how, called):
    """Before the first call and after it, with fullgraph, whatever is compiled; and they are not compiled anew."""
    torch._dynamo.reset()
    model, batches = PERCEPTRON.build()
    model = Compiled(how, model).eval()
    given = torch.compile(model, backend="eager", fullgraph=True) if how == "around" else model
    if how == "in place":
        model.compile(backend="eager", fullgraph=True)
    with torch.no_grad():
        first = given(batches[0]) if called else None
        assert_found(COMPILED, scan(given, batches))
        with torch.compiler.set_stance("fail_on_recompile" if called else "default"):
            again = given(batches[0])
    assert first is None or torch.equal(first, again)


def test_scans_that_overlap_leave_compiling_as_it_was():
    """Two scans of compiled models in two threads, the first of which ends first: afterwards models compile again."""
    torch._dynamo.reset()
    inside, over = threading.Event(), threading.Event()
    model, batches = PERCEPTRON.build()

    def slow() -> Any:
        yield batches[0]
        inside.set()
        over.wait(30)
        yield batches[1]

    compiled = [torch.compile(copy.deepcopy(model), backend="eager") for _ in range(2)]
    thread = threading.Thread(target=lambda: relu_doctor.scan(compiled[0], slow()))
    thread.start()
    inside.wait(30)
    second = threading.Thread(target=lambda: (over.set(), thread.join(), None))
    relu_doctor.scan(compiled[1], batches)
    second.start()
    second.join()
    frames: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        frames.append(graph)
        return graph.forward

    torch.compile(copy.deepcopy(model), backend=backend)(batches[0])
    assert frames


# nn.TransformerEncoder, whose fused path is taken in eval mode


class Pooled(nn.Module):
    """The mean over time of an encoder's output, padding and all, before a rectifier."""

    def __init__(self, *, norm: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(8) if norm else None)
        self.head = nn.Linear(8, 6)

    def forward(self, src: Tensor, src_key_padding_mask: Tensor | None = None) -> Tensor:
        return F.relu(self.head(self.encoder(src, src_key_padding_mask=src_key_padding_mask).mean(1)))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("norm", [False, True])
def test_the_fused_path_of_an_encoder(norm, padded):
    """Rectifiers inside the fused kernel are seen, at real positions only, and what follows sees what it gives."""
    torch.manual_seed(0)
    model = Pooled(norm=norm).eval()
    with torch.no_grad():
        for layer, unit in zip(model.encoder.layers, (3, 7), strict=True):
            layer.linear1.bias[unit] = -100.0
    src = torch.randn(40, 5, 8)
    padding = torch.arange(5) >= torch.randint(1, 6, (40, 1))
    batches = [{"src": src, "src_key_padding_mask": padding} if padded else {"src": src}]
    heads: list[Tensor] = []
    handle = model.head.register_forward_hook(lambda module, args, output: heads.append(output.detach()))
    with torch.no_grad():
        model(**batches[0])
    handle.remove()
    diagnosis = scan(model, batches)
    dead = {name: told[:2] for name, told in found_in(diagnosis).items() if name != "relu()"}
    assert dead == {"encoder.layers.0.relu()": (16, {3}), "encoder.layers.1.relu()": (16, {7})}
    rows = diagnosis.units.groupby("site")["positions"].first()
    assert rows["encoder.layers.0.relu()"] == (int((~padding).sum()) if padded else 200)
    found = diagnosis.units[diagnosis.units["site"] == "relu()"]
    torch.testing.assert_close(torch.tensor(found["pre_max"].tolist()), heads[0].amax(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.tensor(found["pre_mean"].tolist()), heads[0].mean(0), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_are_refused(layout):
    """Sequences of different lengths in one tensor are told to be padded, as data and inside a forward."""
    parts = [torch.randn(3, 6), torch.randn(5, 6)]
    with pytest.raises(DataError, match="found a nested tensor; pad it"):
        relu_doctor.scan(PERCEPTRON.make(), [torch.nested.nested_tensor(parts, layout=layout)])
    model = Chain(lambda m, x: F.relu(m.fc(torch.nested.nested_tensor(list(x), layout=layout))), fc=nn.Linear(6, 5))
    with pytest.raises(UnsupportedModelError, match="applied to a nested tensor"):
        relu_doctor.scan(model, [torch.randn(4, 3, 6)])


# Models that hold no values, or cannot be watched


def on_meta(*, only: int | None = None) -> nn.Module:
    model = PERCEPTRON.make()
    (model if only is None else model[only]).to("meta")
    return model


class FullyShardedDataParallel(nn.Module):
    """Has the name of the first FSDP, which cannot be made in one process."""


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "on the meta device": (on_meta, r"0\.weight is on the meta device and holds no values \(6 of 6 tensors do\)"),
    "partly on the meta device": (lambda: on_meta(only=2), r"2\.weight .* \(2 of 6 tensors do\); load the weights"),
    "a lazy layer": (lambda: nn.Sequential(nn.LazyLinear(3), nn.ReLU()), "0.weight is a lazy parameter"),
    "a lazy norm": (lambda: nn.Sequential(nn.LazyBatchNorm1d(), nn.ReLU()), "0.weight is a lazy parameter"),
    "the first FSDP": (lambda: nn.Sequential(FullyShardedDataParallel()), "fully_shard"),
    "no module": (lambda: len, "expected a torch.nn.Module"),
}


@pytest.mark.parametrize(("make", "told"), REFUSED.values(), ids=REFUSED)
def test_models_that_cannot_be_scanned_are_refused_in_a_sentence(make, told):
    """No values, no shapes, no identity of parameters: each is said before anything is run."""
    with pytest.raises(UnsupportedModelError, match=told):
        relu_doctor.scan(make(), torch.randn(4, 6))


def test_the_meta_device_is_no_place_to_scan_on():
    """A model is not moved to where its values would be lost."""
    model, batches = PERCEPTRON.build()
    before = fingerprint(model)
    with pytest.raises(UnsupportedModelError, match="it holds no values"):
        relu_doctor.scan(model, batches, device="meta")
    assert_same(before, fingerprint(model))


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")


@needs_cuda
def test_no_scan_while_a_cuda_graph_is_captured():
    """Where nothing can be read, that is said."""
    model = PERCEPTRON.build()[0].cuda()
    x = torch.randn(4, 6, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), pytest.raises(UnsupportedModelError, match="CUDA graph is being captured"):
        relu_doctor.scan(model, [x])


@needs_cuda
def test_a_module_that_replays_a_cuda_graph_runs_its_own_forward():
    """A graphed callable hides its rectifiers; the forward that it was made from shows them."""
    model, batches = PERCEPTRON.build()
    model = torch.cuda.make_graphed_callables(model.cuda(), (batches[0].cuda(),))
    diagnosis = relu_doctor.scan(model, [batch.cuda() for batch in batches], exhaustive=True)
    assert_found(PERCEPTRON, diagnosis)


# Several processes

needs_processes = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")


def assert_tables_equal(found: dict[str, list[Any]], expected: dict[str, list[Any]]) -> None:
    for column, values in expected.items():
        if column in {"bias", "weight_l2"}:
            torch.testing.assert_close(
                torch.tensor(found[column]), torch.tensor(values), equal_nan=True, rtol=1e-5, atol=1e-6
            )
        else:
            assert found[column] == values, column


def units_in(table: dict[str, list[Any]], prefix: str = "") -> dict[str, tuple[int, set[int], set[int]]]:
    rows = list(zip(table["site"], table["unit"], table["inputs_fired"], strict=True))
    return {
        site: (
            sum(name == site for name, _, _ in rows),
            {unit for name, unit, fired in rows if name == site and fired == 0},
            {unit for name, unit, fired in rows if name == site and fired == 1},
        )
        for site in dict.fromkeys(table["site"])
        if site.startswith(prefix)
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes finds."""
    return processes.run(tmp_path_factory.mktemp("ranks"))


@needs_processes
def test_distributed_data_parallel(ranks):
    """Each rank scans its own inputs; frozen parts stay frozen, and training goes on as if nothing had been."""
    for found in (rank["data parallel"] for rank in ranks):
        assert units_in(found["plain"]) == planted_in(PERCEPTRON)
        assert_tables_equal(found["around"], found["plain"])
        assert found["left"]
        assert found["again"]["site_id"] == found["plain"]["site_id"]
        assert units_in(found["inside"], "body") == {f"body.{k}": v for k, v in planted_in(PERCEPTRON).items()}
        assert len(found["trained"]) == len(found["trained inside"]) == 2
    first, second = (rank["data parallel"]["plain"]["first_fired"] for rank in ranks)
    assert first != second


@needs_processes
def test_fully_sharded_models(ranks):
    """FSDP2: the units, numbers and ids of the plain model; shards, gradients and training are left as they were.

    A rank with more batches, a rank whose data are refused, a forward that raises, and data that take different ways
    keep no rank waiting.
    """
    for found in (rank["fully sharded"] for rank in ranks):
        assert units_in(found["plain"]) == planted_in(PERCEPTRON)
        for name in ("trainable", "frozen"):
            assert_tables_equal(found[name], found["plain"])
            assert found[f"{name} left"]
        assert found["trainable trained"] == pytest.approx(found["frozen trained"])
        assert_tables_equal(found["uneven"], found["uneven plain"])
        assert "on purpose" in found["raised"]
        assert found["raised left"]
        assert_tables_equal(found["after it raised"], found["plain"])
        for name in ("branches", "computed", "rectified first"):
            assert_tables_equal(found[name], found[f"{name} plain"])
    refused, waiting = ranks[1]["fully sharded"]["failed"], ranks[0]["fully sharded"]["failed"]
    assert "expected data without NaN" in refused
    assert "failed in another of the model's processes" in waiting


@needs_processes
def test_tensor_parallel_models(ranks):
    """DTensors: every rank ends with the whole table, units numbered over all ranks, as of the plain model.

    What is spread so that the units of a value cannot be told is unobserved, and says why.
    """
    for found in (rank["tensor parallel"] for rank in ranks):
        assert units_in(found["columns and rows plain"]) == planted_in(PERCEPTRON)
        for name in [name for name in found if f"{name} plain" in found]:
            assert_tables_equal(found[name], found[f"{name} plain"])
            assert found[f"{name} left"]
        sizes, notes = found["cut"]
        assert sorted(sizes) == [0, 4]
        assert any("spread over processes" in note for note in notes)


# Other people's wrappers


def offloaded(how: str, model: nn.Module, folder: Any) -> nn.Module:
    """A model whose weights Accelerate fetches for each forward, from the CPU, a disk, or both."""
    accelerate = pytest.importorskip("accelerate", reason="the models suite needs accelerate")
    if how == "cpu":
        return accelerate.cpu_offload(model, execution_device="cpu", offload_buffers=True)
    if how == "disk":
        return accelerate.disk_offload(model, folder, execution_device="cpu")
    if how == "one hook for all":
        kind = type(model).__name__
        return accelerate.cpu_offload(model, execution_device="cpu", preload_module_classes=[kind])
    places = {"0": "cpu", "1": "cpu", "2": "disk", "3": "cpu", "4": "disk"}
    return accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)


OFFLOADED = ("cpu", "disk", "one hook for all", "device_map")


@pytest.mark.models
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("how", OFFLOADED)
def test_offloaded_models(how, frozen, tmp_path):
    """Weights that are there for the length of a forward only: the plain model's table, and all is offloaded again."""
    model, batches = PERCEPTRON.build()
    model.requires_grad_(not frozen)
    plain = relu_doctor.scan(model, clone(batches), exhaustive=True)
    wrapped = offloaded(how, model, tmp_path)
    before = [(name, id(each), each.device, each.requires_grad) for name, each in wrapped.named_parameters()]
    diagnosis = relu_doctor.scan(wrapped, clone(batches), exhaustive=True)
    assert_found(PERCEPTRON, diagnosis)
    assert diagnosis.units.equals(plain.units)
    assert before == [(name, id(each), each.device, each.requires_grad) for name, each in wrapped.named_parameters()]
    assert torch.isfinite(wrapped(batches[0])).all()
    with pytest.raises(UnsupportedModelError, match="leave out device="):
        relu_doctor.scan(wrapped, batches, device="cpu")


@pytest.mark.models
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_discovery_holds_no_weights_that_were_offloaded():
    """While the last layer runs, the weights of those before it have been let go."""
    alive: list[int] = []
    model, batches = PERCEPTRON.build()
    wrapped = offloaded("cpu", model, None)

    def count(module: nn.Module, args: Any) -> None:
        gc.collect()
        found = [each for each in gc.get_objects() if isinstance(each, nn.Parameter) and each.shape == (8, 6)]
        alive.append(sum(not each.is_meta for each in found))

    wrapped[4].register_forward_pre_hook(count)
    relu_doctor.scan(wrapped, batches)
    assert len(alive) > len(batches)
    assert set(alive) == {alive[-1]}  # discovery and observation alike


ADAPTERS: dict[str, Callable[[Any], Any]] = {
    "lora": lambda peft: peft.LoraConfig(r=2, target_modules=["0", "2"]),
    "lora with dropout and bias": lambda peft: peft.LoraConfig(
        r=2, target_modules=["0", "2"], lora_dropout=0.1, lora_bias=True
    ),
    "dora": lambda peft: peft.LoraConfig(r=2, target_modules=["0", "2"], use_dora=True),
    "ia3": lambda peft: peft.IA3Config(target_modules=["0", "2"], feedforward_modules=["2"]),
    "loha": lambda peft: peft.LoHaConfig(r=2, target_modules=["0", "2"]),
    "lokr": lambda peft: peft.LoKrConfig(r=2, target_modules=["0", "2"]),
    "adalora": lambda peft: peft.AdaLoraConfig(init_r=3, target_r=2, total_step=10, target_modules=["0", "2"]),
}


@pytest.mark.models
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("config", ADAPTERS.values(), ids=ADAPTERS)
def test_adapted_models(config):
    """Frozen layers with trained adapters beside them: the layer's units, fed by both."""
    peft = pytest.importorskip("peft", reason="the models suite needs peft")
    inside = "base_model.model"

    def make() -> nn.Module:
        model = peft.get_peft_model(PERCEPTRON.make(), config(peft))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        return model.eval()

    sites = (
        Site(f"{inside}.1", 8, {1}, {3}, f"{inside}.0.base_layer.bias"),
        Site(f"{inside}.3", 7, {0, 5}, {2}, f"{inside}.2.base_layer.bias"),
    )
    case = Case("adapted", make, PERCEPTRON.batches, sites)
    model, batches = case.build()
    diagnosis = scan(model, batches, forward=lambda model, batch: model(batch))
    assert_found(case, diagnosis)
    assert all(f"{inside}.0.base_layer" in site.producer for site in diagnosis.table.sites[:1])
