"""Rectifiers that no function mode sees: TorchScript, exported programs, operators, quantised modules."""

from __future__ import annotations

import copy
import io
import threading
import warnings
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import relu_doctor
from relu_doctor.errors import ForwardError, NoActivationSitesError, UnsupportedModelError
from tests.planting import Case, clone
from tests.reference import assert_columns_equal
from tests.test_scan import dead_units, scanned_sites
from tests.zoo import CASES

# All of these are deprecated in favour of something that most files out there are not made with.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*torch.jit:DeprecationWarning",
    "ignore:.*torch.ao.quantization:DeprecationWarning",
    "ignore:.*treespec:FutureWarning",
    "ignore:Please use quant_min:UserWarning",
    "ignore:.*quantized tensor creation functions:UserWarning",
    "ignore:.*TracerWarning",
    "ignore::torch.jit.TracerWarning",
)


def traced(model: nn.Module, batch: object) -> nn.Module:
    given = tuple(clone(batch)) if isinstance(batch, tuple | list) else (clone(batch),)
    return torch.jit.trace(model, given, check_trace=False)


def scripted(model: nn.Module, batch: object) -> nn.Module:
    return torch.jit.script(model)


def loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.jit.save(model, file)
    file.seek(0)
    return torch.jit.load(file)


MAKERS: dict[str, Callable[[nn.Module, object], nn.Module]] = {
    "traced": traced,
    "scripted": scripted,
    "loaded": lambda model, batch: loaded(traced(model, batch)),
    "frozen": lambda model, batch: torch.jit.freeze(traced(model, batch)),
    "frozen and loaded": lambda model, batch: loaded(torch.jit.freeze(traced(model, batch))),
    "optimized": lambda model, batch: torch.jit.optimize_for_inference(scripted(model, batch)),
}
LAYERS = [
    "mlp", "conv_1d", "conv_2d", "conv_3d", "conv_grouped", "conv_depthwise", "conv_transposed_grouped", "conv_bn_relu",
    "pre_activation_order", "relu_before_bn", "densenet", "residual_stream", "cat_then_relu", "conv_flatten_relu",
    "max_pool_between", "u_net", "squeeze_excite", "functions", "resnet", "siamese", "double_precision", "brain_float",
    "sequences", "four_axes_with_features_last", "permuted_sequences", "time_comes_first", "relu6", "crelu",
    "all_axes_of_four", "conv_of_one_pixel", "batches_of_one",
]  # fmt: skip
EXACT = ["traced", "scripted", "loaded"]  # these know the modules and parameters as the model has them


def assert_as_the_oracle_sees_it(case: Case, model: nn.Module, batches: list, names: bool) -> None:
    seen = case.seen(model, batches)
    diagnosis = relu_doctor.scan(model, batches, exhaustive=True, **(case.scan if names else {}))
    sites, found = scanned_sites(case), diagnosis.sites
    assert found["num_units"].tolist() == [site.num_units for site in sites]
    assert diagnosis.summary["unobserved_sites"] == []
    if names:
        assert found["site"].tolist() == [site.name for site in sites]
    for site, name in zip(sites, found["site"], strict=True):
        assert dead_units(diagnosis)[name] == set(site.dead)
        rows = diagnosis.units[diagnosis.units["site"] == name].set_index("unit")
        assert rows.loc[sorted(site.once), "inputs_fired"].tolist() == [1] * len(site.once)
        rows = rows.assign(**{column: rows[column].fillna(-1).astype(int) for column in ("first_fired", "last_fired")})
        assert_columns_equal(rows, seen[site.name].columns(site.fires, site.post))


@pytest.mark.parametrize("way", EXACT)
@pytest.mark.parametrize("name", LAYERS)
def test_scripted_models_are_seen_as_the_models_they_were_made_from(name, way):
    """Sites, names, dead units and every column are those of the Python model."""
    model, batches = CASES[name].build()
    try:
        made = MAKERS[way](model, batches[0])
    except (RuntimeError, torch.jit.frontend.NotSupportedError) as error:
        pytest.skip(f"TorchScript does not take it: {type(error).__name__}")
    assert_as_the_oracle_sees_it(CASES[name], made, batches, names=True)


@pytest.mark.parametrize("way", [way for way in MAKERS if way not in EXACT])
@pytest.mark.parametrize("name", ["mlp", "conv_1d", "conv_bn_relu", "resnet", "u_net", "squeeze_excite", "sequences"])
def test_frozen_models_keep_their_units(name, way):
    """Weights that became constants, folded norms and blocked layouts: the units are found all the same."""
    model, batches = CASES[name].build()
    assert_as_the_oracle_sees_it(CASES[name], MAKERS[way](model, batches[0]), batches, names=False)


def test_ids_and_names_are_those_of_the_python_model():
    """A scripted model's sites are matched with its Python model's, and have the same parameters' columns."""
    model, batches = CASES["resnet"].build()
    columns = ["site", "unit", "bias", "weight_l2", "gamma", "beta", "mechanism"]
    plain = relu_doctor.scan(model, batches)
    for way in EXACT:
        other = relu_doctor.scan(MAKERS[way](model, batches[0]), batches)
        assert other.sites[["site", "site_id", "producer"]].equals(plain.sites[["site", "site_id", "producer"]])
        assert other.units[columns].equals(plain.units[columns])


def test_frozen_weights_have_names_and_columns():
    """A frozen file still tells bias and norm of each unit; a saved one by the operations that take them."""
    model, batches = CASES["mlp"].build()
    plain = relu_doctor.scan(model, batches)
    frozen = torch.jit.freeze(torch.jit.script(model))
    for made, producers in ((frozen, ["0", "2"]), (loaded(frozen), ["linear_1", "linear_2"])):
        diagnosis = relu_doctor.scan(made, batches)
        assert diagnosis.sites["producer"].tolist() == producers
        assert diagnosis.units[["bias", "weight_l2"]].equals(plain.units[["bias", "weight_l2"]])


def _relu_of_sum(x: Tensor, shift: Tensor) -> Tensor:
    return torch.relu(x + shift)


with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    relu_of_sum = torch.jit.script(_relu_of_sum)


class Mixed(nn.Module):
    """Scripted parts, a scripted function, Python, and one Python module that serves several layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.jit.script(nn.Sequential(nn.Linear(4, 6), nn.ReLU()))
        self.relu, self.second, self.shift = nn.ReLU(), nn.Linear(6, 5, bias=False), nn.Parameter(torch.zeros(5))
        self.third = torch.jit.script(nn.Sequential(nn.Linear(5, 5), nn.ReLU()))
        self.fourth = nn.Linear(5, 3)
        with torch.no_grad():
            self.first[0].bias[1] = self.shift[2] = self.third[0].bias[3] = self.fourth.bias[0] = -1e3

    def forward(self, x):
        return self.relu(self.fourth(self.third(relu_of_sum(self.second(self.first(x)), self.shift))))


def test_calls_from_python_and_from_scripted_code_are_counted_once_each():
    """Every site is there once, and each of its units saw each position once."""
    torch.manual_seed(0)
    diagnosis = relu_doctor.scan(Mixed(), list(torch.randn(40, 4).split(10)), exhaustive=True)
    assert dict(zip(diagnosis.sites["site"], diagnosis.sites["producer"], strict=True)) == {
        "first.1": "first.0",
        "relu()": "second, shift",
        "third.1": "third.0",
        "relu": "fourth",
    }
    assert {1} <= dead_units(diagnosis)["first.1"]
    assert [2 in dead_units(diagnosis)["relu()"], 3 in dead_units(diagnosis)["third.1"]] == [True, True]
    assert set(diagnosis.units["positions"]) == {40}
    assert relu_doctor.scan(Mixed(), torch.randn(40, 4)).sites.shape[0] == 4  # discovered on one batch alone


def test_a_scripted_function_alone_is_seen():
    """A Python model whose only rectifier is in a scripted function is no model without one."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.shift = nn.Linear(4, 3), nn.Parameter(torch.tensor([0.0, -1e3, 0.0]))

        def forward(self, x):
            return relu_of_sum(self.fc(x), self.shift)

    diagnosis = relu_doctor.scan(Model(), list(torch.randn(60, 4).split(20)), exhaustive=True)
    assert diagnosis.sites["producer"].tolist() == ["fc, shift"]
    assert dead_units(diagnosis)["relu()"] == {1}


class Stateful(nn.Module):
    """What it computes depends on what it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.state, self.steps = nn.Linear(4, 6), torch.zeros(1, 6), 0
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        z = self.fc(x) + self.state
        self.state = z.mean(0, keepdim=True).detach() * 5
        self.mean += self.state[0]
        return torch.relu(z + self.mean)


@pytest.mark.parametrize("script", [True, False])
def test_a_model_that_keeps_state_is_seen_as_it_runs_by_itself(script):
    """Trying the model out changes nothing of what the batches meet, nor of what is left behind."""
    torch.manual_seed(0)
    model = torch.jit.script(Stateful()) if script else Stateful()
    batches = list(torch.randn(40, 4).split(8))
    by_itself = copy.deepcopy(model)
    with torch.no_grad():
        fired = torch.cat([by_itself(batch) > 0 for batch in batches]).sum(0)
    diagnosis = relu_doctor.scan(model, batches, exhaustive=True)
    assert diagnosis.units["inputs_fired"].tolist() == fired.tolist()
    assert model.steps == 0
    assert not model.state.any()
    assert not model.mean.any()


def fingerprint(model: nn.Module) -> dict[str, object]:
    """Values, flags and attributes that a scan could leave changed."""
    return {
        "attributes": {name: list(vars(module)) for name, module in model.named_modules()},
        "modes": {name: getattr(module, "training", None) for name, module in model.named_modules()},
        "parameters": {name: (p.tolist(), p.requires_grad, p.grad) for name, p in model.named_parameters()},
        "buffers": {name: buffer.tolist() for name, buffer in model.named_buffers()},
        "constants": [
            (node.t("value").requires_grad, node.t("value").sum().item())
            for node in model.graph.findAllNodes("prim::Constant")
            if node.hasAttribute("value") and node.kindOf("value") == "t"
        ],
    }


@pytest.mark.parametrize("way", MAKERS)
def test_scripted_models_are_left_as_they_were(way):
    """Parameters, buffers, modes and TorchScript's own settings are what they were, also when the forward raises."""
    model, batches = CASES["conv_bn_relu"].build()
    made = MAKERS[way](model, batches[0])
    if way in EXACT:
        made.train()
    before, optimizes = fingerprint(made), torch._C._get_graph_executor_optimize()
    relu_doctor.scan(made, batches, mode="both" if way in EXACT else "eval")
    with pytest.raises(ForwardError, match=r"on batch 1: .*(expected input|channels)"):
        relu_doctor.scan(made, [batches[0], torch.randn(2, 2, 5, 5)])
    assert fingerprint(made) == before
    assert torch._C._get_graph_executor_optimize() is optimizes
    copy.deepcopy(made)


def test_another_thread_keeps_its_optimizations():
    """TorchScript runs unoptimised in the thread of the scan alone."""
    seen: list[bool] = []

    def batches():
        for batch in torch.randn(4, 2, 4):
            thread = threading.Thread(target=lambda: seen.append(torch._C._get_graph_executor_optimize()))
            thread.start()
            thread.join()
            yield batch

    relu_doctor.scan(torch.jit.script(nn.Sequential(nn.Linear(4, 3), nn.ReLU())), batches())
    assert seen == [True] * 4


def optimized_graph(model: nn.Module) -> str:
    x = torch.randn(2, 4)
    for _ in range(3):  # it is profiled first
        model(x)
    return str(torch.jit.last_executed_optimized_graph())


def test_a_scanned_script_is_optimized_as_ever():
    """The graphs that TorchScript makes once and keeps are made as if there had been no scan."""
    model = torch.jit.script(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Sequential(nn.Linear(3, 3), nn.ReLU())))
    scanned, other = loaded(model), loaded(model)
    relu_doctor.scan(scanned, torch.randn(30, 4))
    assert optimized_graph(scanned) == optimized_graph(other)
    assert "CallMethod" not in str(scanned.inlined_graph)


def test_a_scripted_rectifier_has_the_path_of_its_module():
    """Also where it stands alone among Python layers, without a parameter to be known by."""
    model = nn.Sequential(nn.Linear(4, 5), torch.jit.script(nn.ReLU()), nn.Linear(5, 3), torch.jit.script(nn.ReLU()))
    assert relu_doctor.scan(model, torch.randn(30, 4)).sites["site"].tolist() == ["1", "3"]


def test_scripted_rectifiers_that_no_call_reaches_are_listed():
    """Modules of a branch that is not taken are unobserved, by their paths."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Sequential(nn.Linear(4, 3), nn.ReLU()), nn.Sequential(nn.Linear(4, 3), nn.ReLU())

        def forward(self, x: Tensor, first: bool = True) -> Tensor:
            if first:
                return self.a(x)
            return self.b(x)

    diagnosis = relu_doctor.scan(torch.jit.script(Branches()), torch.randn(30, 4))
    assert diagnosis.sites["site"].tolist() == ["a.1"]
    assert diagnosis.summary["unobserved_sites"] == ["b.1"]


def test_a_script_takes_its_arguments_by_its_own_signature():
    """Of a tuple as many elements as the forward requires, of a mapping the keys that it takes."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x: Tensor, scale: float, shift: float = 0.0) -> Tensor:
            return torch.relu(self.fc(x) * scale + shift)

    model, x = torch.jit.script(Two()), torch.randn(30, 4)
    assert relu_doctor.scan(model, [(x, 2.0, "label")]).sites["num_units"].tolist() == [3]
    assert relu_doctor.scan(model, [{"x": x, "scale": 2.0, "label": 1}]).sites["num_units"].tolist() == [3]


def test_a_recurrent_layer_in_a_script_is_seen_step_by_step():
    """Below functions every step of an nn.RNN is a call of its own: one site, all columns."""

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.RNN(4, 6, nonlinearity="relu", batch_first=True)
            nn.init.constant_(self.rnn.bias_ih_l0, 0)
            self.rnn.bias_ih_l0.data[2] = -1e3

        def forward(self, x: Tensor) -> Tensor:
            return self.rnn(x)[0]

    diagnosis = relu_doctor.scan(torch.jit.script(Recurrent()), torch.randn(30, 5, 4), exhaustive=True)
    assert diagnosis.sites[["producer", "num_units"]].to_numpy().tolist() == [["rnn", 6]]
    assert dead_units(diagnosis).popitem()[1] == {2}
    assert set(diagnosis.units["positions"]) == {150}


def test_the_fast_path_of_a_scripted_transformer_hides_nothing():
    """A fused layer in a script is run unfused, in every batch, so that its rectifier is seen."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    model.layers[0].linear1.bias.data[3] = -1e3
    batches = list(torch.randn(24, 5, 8).split(8))
    plain, script = (relu_doctor.scan(made, batches, exhaustive=True) for made in (model, torch.jit.script(model)))
    assert script.sites[["site", "site_id"]].equals(plain.sites[["site", "site_id"]])
    assert script.units["inputs_fired"].equals(plain.units["inputs_fired"])
    assert 3 in dead_units(script)["layers.0.relu()"]


def test_a_script_without_a_rectifier_is_an_error():
    """Nothing seen is never nothing dead."""
    with pytest.raises(NoActivationSitesError, match="no rectifier was applied"):
        relu_doctor.scan(torch.jit.script(nn.Sequential(nn.Linear(4, 3), nn.Tanh())), torch.randn(8, 4))


EXPORTED = ["mlp", "conv_bn_relu", "resnet", "densenet", "u_net", "functions", "sequences", "pre_activation_order"]


@pytest.mark.parametrize(
    ("name", "decomposed"),
    # Decomposed, clamp_min is a clamp.
    [(name, False) for name in EXPORTED] + [(name, True) for name in EXPORTED if name != "functions"],
)
def test_exported_programs_are_seen_as_the_models_they_were_made_from(name, decomposed):
    """Operators remember the modules that they come from: sites, names, ids, dead units and numbers are the model's."""
    model, batches = CASES[name].build()
    batches = [torch.cat(batches)]
    dynamic = {0: torch.export.Dim("inputs", min=2)}
    program = torch.export.export(model, (batches[0][:8].clone(),), dynamic_shapes=(dynamic,))
    program = program.run_decompositions() if decomposed else program
    case = replace(CASES[name], scan={})
    assert_as_the_oracle_sees_it(case, program.module(), batches, names=True)
    plain = relu_doctor.scan(model, batches, exhaustive=True)
    exported = relu_doctor.scan(program, batches, exhaustive=True)
    assert exported.sites[["site", "site_id", "producer"]].equals(plain.sites[["site", "site_id", "producer"]])


class Branching(nn.Module):
    """Branches and modes as exported programs have them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 5), nn.Linear(4, 5), nn.Linear(5, 3)
        self.a.bias.data[1] = self.b.bias.data[2] = self.c.bias.data[0] = -1e3

    def forward(self, x):
        x = torch.cond(x[0, 0] > 0, lambda x: F.relu(self.a(x)), lambda x: F.relu(self.b(x)), (x,))
        with torch.no_grad():
            return F.relu(self.c(x))


def test_branches_and_modes_of_an_exported_program_are_entered():
    """Both sides of a cond and the inside of a no_grad block are sites, with the inputs that came by."""
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    x[:, 0] = x[:, 0].abs()
    model = torch.export.export(Branching(), (x,)).module()
    diagnosis = relu_doctor.scan(model, [x, -x, x], exhaustive=True)
    by_producer = {row.producer: (row.site, row.num_units) for row in diagnosis.sites.itertuples()}
    assert {producer: units for producer, (_, units) in by_producer.items()} == {"a": 5, "b": 5, "c": 3}
    inputs = {name: set(rows["inputs"]) for name, rows in diagnosis.units.groupby("site")}
    assert [inputs[by_producer[producer][0]] for producer in "abc"] == [{16}, {8}, {24}]
    assert [unit in dead_units(diagnosis)[by_producer[p][0]] for p, unit in (("a", 1), ("b", 2), ("c", 0))] == [
        True
    ] * 3


def test_an_exported_program_has_no_train_mode():
    """One sentence, and what to do."""
    program = torch.export.export(nn.Sequential(nn.Linear(4, 3), nn.ReLU()), (torch.randn(8, 4),))
    with pytest.raises(UnsupportedModelError, match=r"has no train mode .* scan it with mode='eval'"):
        relu_doctor.scan(program, torch.randn(8, 4), mode="train")


def test_operators_called_by_name_are_seen():
    """torch.ops.aten.relu is a rectifier as F.relu is, with overload or without, in place or not."""

    class Operators(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 3)
            self.a.bias.data[1] = self.b.bias.data[2] = self.c.bias.data[0] = -1e3

        def forward(self, x):
            aten = torch.ops.aten
            x = aten.relu_.default(aten.linear(x, self.a.weight, self.a.bias))
            return aten.hardtanh(self.c(aten.clamp(self.b(x), min=0)), 0, 6)

    diagnosis = relu_doctor.scan(Operators(), list(torch.randn(40, 4).split(8)), exhaustive=True)
    assert diagnosis.sites[["site", "producer"]].to_numpy().tolist() == [
        ["relu()", "a"],
        ["clamp()", "b"],
        ["hardtanh()", "c"],
    ]
    dead = dead_units(diagnosis)
    assert [1 in dead["relu()"], 2 in dead["clamp()"], 0 in dead["hardtanh()"]] == [True] * 3


def test_a_rectifier_inside_somebodys_own_operator_is_named():
    """What happens inside is not observed, and said so; what is beside it is."""

    @torch.library.custom_op("relu_doctor_tests::linear_relu", mutates_args=())
    def linear_relu(x: Tensor, weight: Tensor) -> Tensor:
        return F.relu(x @ weight.t())

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.fc = nn.Parameter(torch.randn(6, 4)), nn.Linear(6, 3)

        def forward(self, x):
            return F.relu(self.fc(torch.ops.relu_doctor_tests.linear_relu(x, self.weight)))

    diagnosis = relu_doctor.scan(Own(), torch.randn(30, 4))
    assert diagnosis.sites["producer"].tolist() == ["fc"]
    assert "relu_doctor_tests::linear_relu rectifies inside one operator" in str(diagnosis.table.coverage.notes)


def quantised() -> tuple[nn.Module, list[Tensor]]:
    """Quantised layers, and one that was left in floats."""
    from torch.ao import quantization

    model = nn.Sequential(
        quantization.QuantStub(),
        nn.Conv2d(3, 4, 3),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3),
        nn.ReLU(),
        quantization.DeQuantStub(),
        nn.Conv2d(4, 4, 3),
        nn.ReLU(),
    ).eval()
    model.qconfig, model[6].qconfig = quantization.get_default_qconfig("x86"), None
    model = quantization.fuse_modules(model, [["1", "2"]])
    quantization.prepare(model, inplace=True)
    batches = list(torch.randn(20, 3, 9, 9).split(10))
    model(batches[0])
    return quantization.convert(model), batches


@pytest.mark.skipif("x86" not in torch.backends.quantized.supported_engines, reason="no quantised kernels here")
@pytest.mark.parametrize("script", [False, True])
def test_quantised_modules_are_named_and_what_is_float_is_scanned(script):
    """One sentence names them; nothing of them is called observed, or dead."""
    model, batches = quantised()
    model[6].bias.data[1] = -1e3
    diagnosis = relu_doctor.scan(torch.jit.script(model) if script else model, batches, exhaustive=True)
    assert diagnosis.sites[["site", "num_units"]].to_numpy().tolist() == [["7", 4]]
    assert 1 in dead_units(diagnosis)["7"]
    notes = str(diagnosis.table.coverage.notes)
    assert "quantised modules are not supported and were not observed: 1 (ConvReLU2d), 3 (Conv2d)" in notes
    assert "was called on a quantised tensor, which is not supported" in notes
    with pytest.raises(NoActivationSitesError, match=r"quantised modules are not supported .* 1 \(ConvReLU2d\)"):
        relu_doctor.scan(model[:6], batches)


def test_rectifiers_between_dynamically_quantised_layers_are_scanned():
    """Their inputs are floats; that no parameter is known to feed them is said."""
    from torch.ao import quantization

    layers = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3), nn.ReLU())
    layers[0].bias.data[1] = -1e3
    diagnosis = relu_doctor.scan(quantization.quantize_dynamic(layers), torch.randn(40, 4), exhaustive=True)
    assert diagnosis.sites[["site", "num_units"]].to_numpy().tolist() == [["1", 5], ["3", 3]]
    assert 1 in dead_units(diagnosis)["1"]
    assert "quantised modules are not supported and were not observed: 0 (Linear), 2 (Linear)" in str(
        diagnosis.table.coverage.notes
    )
