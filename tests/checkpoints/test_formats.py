"""Checkpoints of every make are read to the same object, and no code in them is run."""

from __future__ import annotations

import argparse
import collections
import importlib
import io
import json
import os
import random
import struct
import sys
import types
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from relu_doctor.checkpoints.archives import LEGACY, ZIP, read_archive
from relu_doctor.checkpoints.formats import Checkpoint, load_checkpoint
from relu_doctor.checkpoints.nodes import TensorRef
from relu_doctor.checkpoints.specs import importable
from relu_doctor.errors import CheckpointError, UnsafeCheckpointError

FORMATS = [pytest.param(True, id="zip"), pytest.param(False, id="legacy")]


def make_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2))


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        net(torch.randn(4, 1, 4, 4)).square().sum().backward()
        optimizer.step()


def same(first: Any, second: Any) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(first[k], second[k]) and first[k].dtype == second[k].dtype for k in first
    )


@pytest.mark.parametrize("zipped", FORMATS)
def test_a_state_dict_comes_back_bit_for_bit(tmp_path, zipped):
    net = make_net()
    path = tmp_path / "net.anything"
    torch.save(net.state_dict(), path, _use_new_zipfile_serialization=zipped)
    checkpoint = load_checkpoint(path)
    assert checkpoint.format == (ZIP if zipped else LEGACY)
    assert same(checkpoint.state_dict, net.state_dict())
    assert (checkpoint.key, checkpoint.prefix, checkpoint.optimizer, checkpoint.placeholders) == ("", "", None, ())
    assert checkpoint.state_dict._metadata["1"] == {"version": 2}  # type: ignore[attr-defined]


@pytest.mark.parametrize("zipped", FORMATS)
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_training_checkpoint_comes_back_whole(tmp_path, zipped, protocol):
    net = make_net()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    train(net, optimizer)
    content = {
        "epoch": 7,
        "model_state_dict": net.state_dict(),
        "optimizer_state_dict": optimizer.state_dict(),
        "best_acc": np.float64(0.98),
        "best": torch.tensor(0.98),
        "args": argparse.Namespace(lr=0.01, step=99, path=Path("/x")),
        "rng": torch.get_rng_state(),
        "hist": collections.defaultdict(list, a=[1.0]),
    }
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    checkpoint = load_checkpoint(tmp_path / "a.pt")
    assert same(checkpoint.state_dict, net.state_dict())
    assert checkpoint.key == "model_state_dict"
    assert (checkpoint.epoch, checkpoint.step) == (7, 3)
    assert checkpoint.placeholders == ("args: argparse.Namespace",)
    assert checkpoint.optimizer is not None
    assert checkpoint.optimizer.mapped
    assert checkpoint.optimizer.learning_rates == (0.01,)


DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16,
    torch.uint32, torch.uint64,
]  # fmt: skip


@pytest.mark.parametrize("zipped", FORMATS)
def test_every_dtype_is_read(tmp_path, zipped):
    tensors = {str(dtype): torch.arange(6).to(dtype) for dtype in DTYPES}
    torch.save(tensors, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    out = load_checkpoint(tmp_path / "a.pt").state_dict
    for name, tensor in tensors.items():
        assert out[name].dtype == tensor.dtype
        assert torch.equal(out[name].view(torch.uint8), tensor.view(torch.uint8))


@pytest.mark.parametrize("zipped", FORMATS)
def test_views_shared_storages_and_odd_shapes_are_kept(tmp_path, zipped):
    base = torch.arange(24.0)
    tensors = {
        "base": base, "tail": base[20:], "transposed": base.view(4, 6).t(), "strided": base[::3], "scalar": base[5],
        "expanded": torch.ones(1).expand(1000, 1000), "empty": torch.empty(0, 3), "parameter": nn.Parameter(base[:2]),
    }  # fmt: skip
    torch.save(tensors, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    out = load_checkpoint(tmp_path / "a.pt").state_dict
    assert same(out, {name: tensor.detach() for name, tensor in tensors.items()})
    assert out["tail"].untyped_storage().data_ptr() == out["base"].untyped_storage().data_ptr()
    assert out["expanded"].untyped_storage().nbytes() == 4
    assert not any(tensor.requires_grad for tensor in out.values())


@pytest.mark.parametrize("zipped", FORMATS)
def test_an_old_file_with_views_of_storages_is_read(tmp_path, zipped):
    storage = torch.arange(10.0).untyped_storage()
    whole = torch.tensor([], dtype=torch.float32).set_(storage)
    part = torch.tensor([], dtype=torch.float32).set_(storage[8:24])
    torch.save({"whole": whole, "part": part}, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    assert load_checkpoint(tmp_path / "a.pt").state_dict["part"].tolist() == [2.0, 3.0, 4.0, 5.0]


def rewrite_pickle(
    source: Path,
    target: Path,
    old: bytes,
    new: bytes,
    *,
    prefix: str | None = None,
    extra: dict[str, bytes] | None = None,
) -> None:
    """Copy a zip checkpoint with its pickle changed."""
    with zipfile.ZipFile(source) as before, zipfile.ZipFile(target, "w") as after:
        for name in before.namelist():
            data = before.read(name)
            if name.endswith("data.pkl"):
                assert old in data
                data = data.replace(old, new)
            head, slash, rest = name.partition("/")
            place = f"{head if prefix is None else prefix}{slash}{rest}"
            after.writestr(place, (extra or {}).get(rest, data))


@pytest.mark.parametrize("device", [b"cuda:0", b"mps", b"cuda", b"xla:1", b"hpu"])
def test_tensors_of_any_device_come_to_the_cpu(tmp_path, device):
    torch.save({"w": torch.ones(3)}, tmp_path / "a.pt")
    cpu, other = b"X\x03\x00\x00\x00cpu", b"X" + struct.pack("<I", len(device)) + device
    rewrite_pickle(tmp_path / "a.pt", tmp_path / "b.pt", cpu, other)
    tensor = load_checkpoint(tmp_path / "b.pt").state_dict["w"]
    assert tensor.device.type == "cpu"
    assert tensor.tolist() == [1.0, 1.0, 1.0]


def test_the_prefix_of_the_zip_is_free(tmp_path):
    torch.save({"w": torch.ones(3)}, tmp_path / "a.pt")
    rewrite_pickle(tmp_path / "a.pt", tmp_path / "b.pt", b"", b"", prefix="some_run-12")
    assert load_checkpoint(tmp_path / "b.pt").state_dict["w"].tolist() == [1.0, 1.0, 1.0]


def test_big_endian_data_are_swapped(tmp_path):
    torch.save({"w": torch.arange(3.0)}, tmp_path / "a.pt")
    swapped = {"byteorder": b"big", "data/0": np.arange(3, dtype=">f4").tobytes()}
    rewrite_pickle(tmp_path / "a.pt", tmp_path / "b.pt", b"", b"", extra=swapped)
    assert load_checkpoint(tmp_path / "b.pt").state_dict["w"].tolist() == [0.0, 1.0, 2.0]


# Where the state dict is


@pytest.mark.parametrize(
    ("wrap", "key"),
    [
        (lambda sd: {"state_dict": sd}, "state_dict"),
        (lambda sd: {"model": sd, "epoch": 1}, "model"),
        (lambda sd: {"checkpoint": {"model": sd}, "x": 1}, "checkpoint.model"),
        (lambda sd: {"whatever": sd}, "whatever"),
        (lambda sd: (sd, {"lr": 1}), "[0]"),
        (lambda sd: {"net": sd, "net_ema": sd}, "net"),
        (lambda sd: {"backbone": sd, "ema": sd, "best": torch.tensor(1.0)}, "backbone"),
        (lambda sd: {"generator": sd, "discriminator": sd}, "generator"),
        (lambda sd: {"weights": {"a": torch.tensor(0.5)}, "trunk": sd}, "trunk"),
        (lambda sd: {"model": {"name": "resnet", "params": sd}}, "model.params"),
        (lambda sd: {"ema": sd}, "ema"),
        (lambda sd: {**sd, "epoch": 5}, ""),
    ],
)
def test_the_state_dict_is_found(tmp_path, wrap, key):
    state_dict = make_net().state_dict()
    torch.save(wrap(state_dict), tmp_path / "a.pt")
    checkpoint = load_checkpoint(tmp_path / "a.pt")
    assert checkpoint.key == key
    assert same(checkpoint.state_dict, state_dict)


def test_several_state_dicts_are_named_and_one_can_be_chosen(tmp_path):
    a, b = make_net().state_dict(), make_net().state_dict()
    torch.save({"encoder": a, "decoder": b}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"several state dicts.*'encoder', 'decoder'"):
        load_checkpoint(tmp_path / "a.pt")
    assert load_checkpoint(tmp_path / "a.pt", key="decoder").key == "decoder"
    with pytest.raises(CheckpointError, match="holds no state dict at 'x'"):
        load_checkpoint(tmp_path / "a.pt", key="x")


def test_state_dicts_that_were_not_taken_are_noted(tmp_path):
    state_dict = make_net().state_dict()
    torch.save({"model": state_dict, "discriminator": make_net().state_dict()}, tmp_path / "a.pt")
    assert any("discriminator" in note for note in load_checkpoint(tmp_path / "a.pt").notes)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_what_wrappers_put_before_names_is_stripped(tmp_path, prefix):
    state_dict = make_net().state_dict()
    wrapped = collections.OrderedDict((prefix + name, tensor) for name, tensor in state_dict.items())
    torch.save({"state_dict": wrapped}, tmp_path / "a.pt")
    checkpoint = load_checkpoint(tmp_path / "a.pt")
    assert checkpoint.prefix == prefix
    assert same(checkpoint.state_dict, state_dict)


def test_a_wrapped_submodule_loses_its_wrapper_too(tmp_path):
    torch.save({"encoder._orig_mod.weight": torch.ones(1), "head.weight": torch.ones(1)}, tmp_path / "a.pt")
    assert list(load_checkpoint(tmp_path / "a.pt").state_dict) == ["encoder.weight", "head.weight"]


def test_the_versions_of_wrapped_modules_follow_their_names(tmp_path):
    torch.save(nn.DataParallel(make_net()).state_dict(), tmp_path / "a.pt")
    metadata = load_checkpoint(tmp_path / "a.pt").state_dict._metadata  # type: ignore[attr-defined]
    assert metadata["1"] == {"version": 2}
    assert "" in metadata


@pytest.mark.parametrize(
    ("beside", "step", "epoch"),
    [
        ({"global_step": 120, "epoch": 3}, 120, 3),
        ({"step": torch.tensor(5), "epoch": np.int64(2)}, 5, 2),
        ({"iteration": 4.0}, 4, None),
        ({"iter": np.array(9)}, 9, None),
        ({"trainer": {"global_step": 8, "epoch": 1}}, 8, 1),
        ({"step": True, "epoch": "three"}, None, None),
        ({"step": float("nan"), "epoch": -1}, None, None),
        ({"config": {"step": 50, "epoch": 10}}, None, None),
    ],
)
def test_step_and_epoch_are_read_where_they_stand(tmp_path, beside, step, epoch):
    torch.save({"model": make_net().state_dict(), **beside}, tmp_path / "a.pt")
    checkpoint = load_checkpoint(tmp_path / "a.pt")
    assert (checkpoint.step, checkpoint.epoch) == (step, epoch)


# Objects of unknown make


def test_a_config_object_whose_module_is_gone_becomes_a_placeholder(tmp_path):
    module = types.ModuleType("vanished_config")
    exec("class Node:\n    def __init__(self):\n        self.content = {'lr': 0.1}", module.__dict__)
    sys.modules["vanished_config"] = module
    try:
        torch.save({"model": make_net().state_dict(), "cfg": {"deep": [module.Node()]}}, tmp_path / "a.pt")
    finally:
        del sys.modules["vanished_config"]
    assert load_checkpoint(tmp_path / "a.pt").placeholders == ("cfg.deep[0]: vanished_config.Node",)
    assert "vanished_config" not in sys.modules


class Evil:
    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("zipped", FORMATS)
def test_code_in_a_file_is_listed_and_not_run(tmp_path, zipped):
    bomb = tmp_path / "ran"
    content = {
        "model": make_net().state_dict(),
        "evil": Evil(os.mkdir, str(bomb)),
        "more": Evil(eval, f"open({str(bomb)!r},'w')"),
    }
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    checkpoint = load_checkpoint(tmp_path / "a.pt")
    assert not bomb.exists()
    assert checkpoint.placeholders == ("evil: posix.mkdir", "more: builtins.eval")


@pytest.mark.parametrize("zipped", FORMATS)
def test_a_whole_module_is_refused_without_trust_and_read_with_it(tmp_path, zipped):
    net = make_net()
    for content in (net, {"model": net, "epoch": 1}, {"model": net, "stats": {"mean": torch.zeros(3)}}):
        torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
        with pytest.raises(UnsafeCheckpointError, match=r"torch\.nn\.modules\.container\.Sequential.*--trust"):
            load_checkpoint(tmp_path / "a.pt")
        assert same(load_checkpoint(tmp_path / "a.pt", trust=True).state_dict, net.state_dict())


def test_a_tensor_that_needs_code_is_named_with_what_makes_it(tmp_path):
    state_dict = {"a.weight": torch.ones(2), "a.sparse": torch.eye(2).to_sparse()}
    torch.save({"model": state_dict}, tmp_path / "a.pt")
    with pytest.raises(
        UnsafeCheckpointError, match=r"'a\.sparse', made by 'torch\._utils\._rebuild_sparse_tensor'.*--trust"
    ):
        load_checkpoint(tmp_path / "a.pt")


def test_entries_that_are_no_tensors_are_left_out_and_named(tmp_path):
    torch.save({"state_dict": {"w": torch.ones(2), "version": 3, "f": argparse.Namespace()}}, tmp_path / "a.pt")
    checkpoint = load_checkpoint(tmp_path / "a.pt")
    assert list(checkpoint.state_dict) == ["w"]
    assert any("'version', 'f'" in note for note in checkpoint.notes)


def test_a_trusted_file_whose_code_fails_gives_one_sentence(tmp_path):
    torch.save({"a": Evil(int, "no number")}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="could not be unpickled, even with --trust: ValueError"):
        load_checkpoint(tmp_path / "a.pt", trust=True)


def test_a_trusted_module_may_be_of_a_class_in_the_current_directory(tmp_path, monkeypatch):
    (tmp_path / "class_for_trust.py").write_text("from torch import nn\nclass Net(nn.Linear):\n    pass\n")
    monkeypatch.chdir(tmp_path)
    with importable(""):
        torch.save(importlib.import_module("class_for_trust").Net(2, 3), "a.pt")
    del sys.modules["class_for_trust"]
    with pytest.raises(UnsafeCheckpointError, match=r"class_for_trust\.Net"):
        load_checkpoint("a.pt")
    assert "class_for_trust" not in sys.modules
    assert list(load_checkpoint("a.pt", trust=True).state_dict) == ["weight", "bias"]
    del sys.modules["class_for_trust"]


def test_trust_gives_what_safe_reading_gives(tmp_path):
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    train(net, optimizer)
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict(), "step": 3}, tmp_path / "a.pt")
    safe, trusted = load_checkpoint(tmp_path / "a.pt"), load_checkpoint(tmp_path / "a.pt", trust=True)
    assert same(safe.state_dict, trusted.state_dict)
    assert (safe.step, safe.key, safe.notes) == (trusted.step, trusted.key, trusted.notes)
    assert safe.state_dict._metadata == trusted.state_dict._metadata  # type: ignore[attr-defined]
    for name in ("0.weight", "4.bias"):
        assert safe.optimizer is not None
        assert trusted.optimizer is not None
        first, second = safe.optimizer.last_update(name), trusted.optimizer.last_update(name)
        assert first is not None
        assert second is not None
        assert torch.equal(first, second)


# Files that are no checkpoints


def zip_of(**files: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in files.items():
            archive.writestr(name.replace("__", "/").replace("_dot_", "."), data)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"hello, I am a text\n", "a text file that begins with 'hello"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"\x89HDF\r\n\x1a\n\x00\x00", "HDF5"),
        (b"\x1f\x8b\x08\x00", "gzip"),
        (b"\x93NUMPY\x01\x00", "NumPy array"),
        (b"\x80\x04}.", "a plain pickle"),
        (b"\x00\x01\x02\x03garbage\xff", "no known format"),
        (b"PK\x03\x04", "damaged or truncated"),
        (zip_of(a=b"x"), "a zip archive of something else"),
        (zip_of(policy_dot_pth=b"x"), "'policy.pth' in it: unpack"),
        (zip_of(x_dot_npy=b"x"), "a NumPy .npz archive"),
        (
            zip_of(m__data_dot_pkl=b"\x80\x02}.", m__code__x_dot_py=b""),
            "TorchScript archive.*--trust does not cover it yet",
        ),
        (zip_of(m__data_dot_pkl=b"\x80\x02}.", m__constants_dot_pkl=b""), "TorchScript"),
        (zip_of(m__archive_format=b"pt2"), r"torch\.export"),
        (zip_of(m__data_dot_pkl=b"\x80\x02}."), "holds no state dict: it is an empty dictionary"),
        (zip_of(m__data_dot_pkl=b"\x80\x02]."), "it is a list"),
        (zip_of(m__data_dot_pkl=b""), "damaged or truncated: its pickle ends early"),
        (struct.pack("<Q", 20) + b'{"a": 1', "damaged or truncated safetensors"),
        (struct.pack("<Q", 2) + b"{}", "holds no tensors"),
    ],
)
def test_a_file_that_is_no_checkpoint_gets_one_sentence(tmp_path, content, message):
    path = tmp_path / "x.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)


def test_programs_of_torch_are_refused_with_and_without_trust(tmp_path):
    script = tmp_path / "script.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated; files of it are not gone
        torch.jit.script(nn.Linear(2, 2)).save(str(script))
    for trust in (False, True):
        with pytest.raises(UnsafeCheckpointError, match="TorchScript"):
            load_checkpoint(script, trust=trust)


def test_an_exported_program_is_refused(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),))
        torch.export.save(program, tmp_path / "a.pt2")
    with pytest.raises(CheckpointError, match=r"a program of torch\.export"):
        load_checkpoint(tmp_path / "a.pt2")


def test_a_missing_file_suggests_the_closest_name(tmp_path):
    torch.save({"w": torch.ones(1)}, tmp_path / "epoch_10.pt")
    with pytest.raises(CheckpointError, match=r"there is no file .*Did you mean 'epoch_10\.pt'"):
        load_checkpoint(tmp_path / "epoch_1O.pt")
    with pytest.raises(CheckpointError, match="there is no file"):
        load_checkpoint(tmp_path / "no" / "such" / "directory.pt")


def test_a_directory_says_what_is_in_it(tmp_path):
    with pytest.raises(CheckpointError, match="a directory without checkpoint files"):
        load_checkpoint(tmp_path)
    torch.save({"w": torch.ones(1)}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"1 checkpoint file in it; give a file: 'a\.pt'"):
        load_checkpoint(tmp_path)


def test_names_from_files_cannot_control_the_terminal(tmp_path):
    torch.save({"\x1b[2Ja": {"w": torch.ones(2)}, "b\nc": {"w": torch.ones(2)}}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path / "a.pt")
    assert str(caught.value).isprintable()
    torch.save({"model": {"w": torch.ones(2)}, "\x1b[2J": argparse.Namespace()}, tmp_path / "a.pt")
    assert all(text.isprintable() for text in load_checkpoint(tmp_path / "a.pt").placeholders)


# Damage and lies


def outcome(path: Path) -> Checkpoint | CheckpointError:
    try:
        return load_checkpoint(path)
    except CheckpointError as error:
        return error


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_truncated_and_flipped_files_end_in_a_checkpoint_or_in_one_sentence(tmp_path, kind):
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    path = tmp_path / "a.pt"
    if kind == "safetensors":
        save_file(net.state_dict(), path)
    else:
        content = {
            "model": net.state_dict(),
            "args": argparse.Namespace(a=1),
            "acc": np.float64(1),
            "b": torch.tensor([True]),
        }
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    data = path.read_bytes()
    for length in range(0, len(data), 37):
        path.write_bytes(data[:length])
        assert isinstance(outcome(path), CheckpointError)
    generator = random.Random(0)
    for _ in range(400):
        flipped = bytearray(data)
        for _ in range(generator.randint(1, 4)):
            flipped[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
        path.write_bytes(flipped)
        outcome(path)


def test_a_pickle_that_claims_more_than_the_file_holds_is_damage(tmp_path):
    torch.save({"w": torch.ones(3)}, tmp_path / "a.pt")
    rewrite_pickle(tmp_path / "a.pt", tmp_path / "b.pt", b"K\x03t", b"K\x04t")
    assert isinstance(outcome(tmp_path / "b.pt"), CheckpointError)
    rewrite_pickle(tmp_path / "a.pt", tmp_path / "c.pt", b"K\x00K\x03\x85", b"K\x01K\x03\x85")
    with pytest.raises(CheckpointError, match="reaches past the end of its data"):
        load_checkpoint(tmp_path / "c.pt")


def test_compressed_records_are_refused(tmp_path):
    torch.save({"w": torch.zeros(100_000)}, tmp_path / "a.pt")
    for only in ("data.pkl", "data/0"):
        with zipfile.ZipFile(tmp_path / "a.pt") as before, zipfile.ZipFile(tmp_path / "b.pt", "w") as after:
            for name in before.namelist():
                method = zipfile.ZIP_DEFLATED if name.endswith(only) else zipfile.ZIP_STORED
                after.writestr(name, before.read(name), compress_type=method)
        with pytest.raises(CheckpointError, match=r"compressed|missing or shorter"):
            load_checkpoint(tmp_path / "b.pt")


def test_records_that_overlap_to_claim_more_than_the_file_are_refused(tmp_path):
    torch.save({"w": torch.zeros(1000), "v": torch.zeros(10)}, tmp_path / "a.pt")
    data = bytearray((tmp_path / "a.pt").read_bytes())
    at = data.rfind(b"PK\x01\x02", 0, data.rfind(b"data/1"))
    data[at + 20 : at + 28] = struct.pack("<II", 3000, 3000)
    (tmp_path / "a.pt").write_bytes(data)
    assert isinstance(outcome(tmp_path / "a.pt"), CheckpointError)


def test_a_file_that_changes_while_it_is_read_gives_a_clean_error(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"w": torch.ones(3)}, path)
    root: Any = read_archive(path, ZIP).root
    assert isinstance(root["w"], TensorRef)
    torch.save({"w": torch.ones(30)}, path)
    with pytest.raises(CheckpointError, match="changed while it was being read"):
        root["w"].load()


# safetensors


def test_a_safetensors_file_is_read_with_its_metadata(tmp_path):
    net = make_net()
    save_file(net.state_dict(), tmp_path / "a.bin", metadata={"step": "12", "epoch": "x", "format": "pt"})
    checkpoint = load_checkpoint(tmp_path / "a.bin")
    assert (checkpoint.format, checkpoint.step, checkpoint.epoch) == ("safetensors", 12, None)
    assert same(checkpoint.state_dict, net.state_dict())


def test_a_safetensors_header_that_lies_is_refused(tmp_path):
    header = json.dumps({"w": {"dtype": "F32", "shape": [1000], "data_offsets": [0, 4000]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\x00" * 16)
    with pytest.raises(CheckpointError, match="damaged or truncated safetensors"):
        load_checkpoint(tmp_path / "a.safetensors")
