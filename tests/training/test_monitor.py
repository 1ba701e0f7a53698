"""The monitor on plain loops: what it says is true, and the run is the run that it would have been."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from relu_doctor.errors import ConfigError, DyingUnitsWarning, MonitorError, MonitorWarning, UnsupportedModelError
from relu_doctor.training.history import History
from relu_doctor.training.monitor import Monitor
from tests.training.loops import Net, batches, perceptron, train

pytestmark = pytest.mark.filterwarnings("ignore::relu_doctor.errors.DyingUnitsWarning")


def sgd(model: nn.Module, lr: float = 0.05, momentum: float = 0.9) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)


def same(one, other):
    """Whether two nests of values and tensors are alike, bit by bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return one == other


@pytest.mark.parametrize("every", [1, 7])
def test_the_run_is_the_same_run(every):
    """Losses, weights, buffers, optimizer state and random numbers are bit-identical with and without a monitor."""
    left = []
    for monitored in (False, True):
        torch.manual_seed(3)
        model = Net()
        optimizer = sgd(model)
        monitor = Monitor(model, optimizer=optimizer, every=every, window=20) if monitored else None
        run = train(model, batches(60, shape=(1, 4, 4)), optimizer, monitor)
        left.append([run.losses, model.state_dict(), optimizer.state_dict(), torch.rand(3)])
    assert same(*left)


def test_windows_close_on_time_and_what_is_left_closes_with_the_monitor():
    """A diagnosis comes after each window's last step, and close() makes one of the rest."""
    model = perceptron()
    optimizer = sgd(model)
    monitor = Monitor(model, optimizer=optimizer, every=5, window=20)
    run = train(model, batches(50), optimizer, monitor)
    assert len(run.closed) == 2
    assert monitor.windows == 3
    assert sorted(set(monitor.timeline["last_step"])) == [20, 40, 50]
    assert monitor.diagnosis is not None


def test_planted_deaths_have_the_step_at_which_they_were_planted():
    """Units that are silenced between steps died with the update before; those silenced at the start were born dead."""
    model = perceptron()
    with torch.no_grad():
        model[0].bias[:3] = -100
    optimizer = sgd(model, lr=0.01)

    def plant(step: int) -> None:
        if step == 31:
            with torch.no_grad():
                model[0].bias[10:14] = -100

    monitor = Monitor(model, optimizer=optimizer, every=4, window=400)
    train(model, batches(800), optimizer, monitor, plant)
    units = monitor.units[monitor.units["site"] == "1"].set_index("unit")
    assert units.loc[[0, 1, 2], "onset"].tolist() == ["born_dead"] * 3
    died = units.loc[[10, 11, 12, 13]]
    assert died["status"].tolist() == ["dead"] * 4
    assert died["onset"].tolist() == ["died"] * 4
    assert died["onset_step"].tolist() == [30] * 4
    assert (died["onset_confidence"] > 0.95).all()


def test_a_unit_that_comes_back_is_told_as_revived():
    """A dead unit whose bias is reset is revived, with the step."""
    model = perceptron()
    with torch.no_grad():
        model[0].bias[5] = -100
    optimizer = sgd(model, lr=0.01)

    def heal(step: int) -> None:
        if step == 450:
            with torch.no_grad():
                model[0].bias[5] = 0.5

    monitor = Monitor(model, optimizer=optimizer, every=2, window=200)
    train(model, batches(800), optimizer, monitor, heal)
    unit = monitor.units.query("site == '1' and unit == 5").iloc[0]
    assert unit["onset"] == "revived"
    assert unit["onset_step"] in (450, 451)
    assert monitor.timeline.query("site == '1'")["revivals"].sum() == 1


def test_a_killing_update_is_told_within_steps():
    """One update that silences most of a layer raises an alert that names the update, its rate, and the units."""
    model = perceptron()
    optimizer = sgd(model, lr=0.01, momentum=0.0)
    told = []

    def kill(step: int) -> None:
        if step == 12:
            with torch.no_grad():
                model[2].bias[:12] = -50

    monitor = Monitor(model, optimizer=optimizer, every=50, window=100, on_alert=told.append)
    with pytest.warns(DyingUnitsWarning, match="update 11 at lr 0.01: 12 of 16 units of 3"):
        train(model, batches(30), optimizer, monitor, kill)
    assert [alert.code for alert in told] == ["RD701"]
    assert told[0].site == "3"
    assert told[0].step <= 17
    assert told[0].evidence["silent"] == 12


def test_a_sound_run_is_quiet():
    """Sparse units, dropout and a falling loss are no reason to speak."""
    torch.manual_seed(0)
    model = Net()
    optimizer = sgd(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monitor = Monitor(model, optimizer=optimizer, every=5, window=50)
        train(model, batches(200, shape=(1, 4, 4)), optimizer, monitor)
    assert monitor.alerts == ()


def test_forwards_without_gradients_do_not_count():
    """Evaluation under no_grad and forwards within pause() leave no trace in the evidence."""
    model = perceptron()
    optimizer = sgd(model)
    with Monitor(model, optimizer=optimizer, every=1, window=10) as monitor:
        for x, y in batches(10):
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            with torch.no_grad():
                model(torch.randn(1000, 16))
            with monitor.pause():
                model(torch.randn(1000, 16))
            monitor.step()
    assert monitor.diagnosis is not None
    assert monitor.diagnosis.units["inputs"].max() == 160


def test_gradient_accumulation_and_several_forwards_count_together():
    """Every forward of a step belongs to the step."""
    model = perceptron()
    optimizer = sgd(model)
    data = batches(40)
    with Monitor(model, optimizer=optimizer, every=1, window=10) as monitor:
        for step in range(10):
            for x, y in data[4 * step : 4 * step + 4]:
                F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            monitor.step()
    assert monitor.diagnosis is not None
    assert monitor.diagnosis.units["inputs"].max() == 640


def test_repeated_inputs_are_no_evidence():
    """A silent unit that saw the same 32 inputs again and again stays unproven."""
    model = perceptron()
    with torch.no_grad():
        model[0].bias[0] = -100
    optimizer = sgd(model, lr=1e-4)
    monitor = Monitor(model, optimizer=optimizer, every=1, window=100)
    train(model, batches(2) * 300, optimizer, monitor)
    unit = monitor.units.query("site == '1' and unit == 0").iloc[0]
    assert unit["status"] == "unproven"
    assert unit["silent_inputs"] <= 32


def test_an_optimizer_with_a_closure_is_followed():
    """LBFGS, which runs forward and backward inside its step, is watched as well."""
    model = perceptron()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)
    with Monitor(model, optimizer=optimizer, every=1, window=5) as monitor:
        for x, y in batches(5):

            def closure(x=x, y=y):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                return loss

            monitor.step(loss=optimizer.step(closure))
    assert monitor.diagnosis is not None
    assert monitor.diagnosis.units["inputs"].max() >= 80


def test_an_error_in_the_forward_is_the_runs_own():
    """A forward that raises raises; the monitor leaves no mode behind and goes on with the next."""

    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers, self.fail = perceptron(), False

        def forward(self, x):
            x = self.layers[1](self.layers[0](x))
            if self.fail:
                raise KeyboardInterrupt
            return self.layers[4](self.layers[3](self.layers[2](x)))

    model = Fails()
    optimizer = sgd(model)
    with Monitor(model, optimizer=optimizer, every=1, window=4) as monitor:
        for number, (x, y) in enumerate(batches(8)):
            model.fail = number == 3
            if model.fail:
                with pytest.raises(KeyboardInterrupt):
                    model(x)
                model.fail = False
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            monitor.step()
            assert torch.overrides._get_current_function_mode_stack() == []
    assert monitor.windows == 2


def test_closing_leaves_everything_as_it_was():
    """Hooks of the model and of the optimizer are gone, and the model still pickles and copies."""
    model = perceptron()
    optimizer = sgd(model)
    before = {name: list(vars(module)) for name, module in model.named_modules()}
    monitor = Monitor(model, optimizer=optimizer, window=5)
    train(model, batches(7), optimizer, monitor)
    monitor.close()
    assert {name: list(vars(module)) for name, module in model.named_modules()} == before
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    pickle.loads(pickle.dumps(copy.deepcopy(model)))


def test_misuse_is_told_in_a_sentence():
    """Arguments out of range, a closed monitor, and no forwards at all."""
    model = perceptron()
    with pytest.raises(ConfigError, match="every must be a whole number of at least 1, found 0"):
        Monitor(model, every=0)
    with pytest.raises(ConfigError, match=r"optimizer= expects a torch.optim.Optimizer or several, found str"):
        Monitor(model, optimizer="adam")
    monitor = Monitor(model)
    monitor.close()
    monitor.close()
    with pytest.raises(MonitorError, match="closed monitor"):
        monitor.step()
    with Monitor(model) as monitor:
        monitor.step()
        monitor.step()
        with pytest.warns(MonitorWarning, match="no forward of the model was seen"):
            monitor.step()


def test_a_forgotten_monitor_warns():
    """One that is let go without close() is a ResourceWarning."""
    model = perceptron()
    monitor = Monitor(model)
    with pytest.warns(ResourceWarning, match="was not closed"):
        monitor.__del__()
    monitor.close()
    gc.collect()


def test_a_sink_that_raises_is_told_of_once_and_training_goes_on():
    """The windows are kept all the same."""

    def broken(window):
        raise OSError("disk full")

    model = perceptron()
    optimizer = sgd(model)
    monitor = Monitor(model, optimizer=optimizer, window=10, sinks=[broken])
    with pytest.warns(MonitorWarning, match="the sink broken raised OSError: disk full") as caught:
        train(model, batches(40), optimizer, monitor)
    assert len([each for each in caught if each.category is MonitorWarning]) == 1
    assert monitor.windows == 4


def test_reference_batches_tell_a_change_of_the_data_from_a_death():
    """Units that are silent since the inputs moved fire on the reference; a planted death is silent there too."""
    model = perceptron()
    optimizer = sgd(model, lr=1e-4)
    reference = [x for x, _ in batches(20)]
    shifted = [(x - 8 * torch.eye(16)[0] * model[0].weight[3, 0].sign(), y) for x, y in batches(400)]

    def plant(step: int) -> None:
        if step == 1:
            with torch.no_grad():
                model[0].weight[3] = 0
                model[0].weight[3, 0] = 1 if shifted[0][0][:, 0].mean() < 0 else -1
                model[0].bias[3], model[0].bias[4] = 0, -100

    before = [buffer.clone() for buffer in model.parameters()]
    monitor = Monitor(model, optimizer=optimizer, every=2, window=200, reference=reference)
    train(model, shifted, optimizer, monitor, plant)
    assert not any(torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True))
    units = monitor.units.query("site == '1'").set_index("unit")
    assert units.loc[3, "status"] == "dead"
    assert units.loc[3, "reference_fired"] > 0
    assert units.loc[4, "status"] == "dead"
    assert units.loc[4, "reference_fired"] == 0
    assert units["reference_inputs"].unique().tolist() == [320]


def test_a_run_that_is_monitored_keeps_its_history(tmp_path):
    """Every window is in the directory, and the command's reader gives the last diagnosis."""
    from relu_doctor import History

    model = perceptron()
    optimizer = sgd(model)
    monitor = Monitor(model, optimizer=optimizer, every=5, window=20, history=tmp_path / "run")
    train(model, batches(60), optimizer, monitor)
    reader = History.read(tmp_path / "run")
    assert reader.windows["last_step"].tolist() == [20, 40, 60]
    assert reader.latest.summary == monitor.diagnosis.summary
    assert reader.units()["onset"].tolist() == monitor.units["onset"].tolist()


class Wrapped(nn.Module):
    """A model of the user's own, whose frame is compiled."""

    def __init__(self):
        super().__init__()
        self.layers = perceptron()

    def forward(self, x):
        return self.layers(x)


def compiled_run(kind, monitored):
    """Train a model that is compiled in one way or another; its losses, the graphs, and the monitor."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, graphs = Wrapped(), []

    def backend(graph, examples):
        graphs.append([node.name for node in graph.graph.nodes])
        return graph

    monitor, called, optimizer = None, model, sgd(model)
    if kind == "given":
        called = torch.compile(model, backend=backend)
    elif kind == "in place":
        model.compile(backend=backend)
    elif kind == "a part of it":
        model.layers = torch.compile(model.layers, backend=backend)
    if monitored:
        monitor = Monitor(called, optimizer=optimizer, every=5, window=20)
    if kind == "afterwards":
        called = torch.compile(model, backend=backend, fullgraph=True)
    elif kind == "in place afterwards":
        model.compile(backend=backend)
    return train(called, batches(40), optimizer, monitor).losses, graphs, monitor


@pytest.mark.parametrize("kind", ["given", "in place", "a part of it", "afterwards", "in place afterwards"])
def test_compiled_models_are_followed_and_stay_compiled(kind):
    """The run computes what it would, by the same graphs, and the units are seen."""
    losses, graphs, _ = compiled_run(kind, monitored=False)
    same_losses, same_graphs, monitor = compiled_run(kind, monitored=True)
    assert same_losses == losses
    assert [len(graph) for graph in same_graphs[: len(graphs)]] == [len(graph) for graph in graphs]
    assert monitor.units["inputs"].min() > 0
    assert monitor._watch.last_fired.max() == 40


def test_a_model_without_rectifiers_is_told():
    """There is nothing to watch, which is an answer and said once; training goes on."""
    model = nn.Sequential(nn.Linear(16, 4))
    optimizer = sgd(model)
    monitor = Monitor(model, optimizer=optimizer, window=10)
    with pytest.warns(MonitorWarning, match="no rectifier was applied in Sequential"):
        run = train(model, batches(20), optimizer, monitor)
    assert len(run.losses) == 20
    assert len(monitor.units) == 0


def test_gradients_that_cannot_be_read_end_the_watch_and_not_the_run():
    """A tensor class of the user's own refuses what is asked of it."""

    class Sealed(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            if getattr(func, "__name__", "") in {"numpy", "cat", "detach", "isfinite", "ne", "__ne__"}:
                raise RuntimeError("sealed")
            return super().__torch_function__(func, types, args, kwargs or {})

    model = perceptron()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    monitor = Monitor(model, optimizer=optimizer)

    def sealed_run() -> None:
        for step, (x, y) in enumerate(batches(6)):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            if step == 4:
                for parameter in model.parameters():
                    parameter.grad = parameter.grad.as_subclass(Sealed)
            optimizer.step()
            monitor.step()

    with pytest.warns(MonitorWarning, match=r"could not be read.*sealed"):
        sealed_run()
    monitor.close()
    assert monitor.diagnosis is not None
    assert monitor.diagnosis.units["inputs"].max() > 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_model_is_refused_in_a_sentence():
    """It takes no hooks."""
    with pytest.raises(UnsupportedModelError, match="ScriptModule"):
        Monitor(torch.jit.script(perceptron()))


def test_an_alert_that_cannot_be_sent_ends_nothing():
    """The pager is down: it is told once, and the window that was due is kept."""

    def broken(alert):
        raise OSError("pager down")

    def kill(step: int) -> None:
        if step == 12:
            with torch.no_grad():
                model[2].bias[:12] = -50

    model, windows = perceptron(), []
    monitor = Monitor(model, optimizer=sgd(model), every=5, window=20, on_alert=broken, sinks=[windows.append])
    with pytest.warns(MonitorWarning, match="pager down"), pytest.warns(DyingUnitsWarning):
        train(model, batches(40), monitor._optimizers[0], monitor, kill)
    assert [window.last_step for window in windows] == [20, 40]
    assert [alert.code for alert in monitor.alerts][:1] == ["RD701"]


def test_the_named_learning_rate_is_that_of_the_killing_update():
    """A single large one; the rate is back to its usual when the alert speaks."""
    model = perceptron()
    optimizer = sgd(model)

    def rates(step: int) -> None:
        for group in optimizer.param_groups:
            group["lr"] = 0.5 if step == 6 else 0.01
        if step == 7:
            with torch.no_grad():
                model[2].bias[:12] = -50

    monitor = Monitor(model, optimizer=optimizer, every=50, window=100)
    with pytest.warns(DyingUnitsWarning, match=r"update 6 at lr 0.5: "):
        train(model, batches(20), optimizer, monitor, rates)
    assert monitor.alerts[0].evidence["lr"] == 0.5


def test_a_branch_that_is_not_taken_any_more_did_not_die():
    """Its rectifier saw no input: nobody is accused."""

    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.out = nn.Linear(16, 32), nn.Linear(16, 32), nn.Linear(32, 4)
            self.both = True

        def forward(self, x):
            hidden = torch.relu(self.first(x))
            return self.out(hidden + torch.relu(self.second(x)) if self.both else hidden)

    def turn(step: int) -> None:
        model.both = step < 30

    torch.manual_seed(0)
    model = Branches()
    with warnings.catch_warnings():
        warnings.simplefilter("error", DyingUnitsWarning)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        optimizer.zero_grad = lambda: [p.grad.zero_() for p in model.parameters() if p.grad is not None]
        monitor = Monitor(model, optimizer=optimizer, every=5, window=100)
        train(model, batches(60), optimizer, monitor, turn)
    assert monitor.alerts == ()


def test_a_model_that_is_compiled_in_the_middle_is_followed():
    """Eager steps first, then those of a wrapper that was compiled around it."""
    model = perceptron()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    windows = []
    with Monitor(model, optimizer=optimizer, every=5, window=40, sinks=[windows.append]) as monitor:
        called = model
        for step, (x, y) in enumerate(batches(80)):
            if step == 40:
                called = torch.compile(model, backend="eager")
            optimizer.zero_grad()
            F.cross_entropy(called(x), y).backward()
            optimizer.step()
            monitor.step()
    assert windows[1].numbers["observed_steps"] >= 6


def test_models_in_float64_and_several_optimizers_have_update_ratios():
    """Each parameter is measured once all optimizers have made their step."""
    model = perceptron().double()
    parts = [torch.optim.SGD(model[place].parameters(), lr=0.01) for place in (0, 2, 4)]
    with Monitor(model, optimizer=parts, every=5, window=20) as monitor:
        for x, y in batches(20):
            model.zero_grad()
            F.cross_entropy(model(x.double()), y).backward()
            for part in parts:
                part.step()
            monitor.step()
    assert (monitor.sites["update_ratio"] > 0).all()


def test_a_second_wave_is_told_where_it_is_no_smaller():
    """A site whose units fall silent little by little is told of some times, not once and not always."""
    model = perceptron()
    optimizer = sgd(model)

    def kill(step: int) -> None:
        with torch.no_grad():
            for at, units in ((12, slice(0, 5)), (30, slice(5, 10)), (50, slice(10, 14))):
                if step == at:
                    model[2].bias[units] = -50

    monitor = Monitor(model, optimizer=optimizer, every=50, window=100)
    with pytest.warns(DyingUnitsWarning):
        train(model, batches(70), optimizer, monitor, kill)
    waves = [(alert.evidence["update"], alert.evidence["silent"]) for alert in monitor.alerts if alert.code == "RD701"]
    assert waves == [(11, 5), (29, 5)]


def test_weights_behind_a_normalisation_have_update_ratios():
    """A convolution whose output BatchNorm scales is measured as one without, row by row."""
    torch.manual_seed(0)
    model, told = Net(), []
    optimizer = sgd(model, lr=0.05, momentum=0.0)
    with Monitor(model, optimizer=optimizer, every=5, window=4, sinks=[told.append]) as monitor:
        for step, (x, y) in enumerate(batches(8, shape=(1, 4, 4))):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            if step == 4:  # the first of the second window
                weight = model.conv.weight.detach()
                change = 0.05 * model.conv.weight.grad.flatten(1).norm(dim=1)
                expected = float((change / weight.flatten(1).norm(dim=1)).max())
            optimizer.step()
            monitor.step()
    assert told[1].sites["update_ratio"].iloc[0] == pytest.approx(expected, rel=1e-4)
    assert (told[1].sites["update_ratio"] > 0).all()


def test_optimizers_that_take_turns_are_all_measured():
    """One makes every fourth step; its weights have their ratio all the same, and one that never steps has none."""
    model = perceptron()
    one, other = (torch.optim.SGD(model[place].parameters(), lr=0.01) for place in (0, 2))
    with Monitor(model, optimizer=[one, other], every=5, window=20) as monitor:
        for step, (x, y) in enumerate(batches(20)):
            model.zero_grad()
            F.cross_entropy(model(x), y).backward()
            one.step()
            if step % 4 == 3:
                other.step()
            monitor.step()
    assert (monitor.sites["update_ratio"] > 0).tolist() == [True, True]


@pytest.mark.parametrize("how", ["assigned", "swapped"])
def test_parameters_that_are_replaced_are_followed(how):
    """After a window has closed the gradients and updates of the new ones are read."""
    model = perceptron()
    optimizer = sgd(model, lr=0.01)
    windows = []
    with Monitor(model, optimizer=optimizer, every=10, window=20, sinks=[windows.append]) as monitor:
        for step, (x, y) in enumerate(batches(100)):
            if step == 30:
                if how == "assigned":
                    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
                else:
                    model[2] = copy.deepcopy(model[2])
                optimizer.param_groups.clear()
                optimizer.add_param_group({"params": list(model.parameters()), "lr": 0.02})
            if step == 85:
                with torch.no_grad():
                    model[2].bias[:12] = -50
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            if step < 85:
                monitor.step()
            else:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", DyingUnitsWarning)
                    monitor.step()
    assert [(window.sites["update_ratio"] > 0).all() for window in windows] == [True] * 5
    assert "RD701" in {alert.code for alert in monitor.alerts}


def test_forwards_without_a_step_are_told_and_what_they_showed_is_kept():
    """The loop forgot step(): one sentence at the end, and a diagnosis of what was seen."""
    model = perceptron()
    monitor = Monitor(model)
    for x, _ in batches(3):
        model(x).sum().backward()
    with pytest.warns(MonitorWarning, match="3 forwards with gradients were made and step.. was not called"):
        monitor.close()
    assert monitor.windows == 1
    assert monitor.timeline[["first_step", "last_step"]].iloc[0].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"on_alert": "mail"}, "on_alert= expects a function, found str"),
        ({"reference": 3}, "reference= expects batches, as scan.. takes them, found int"),
        ({"optimizer": 3}, "optimizer= expects a torch.optim.Optimizer or several, found int"),
        ({"effective_rank": "yes"}, "effective_rank must be True or False, found 'yes'"),
        ({"parts": 1}, "parts must be True or False, found 1"),
        ({"history": ""}, "history= expects a directory"),
    ],
)
def test_arguments_of_a_wrong_kind_are_told_in_a_sentence(arguments, message):
    """Before anything was attached."""
    model = perceptron()
    with pytest.raises(ConfigError, match=message):
        Monitor(model, **arguments)
    assert not model._forward_pre_hooks


def test_the_state_of_another_architecture_is_told():
    """None of its sites is in the model."""
    with Monitor(Net(), window=5) as monitor:
        for x, y in batches(5, shape=(1, 4, 4)):
            F.cross_entropy(monitor.model(x), y).backward()
            monitor.step()
    model = perceptron()
    with Monitor(model) as other:
        other.load_state_dict(monitor.state_dict())
        model(torch.randn(4, 16)).sum().backward()
        with pytest.warns(MonitorWarning, match="state of another architecture"):
            other.step()


def test_alerts_behind_one_that_cannot_be_sent_are_sent_with_the_next():
    """on_alert= raises for the first of two; the second waits, and is not lost."""
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4))
    with torch.no_grad():
        model[0].bias[:30], model[2].bias[:14] = -100, -100
    sent = []

    def send(alert):
        sent.append(alert)
        if len(sent) == 1:
            raise ConnectionError("pager down")

    optimizer = sgd(model, lr=1e-3)
    monitor = Monitor(model, optimizer=optimizer, every=1, window=60, on_alert=send)
    with pytest.warns(MonitorWarning, match="pager down"), pytest.warns(DyingUnitsWarning):
        train(model, batches(120), optimizer, monitor)
    assert [alert.message for alert in sent] == [alert.message for alert in monitor.alerts]
    assert len(sent) >= 3


def test_the_rate_of_one_update_late_in_a_run_is_named():
    """Between two looks: the alert tells the updates that it may have been, and the least and largest rate of them."""
    model = perceptron()
    optimizer = sgd(model, lr=0.01, momentum=0.0)

    def spike(step: int) -> None:
        optimizer.param_groups[0]["lr"] = 0.1 if step == 235 else 0.01
        if step == 236:
            with torch.no_grad():
                model[2].bias[:12] = -50

    monitor = Monitor(model, optimizer=optimizer, every=50, window=500)
    train(model, batches(300), optimizer, monitor, spike)
    waves = [alert for alert in monitor.alerts if alert.code == "RD701"]
    assert waves
    assert all("updates 231 to 240 at lr 0.01 to 0.1:" in wave.message for wave in waves)
    assert all((wave.evidence["update"], wave.evidence["until"]) == (231, 240) for wave in waves)


def test_a_window_that_closes_in_between_does_not_blur_the_updates():
    """The forward that showed them last belongs to the window before."""
    model = perceptron()
    optimizer = sgd(model, lr=0.01)

    def plant(step: int) -> None:
        if step == 249:
            with torch.no_grad():
                model[2].bias[:12] = -50

    monitor = Monitor(model, optimizer=optimizer, every=5, window=50)
    train(model, batches(270), optimizer, monitor, plant)
    told = next(alert for alert in monitor.alerts if alert.code == "RD701")
    assert "updates 246 to 250" in told.message


def test_the_rate_is_that_of_the_groups_that_update_the_site():
    """A head that learns faster is not suspected of what happened before it; a rate may be a tensor."""
    model = perceptron()
    groups = [
        {"params": [*model[0].parameters(), *model[2].parameters()]},
        {"params": model[4].parameters(), "lr": 7.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=torch.tensor(0.01))

    def kill(step: int) -> None:
        if step == 12:
            with torch.no_grad():
                model[2].bias[:12] = -50
            optimizer.param_groups[1]["lr"] = 0.0

    monitor = Monitor(model, optimizer=optimizer)
    train(model, batches(30), optimizer, monitor, kill)
    assert "update 11 at lr 0.01:" in monitor.alerts[0].message


def test_an_optimizer_without_a_rate_is_no_fault():
    """Some find it themselves; and the run's own error is the one that is seen."""

    class FindsItItself(torch.optim.SGD):
        def step(self, closure=None):
            self.param_groups[0]["lr"] = 0.01
            super().step(closure)
            self.param_groups[0]["lr"] = None

    model = perceptron()
    optimizer = FindsItItself(model.parameters(), lr=0.01)
    optimizer.param_groups[0]["lr"] = None

    def fail(step: int) -> None:
        if step == 25:
            raise ZeroDivisionError

    monitor = Monitor(model, optimizer=optimizer, window=10)
    with pytest.raises(ZeroDivisionError):
        train(model, batches(25), optimizer, monitor, fail)
    assert monitor.windows == 3
    assert "lr" not in monitor.timeline


def test_a_layer_that_is_replaced_by_a_wider_one_is_followed():
    """In the middle of a window; what was measured of the old one is not taken for the new one."""
    model = perceptron()
    optimizer = sgd(model, lr=0.01)
    with Monitor(model, optimizer=optimizer, every=10, window=60) as monitor:
        for step, (x, y) in enumerate(batches(240)):
            if step == 131:
                model[0], model[2] = nn.Linear(16, 48), nn.Linear(48, 16)
                optimizer.param_groups.clear()
                optimizer.add_param_group({"params": list(model.parameters()), "lr": 0.01})
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            monitor.step()
    sites = monitor.sites[monitor.sites["unobserved"] < monitor.sites["num_units"]]
    assert sorted(sites["num_units"]) == [16, 48]


def test_an_alert_is_in_the_history_before_its_window_closes(tmp_path):
    """A run that is killed loses none; one that is resumed keeps them."""
    model = perceptron()
    optimizer = sgd(model, lr=0.01)
    data = batches(90)

    def kill(step: int) -> None:
        if step == 12:
            with torch.no_grad():
                model[2].bias[:12] = -50

    monitor = Monitor(model, optimizer=optimizer, history=tmp_path)
    for step, (x, y) in enumerate(data[:40], start=1):
        kill(step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        monitor.step()
    kept = History.read(tmp_path).alerts
    assert kept["step"].tolist() == [alert.step for alert in monitor.alerts]
    assert kept["window_id"].isna().all()
    state = monitor.state_dict()
    monitor._history.close()  # as a process that is killed lets go of it
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Monitor(model, optimizer=optimizer, history=tmp_path, start_step=40) as resumed:
            resumed.load_state_dict(state)
            for x, y in data[40:]:
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
                resumed.step()
    assert resumed.alerts[: len(monitor.alerts)] == monitor.alerts
    found = History.read(tmp_path).alerts
    assert found["step"].tolist() == [alert.step for alert in resumed.alerts]
    assert not found["window_id"].isna().any()
    with pytest.warns(MonitorWarning, match="history"):
        monitor.close()


@pytest.mark.parametrize("value", [np.float32(1.5), np.int64(2), np.array(1.5)])
def test_numbers_of_any_kind_are_taken(value):
    """A loss of numpy's."""
    model, told = perceptron(), []
    with Monitor(model, window=1, sinks=[told.append]) as monitor:
        model(torch.randn(4, 16)).sum().backward()
        monitor.step(loss=value, grad_norm=value)
    assert told[0].numbers["loss"] == told[0].numbers["grad_norm"] == float(value)


def test_a_step_for_each_batch_is_told():
    """With gradient accumulation step() belongs behind the update."""
    model = perceptron()
    optimizer = sgd(model)

    def accumulate() -> None:
        with Monitor(model, optimizer=optimizer) as monitor:
            for step, (x, y) in enumerate(batches(60)):
                F.cross_entropy(model(x), y).backward()
                if step % 4 == 3:
                    optimizer.step()
                    optimizer.zero_grad()
                monitor.step()

    with pytest.warns(MonitorWarning, match="40 times for 10 updates"):
        accumulate()


def test_a_model_that_is_not_called_any_more_is_told():
    """It was replaced by another, whose forwards nobody sees."""
    model, other = perceptron(), perceptron()
    optimizer = sgd(model)
    optimizer.add_param_group({"params": other.parameters()})

    def go_on_with_another() -> None:
        with Monitor(model, optimizer=optimizer) as monitor:
            for step, (x, y) in enumerate(batches(60)):
                optimizer.zero_grad()
                F.cross_entropy((model if step < 10 else other)(x), y).backward()
                optimizer.step()
                monitor.step()

    with pytest.warns(MonitorWarning, match="in the last 20 steps"):
        go_on_with_another()


def test_a_fault_of_the_monitor_ends_what_it_does_and_not_the_run():
    """Whatever it is; what was told before is kept."""
    model = perceptron()
    optimizer = sgd(model)
    monitor = Monitor(model, optimizer=optimizer, window=20)

    def spoil(step: int) -> None:
        if step == 30:
            monitor._closer = None  # what no user can do

    with pytest.warns(MonitorWarning, match="the monitor failed .*please report"):
        run = train(model, batches(60), optimizer, monitor, spoil)
    assert len(run.losses) == 60
    assert monitor.windows == 1
    assert not model._forward_hooks


def test_a_unit_that_lives_for_a_while_is_revived_and_dies_again():
    """Both are counted, and neither is told of the other's step."""
    model = perceptron()
    with torch.no_grad():
        model[0].bias[5] = -100
    optimizer = sgd(model, lr=0.01)

    def change(step: int) -> None:
        with torch.no_grad():
            if step == 450:
                model[0].bias[5] = 0.5
            if step == 470:
                model[0].bias[5] = -100

    windows = []
    monitor = Monitor(model, optimizer=optimizer, every=2, window=200, sinks=[windows.append])
    train(model, batches(1000), optimizer, monitor, change)
    rows = [window.units[window.units["unit"] == 5].iloc[0] for window in windows]
    assert [row["onset"] for row in rows] == ["born_dead", "born_dead", "revived", "died", "died"]
    assert rows[2]["onset_step"] in (450, 451)
    assert rows[4]["onset_step"] == 469
    assert monitor.timeline.query("site == '1'")[["deaths", "revivals"]].sum().tolist() == [2, 1]
