"""Reading a pickle runs nothing, whatever the file asks for."""

from __future__ import annotations

import argparse
import collections
import contextlib
import copyreg
import datetime as dt
import enum
import io
import os
import pathlib
import pickle
import random
import struct
import sys
import types
from typing import Any

import numpy as np
import pytest
import torch

from relu_doctor.checkpoints.nodes import (
    ArrayNode,
    DamagedPickleError,
    OrderedItems,
    Placeholder,
    StorageRef,
    TensorRef,
    make_tensor,
)
from relu_doctor.checkpoints.pickles import read_pickle
from relu_doctor.checkpoints.streams import BoundedReader, StorageFile


def read(data: bytes) -> Any:
    return read_pickle(BoundedReader(io.BytesIO(data), len(data)))


class Evil:
    """Makes a pickle that would call something."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """A path that appears if anything is run; imports by the reader would fail the test as well."""
    bomb = tmp_path / "ran"
    before = set(sys.modules)
    yield bomb
    assert not bomb.exists(), "code in the file was run"
    assert not {name for name in set(sys.modules) - before if "trap" in name}


PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_call_becomes_a_placeholder_and_is_not_made(trap, protocol):
    for function, args in [
        (os.system, (f"touch {trap}",)),
        (eval, (f"open({str(trap)!r}, 'w')",)),
        (exec, (f"open({str(trap)!r}, 'w')",)),
        (os.mkdir, (str(trap),)),
        (getattr, (os, "system")) if protocol > 5 else (__import__, ("os",)),
    ]:
        value = read(pickle.dumps({"a": [Evil(function, *args)]}, protocol=protocol))
        assert isinstance(value["a"][0], Placeholder)


@pytest.mark.parametrize(
    "data",
    [
        b"cos\nsystem\n(S'touch {}'\ntR.",
        b"(S'touch {}'\nios\nsystem\n.",  # INST
        b"(cos\nsystem\nS'touch {}'\no.",  # OBJ
        b"\x80\x02cos\nsystem\nX\x00\x00\x00\x00\x85\x81.",  # NEWOBJ
        b"\x80\x04cos\nsystem\nX\x00\x00\x00\x00\x85}\x92.",  # NEWOBJ_EX
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.",  # STACK_GLOBAL
        b"cos\nsystem\n(S'touch {}'\ntR(tR.",  # calling what a call returned
        b"\x80\x02\x82\x01(tR.",  # EXT1
        b"\x80\x02\x83\x01\x00(tR.",  # EXT2
        b"\x80\x02\x84\x01\x00\x00\x00(tR.",  # EXT4
        b"ctrap_module_that_would_be_imported\nname\n.",
    ],
)
def test_every_way_to_a_call_stays_inert(trap, data):
    read(data.replace(b"{}", str(trap).encode()))


def test_an_extension_code_is_not_looked_up(trap):
    copyreg.add_extension("os", "system", 240)
    try:
        value = read(b"\x80\x02\x82\xf0X\x04\x00\x00\x00true\x85R.")
    finally:
        copyreg.remove_extension("os", "system", 240)
    assert isinstance(value, Placeholder)


@pytest.mark.parametrize("target", [b"]", b"}", b"K\x01", b"X\x01\x00\x00\x00a", b"N"])
@pytest.mark.parametrize(
    "state", [b"}X\x09\x00\x00\x00__class__K\x01s", b"N}X\x09\x00\x00\x00__class__K\x01s\x86", b"K\x01"]
)
def test_a_state_for_a_plain_value_is_refused(target, state):
    with pytest.raises(DamagedPickleError):
        read(b"\x80\x02" + target + state + b"b.")


@pytest.mark.parametrize("name", ["__class__", "__dict__", "__setstate__", "dotted", "items", "__reduce__"])
def test_a_state_sets_no_attribute_of_a_placeholder_or_dictionary(name):
    key = b"X" + struct.pack("<I", len(name)) + name.encode()
    for state in (b"}" + key + b"K\x01s", b"N}" + key + b"K\x01s\x86", b"}K\x05K\x01s"):
        thing = read(b"\x80\x02cevil\nThing\n)R" + state + b"b.")
        assert type(thing) is Placeholder
        assert thing.dotted == "evil.Thing"
        assert isinstance(thing.items, dict)
        items = read(b"\x80\x02ccollections\nOrderedDict\n)R" + state + b"b.")
        assert type(items) is OrderedItems
        assert list(items.items()) == []


class Custom:
    def __init__(self):
        self.x = 1

    def __setstate__(self, state):
        raise AssertionError("ran")


class Slotted:
    __slots__ = ("a",)

    def __init__(self):
        self.a = 5


class MyDict(dict[str, int]):
    pass


class MyList(list[int]):
    pass


class MySet(set[int]):
    pass


class Color(enum.Enum):
    RED = 1


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_objects_of_any_class_come_out_with_their_names(protocol):
    if protocol < 2:
        things = [
            Custom(),
            argparse.Namespace(lr=0.1),
            Color.RED,
            pathlib.PurePosixPath("/a"),
            dt.date(2020, 1, 1),
        ]
    else:
        things = [Custom(), Slotted(), argparse.Namespace(lr=0.1), Color.RED, MyDict(a=1), MyList([1]), MySet([1])]
    out = read(pickle.dumps({"things": things, "plain": 3}, protocol=protocol))
    assert all(isinstance(thing, Placeholder) for thing in out["things"])
    assert out["plain"] == 3
    by_name = {thing.dotted.rpartition(".")[2]: thing for thing in out["things"]}
    assert by_name["Namespace"].state == {"lr": 0.1}
    assert "Color" in by_name
    if protocol >= 2:
        assert by_name["MyDict"].items == {"a": 1}
        assert by_name["MyList"].elements == [1]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_plain_values_come_out_equal(protocol):
    values = {
        "n": None, "t": True, "f": False, "i": -5, "big": 2**200, "neg": -(2**70), "x": 1.5, "inf": float("inf"),
        "s": "aé\n'\"\U0001f600", "b": b"\x00\xff", "ba": bytearray(b"ab"), "c": 1 + 2j, "l": [1, [2, []]],
        "tuple": (1,), "two": (1, 2), "three": (1, 2, 3), "four": (1, 2, 3, 4), "empty": (), "set": {1, 2},
        "frozen": frozenset({3}), 5: "int key", (1, "a"): "tuple key", None: 0,

        "od": collections.OrderedDict(a=1), "dd": collections.defaultdict(list, a=[1]),
        "counter": collections.Counter("aab"),
    }  # fmt: skip
    assert read(pickle.dumps(values, protocol=protocol)) == values


def test_a_recursive_value_keeps_its_shape():
    value: list[object] = []
    value.append(value)
    out = read(pickle.dumps(value))
    assert out[0] is out


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_numpy_values_come_out_as_numbers_and_tensors(protocol):
    values: dict[str, Any] = {
        "f": np.float64(0.97), "f32": np.float32(0.5), "i": np.int64(7), "b": np.bool_(True), "half": np.float16(2),
        "a": np.arange(6, dtype=np.float32).reshape(2, 3), "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "big": np.arange(3, dtype=">i4"), "text": np.array(["a"]), "obj": np.array([None, 1], dtype=object),
        "date": np.datetime64("2020-01-01"), "void": np.zeros(1, dtype=[("a", "i4")]), "zero": np.zeros((0, 3)),
    }  # fmt: skip
    out = read(pickle.dumps(values, protocol=protocol))
    assert (out["f"], out["f32"], out["i"], out["b"], out["half"]) == (0.97, 0.5, 7, True, 2.0)
    assert type(out["i"]) is int
    for key in ("a", "fortran", "big", "zero"):
        assert isinstance(out[key], ArrayNode)
        assert np.array_equal(out[key].load().numpy(), values[key]), key
    for key in ("text", "obj", "void"):
        assert out[key].load() is None
    assert isinstance(out["date"], Placeholder)


def test_an_array_whose_size_lies_is_not_read():
    data = pickle.dumps(np.arange(4, dtype=np.float64), protocol=2).replace(b"K\x04\x85", b"K\x05\x85")
    assert read(data).load() is None


@pytest.mark.parametrize("opener", [b"]", b"(", b"}K\x00", b"\x80\x02" + b"cfoo\nBar\n"])
def test_deep_nesting_is_read_or_refused_but_never_crashes(opener):
    depth = 300_000
    closer = {b"]": b"a", b"(": b"t", b"}K\x00": b"s"}.get(opener, b"\x85R")
    inner = b"" if opener == b"(" else b"N"
    value = read(opener * depth + inner + closer * depth + b".")
    del value


def test_a_deeply_nested_dictionary_key_is_refused():
    with pytest.raises(DamagedPickleError):
        read(b"}" + b"N" + b"\x85" * 100_000 + b"K\x01s.")


def test_a_key_of_exponential_size_is_refused():
    with pytest.raises(DamagedPickleError):
        read(b"\x80\x04}K\x01" + b"\x94h\x00" * 0 + b"".join(b"22\x87" for _ in range(40)) + b"K\x01s.")


def test_a_short_pickle_cannot_fill_the_memory_with_copies():
    many = pickle.dumps(list(range(10_000)), protocol=2)[2:-1]
    data = b"\x80\x02]" + many + b"q\x500" + b"cbuiltins\nset\nh\x50\x85R0" * 20_000 + b"."
    with pytest.raises(DamagedPickleError, match="over and over"):
        read(data)


def test_a_length_far_beyond_the_file_is_damage_not_memory():
    for data in (b"\x8e" + struct.pack("<Q", 2**62) + b"ab.", b"B\xff\xff\xff\x7fab.", b"\x8b\xff\xff\xff\x7fab."):
        with pytest.raises(DamagedPickleError):
            read(b"\x80\x04" + data)


@pytest.mark.parametrize(
    "data", [b"", b".", b"0.", b"\x85.", b"a.", b"s.", b"R.", b"b.", b"t.", b"h\x01.", b"\xff.", b"Pid\n."]
)
def test_a_stream_that_breaks_the_rules_is_damage(data):
    with pytest.raises(DamagedPickleError):
        read(data)


def test_every_truncation_and_many_bit_flips_end_in_a_value_or_in_damage():
    values = {"a": [1, 2.5, "x", (1, 2, 3), {4}], "o": argparse.Namespace(a=1), "n": np.float64(2), "arr": np.zeros(3)}
    generator = random.Random(0)
    for protocol in PROTOCOLS:
        data = pickle.dumps(values, protocol=protocol)
        for length in range(len(data)):
            with pytest.raises(DamagedPickleError):
                read(data[:length])
        for _ in range(400):
            flipped = bytearray(data)
            for _ in range(generator.randint(1, 3)):
                flipped[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
            with contextlib.suppress(DamagedPickleError):
                read(bytes(flipped))


def test_random_bytes_end_in_a_value_or_in_damage():
    generator = random.Random(1)
    opcodes = b"().0123FGIJKLMNPQRSTUVX]abcdeghijlopqrstu}"
    opcodes += b"\x80\x81\x82\x83\x84\x85\x86\x87\x88\x89\x8a\x8c\x8f\x90\x91\x92\x93\x94"
    for _ in range(3000):
        data = bytes(generator.choice(opcodes) for _ in range(generator.randint(1, 40))) + b"."
        with contextlib.suppress(DamagedPickleError):
            read(data)


# Tensors


def storage(nbytes: int, dtype: torch.dtype | None = torch.float32) -> StorageRef:
    return StorageRef(StorageFile(pathlib.Path("x"), 0, 0), "0", 0, nbytes, dtype)


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [
        (0, (5,), (1,)), (1, (4,), (1,)), (0, (2, 3), (3, 1)), (-1, (1,), (1,)), (0, (-1,), (1,)), (0, (2,), (-1,)),
        (0, (2**62,), (1,)), (0, (2**40, 2**40), (0, 0)), (0, (2,), (2**62,)), (0, (1,), ()), (0, "ab", (1,)),
        (0, (1.0,), (1,)), (True, (1,), (1,)), (0, (True,), (1,)), (None, (1,), (1,)), (2**63, (0,), (1,)),
        (0, (1,) * 100, (1,) * 100), (0, (2**70,), (1,)),
    ],
)  # fmt: skip
def test_a_tensor_that_does_not_fit_its_data_is_damage(offset, size, stride):
    with pytest.raises(DamagedPickleError):
        make_tensor(storage(16), offset, size, stride, None)


def test_an_expanded_tensor_is_a_view_of_its_few_bytes():
    ref = make_tensor(storage(4), 0, (10**6, 10**6), (0, 0), None)
    assert isinstance(ref, TensorRef)
    assert ref.numel == 10**12


def test_a_module_made_and_gone_leaves_a_placeholder():
    module = types.ModuleType("vanishing_config")
    exec("class Node:\n    def __init__(self):\n        self.content = {'lr': 0.1}", module.__dict__)
    sys.modules["vanishing_config"] = module
    try:
        data = pickle.dumps({"cfg": module.Node()})
    finally:
        del sys.modules["vanishing_config"]
    out = read(data)
    assert out["cfg"].dotted == "vanishing_config.Node"
    assert out["cfg"].state == {"content": {"lr": 0.1}}
    assert "vanishing_config" not in sys.modules
