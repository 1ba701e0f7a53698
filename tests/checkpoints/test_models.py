"""A model is built from what the user names, and takes a checkpoint whole or not at all."""

from __future__ import annotations

import collections
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from relu_doctor.checkpoints.formats import Checkpoint
from relu_doctor.checkpoints.models import build_model, load_into, parse_arguments, resolve
from relu_doctor.errors import ModelSpecError, StateDictMismatchError, UnsupportedModelError

NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width=3, *, deep: bool = False):
        super().__init__()
        self.fc = nn.Linear(2, width)

class Zoo:
    tiny = Net

def needs(width):
    return Net(width)

def raises():
    raise ValueError("bad \\x1b[31m width")

def exits():
    raise SystemExit(3)

def returns_none():
    return None

ready = Net(5)
number = 7
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "net_for_test.py").write_text(NET)
    monkeypatch.chdir(tmp_path)
    before, path = set(sys.modules), list(sys.path)
    yield tmp_path
    assert sys.path == path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def width_of(model: nn.Module) -> int:
    return len(model.state_dict()["fc.bias"])


@pytest.mark.parametrize(
    "spec", ["net_for_test:Net", "net_for_test.py:Net", "./net_for_test.py:Net", "net_for_test:Zoo.tiny"]
)
def test_a_model_is_built_from_a_module_or_a_file(folder, spec):
    assert width_of(build_model(spec, ["width=4"])) == 4


def test_an_absolute_path_and_a_finished_model_work(folder):
    assert width_of(build_model(f"{folder / 'net_for_test.py'}:Net")) == 3
    assert width_of(build_model("net_for_test.py:ready")) == 5


def test_the_same_file_is_the_same_module_however_it_is_named(folder):
    first = resolve("net_for_test.py:Net", what="--model")
    assert resolve(f"{folder / 'net_for_test.py'}:Net", what="--model") is first
    assert resolve("./net_for_test.py:Net", what="--forward") is first


def test_a_file_may_import_its_neighbours_from_anywhere(folder, monkeypatch, tmp_path_factory):
    (folder / "neighbour_for_test.py").write_text("WIDTH = 6\n")
    (folder / "main_net.py").write_text(
        "from neighbour_for_test import WIDTH\nfrom torch import nn\ndef make():\n"
        "    import net_for_test\n    return nn.Linear(2, WIDTH)\n"
    )
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    model = build_model(f"{folder / 'main_net.py'}:make")
    assert isinstance(model, nn.Linear)
    assert model.out_features == 6


@pytest.mark.parametrize(
    ("spec", "args", "message"),
    [
        ("net_for_test", [], "not of the form expected"),
        ("net_for_test:", [], "not of the form expected"),
        ("net_for_test:a b", [], "not of the form expected"),
        ("net for:x", [], "is no module name"),
        ("nt_for_test:Net", [], "there is no module 'nt_for_test'"),
        ("torch.nnn:Net", [], r"there is no module 'torch\.nnn'"),
        ("net_for_tst.py:Net", [], r"there is no file .*Did you mean 'net_for_test\.py'"),
        ("net_for_test:Nett", [], "has no attribute 'Nett'. Did you mean 'Net'"),
        ("net_for_test:zzzzz", [], "has no attribute 'zzzzz'. It has"),
        ("net_for_test:number", [], "is a int; a class or function"),
        ("net_for_test:needs", [], "needs arguments that were not given: 'width'; give --model-arg width="),
        ("net_for_test:Net", ["widht=3"], "takes no argument 'widht': did you mean 'width'"),
        ("net_for_test:raises", [], r"raised ValueError: bad \\x1b\[31m width"),
        ("net_for_test:exits", [], "raised SystemExit: 3"),
        ("net_for_test:returns_none", [], r"returned a NoneType; a torch\.nn\.Module is needed"),
        ("net_for_test:ready", ["a=1"], "is a finished Net"),
        ("net_for_test:Net", ["width"], "not of the form key=value"),
        ("net_for_test:Net", ["width=1", "width=2"], "gives 'width' twice"),
    ],
)
def test_every_mistake_in_a_spec_gets_one_sentence(folder, spec, args, message):
    with pytest.raises(ModelSpecError, match=message) as caught:
        build_model(spec, args)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import not_installed_anywhere", "imports 'not_installed_anywhere', which is not installed"),
        ("def f(:", "raised SyntaxError in line 1"),
        ("1 / 0", "raised ZeroDivisionError: division by zero"),
        ("import sys; sys.exit('usage')", "raised SystemExit: usage"),
        ("from .other import x", "is part of a package; name it as"),
    ],
)
@pytest.mark.parametrize("as_file", [True, False])
def test_a_file_that_cannot_be_imported_says_why_and_leaves_nothing(folder, code, message, as_file):
    (folder / "broken_for_test.py").write_text(code)
    before = set(sys.modules)
    with pytest.raises(ModelSpecError, match=message):
        build_model("broken_for_test.py:f" if as_file else "broken_for_test:f")
    assert not {name for name in set(sys.modules) - before if "broken" in name}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3), ("1e-3", 1e-3), ("true", True), ("False", False), ("None", None), ("[1, 2]", [1, 2]), ('"3"', "3"),
        ("resnet18", "resnet18"), ("", ""), ("a=b", "a=b"), ("1\nb = 2", "1\nb = 2"), ("{ a = 1 }", {"a": 1}),
        ("3x3", "3x3"),
    ],
)  # fmt: skip
def test_an_argument_is_a_toml_value_or_the_bare_string(text, value):
    assert parse_arguments([f"key={text}"]) == {"key": value}


# Loading


def checkpoint(state_dict: Any, **fields: Any) -> Checkpoint:
    return Checkpoint(Path("some.pt"), "PyTorch zip", state_dict, **fields)


def net(width: int = 4) -> nn.Sequential:
    return nn.Sequential(
        collections.OrderedDict(conv=nn.Conv2d(1, width, 3), norm=nn.BatchNorm2d(width), fc=nn.Linear(width, 2))
    )


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_a_fitting_checkpoint_is_loaded_bit_for_bit():
    source, target = net(), net()
    assert load_into(target, checkpoint(source.state_dict())) == ()
    assert all(
        torch.equal(a, b) for a, b in zip(source.state_dict().values(), target.state_dict().values(), strict=True)
    )


def test_what_does_not_fit_is_told_apart_and_nothing_is_loaded():
    state = dict(net(width=5).state_dict())
    state["convolution.weight"] = state.pop("conv.weight")
    target = net()
    before = snapshot(target)
    with pytest.raises(StateDictMismatchError) as caught:
        load_into(target, checkpoint(state))
    message = str(caught.value)
    assert "1 missing: conv.weight (convolution.weight in the file?)" in message
    assert "1 unexpected: convolution.weight (conv.weight in the model?)" in message
    assert "6 of another shape: conv.bias is 5, 4 expected" in message
    assert "and 1 more" in message
    assert all(torch.equal(before[name], tensor) for name, tensor in target.state_dict().items())


def test_another_models_checkpoint_is_said_to_be_that():
    with pytest.raises(StateDictMismatchError, match=r"1 tensors of 'some\.pt'.*no name is common to both"):
        load_into(net(), checkpoint({"blah": torch.ones(1)}))


def test_many_mismatches_are_cut_to_a_handful():
    many = {f"layer{i}.\x1b": torch.ones(1) for i in range(500)}
    with pytest.raises(StateDictMismatchError, match="and 495 more") as caught:
        load_into(net(), checkpoint(many))
    assert len(str(caught.value)) < 2500
    assert str(caught.value).isprintable()


def test_other_dtypes_are_cast_and_noted():
    source, target = net().half(), net()
    assert load_into(target, checkpoint(source.state_dict())) == (
        "8 tensors were saved as torch.float16 and loaded as torch.float32.",
    )
    weight = target.state_dict()["conv.weight"]
    assert weight.dtype == torch.float32
    assert torch.equal(weight, source.state_dict()["conv.weight"].float())


def test_complex_values_for_real_ones_are_refused():
    state = {name: tensor.to(torch.complex64) for name, tensor in nn.Linear(2, 2).state_dict().items()}
    with pytest.raises(StateDictMismatchError, match="2 complex where real numbers are needed"):
        load_into(nn.Linear(2, 2), checkpoint(state))


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: nn.ModuleDict({"module": m}), lambda m: m])
def test_a_wrapped_model_takes_plain_names(wrap):
    source, target = net(), wrap(net())
    load_into(target, checkpoint(source.state_dict()))
    assert torch.equal(next(target.parameters()), source.state_dict()["conv.weight"])


def test_a_prefix_of_the_file_alone_is_left_out_and_noted():
    source = {f"model.net.{name}": tensor for name, tensor in net().state_dict().items()}
    assert load_into(net(), checkpoint(source)) == (
        "The names in the file were read without their prefix 'model.net.'.",
    )


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(2, 2, bias=False)
        self.b = nn.Linear(2, 2, bias=False)
        self.b.weight = self.a.weight


def test_a_tied_tensor_may_stand_in_the_file_once():
    model = Tied()
    load_into(model, checkpoint({"b.weight": torch.eye(2)}))
    assert torch.equal(model.a.weight, torch.eye(2))
    assert model.a.weight is model.b.weight


class WithExtra(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(1, 1)
        self.extra: Any = None

    def get_extra_state(self) -> Any:
        return {"scale": 3}

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


def test_extra_state_is_handed_on_when_plain_and_may_be_absent():
    model = WithExtra()
    state = {name: tensor for name, tensor in WithExtra().state_dict().items() if isinstance(tensor, torch.Tensor)}
    load_into(model, checkpoint(state))
    assert model.extra is None
    load_into(model, checkpoint(state, extra_state={"_extra_state": {"scale": 9}}))
    assert model.extra == {"scale": 9}


def test_old_names_that_the_model_knows_are_accepted():
    old = nn.Linear(2, 2).state_dict()
    old["weight_g"], old["weight_v"] = torch.ones(2, 1), old.pop("weight")
    model = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    load_into(model, checkpoint(old))
    assert torch.equal(model.bias, old["bias"])


def test_a_file_from_before_num_batches_tracked_is_accepted():
    state = {name: t for name, t in net().state_dict().items() if not name.endswith("num_batches_tracked")}
    load_into(net(), checkpoint(state))


class Fails(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(1, 1)
        self.register_load_state_dict_pre_hook(self._count)
        self.last = nn.Linear(1, 1)
        self.last.register_load_state_dict_pre_hook(lambda *args: 1 / 0)

    def _count(self, *args: object) -> None:
        pass


def test_a_load_that_fails_half_way_leaves_the_model_as_it_was():
    model = Fails()
    before = snapshot(model)
    with pytest.raises(StateDictMismatchError, match="ZeroDivisionError"):
        load_into(model, checkpoint({name: torch.ones_like(tensor) for name, tensor in before.items()}))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_model_of_nothing_but_shapes_is_refused():
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    with pytest.raises(UnsupportedModelError, match="meta device"):
        load_into(model, checkpoint(nn.Linear(2, 2).state_dict()))


def test_a_lazy_model_takes_its_shapes_from_the_file():
    model = nn.LazyLinear(2)
    load_into(model, checkpoint(nn.Linear(3, 2).state_dict()))
    assert model.weight.shape == (2, 3)
