"""Every source of data is opened to batches that torch computes with, or refused in one sentence."""

from __future__ import annotations

import argparse
import sys
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from relu_doctor.checkpoints.data import DataSource, open_data
from relu_doctor.errors import DataError, ModelSpecError


def gather(source: DataSource) -> Tensor:
    batches = list(source.batches)
    assert all(isinstance(batch, Tensor) for batch in batches)
    return torch.cat(batches)  # type: ignore[arg-type]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if "data_for_test" in name:
            del sys.modules[name]


@pytest.mark.parametrize("batch_size", [1, 3, 10, 100])
def test_a_npy_file_is_served_in_order_and_twice(folder, batch_size):
    array = np.arange(20.0).reshape(10, 2)
    np.save("x.npy", array)
    source = open_data("x.npy", batch_size=batch_size)
    for _ in range(2):
        out = gather(source)
        assert out.dtype == torch.float32
        assert np.array_equal(out.numpy(), array)
    assert (source.num_inputs, source.random) == (10, False)
    assert source.description == "'x.npy' (10 inputs, 2, float32)"


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("u1", torch.uint8), ("i8", torch.int64), ("i2", torch.int16), ("?", torch.bool), ("f2", torch.float16),
        (">f8", torch.float32), (">f4", torch.float32), (">i4", torch.int32), ("u2", torch.int32), ("u4", torch.int64),
        ("c8", torch.complex64), ("f4", torch.float32), ("f8", torch.float32),
    ],
)  # fmt: skip
def test_dtypes_come_out_as_torch_computes_with_them(folder, dtype, expected):
    np.save("x.npy", np.ones((4, 2), dtype=dtype))
    out = gather(open_data("x.npy", batch_size=3))
    assert out.dtype == expected
    assert bool((out == 1).all())


def test_a_limited_read_is_spread_evenly(folder):
    np.save("x.npy", np.arange(100.0))
    source = open_data("x.npy", batch_size=4, max_inputs=5)
    assert gather(source).tolist() == [0, 25, 50, 74, 99]
    assert source.num_inputs == 5
    assert "5 of 100 inputs, spread evenly" in source.description


def test_reading_more_than_there_is_reads_all(folder):
    np.save("x.npy", np.arange(3.0))
    assert open_data("x.npy", batch_size=4, max_inputs=50).num_inputs == 3


def test_a_npz_file_gives_x_or_its_only_array(folder):
    np.savez("a.npz", x=np.ones((2, 3)), y=np.zeros(2))
    assert gather(open_data("a.npz", batch_size=2)).shape == (2, 3)
    np.savez("b.npz", images=np.ones((2, 3), dtype=np.uint8))
    assert gather(open_data("b.npz", batch_size=2)).dtype == torch.uint8
    np.savez("c.npz", a=np.ones(2), b=np.ones(2))
    with pytest.raises(DataError, match="needs an array 'x' or a single array; it has 'a', 'b'"):
        open_data("c.npz", batch_size=2)


@pytest.mark.parametrize(
    "content",
    [
        torch.ones(4, 2), {"x": torch.ones(4, 2), "y": torch.ones(4)}, {"images": torch.ones(4, 2), "y": torch.ones(4)},
        {"other": torch.ones(4, 2), "n": 3}, (torch.ones(4, 2), torch.ones(4)), [torch.ones(4, 2)],
        {"inputs": np.ones((4, 2)), "args": argparse.Namespace()}, torch.ones(4, 2, dtype=torch.float64),
    ],
)  # fmt: skip
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pt_file_gives_its_tensor(folder, content, zipped):
    torch.save(content, "x.pt", _use_new_zipfile_serialization=zipped)
    out = gather(open_data("x.pt", batch_size=3))
    assert out.dtype == torch.float32
    assert torch.equal(out, torch.ones(4, 2))


@pytest.mark.parametrize("content", [{"a": torch.ones(2), "b": torch.ones(2)}, argparse.Namespace(), 3, [], {}, None])
def test_a_pt_file_without_a_clear_tensor_says_what_it_holds(folder, content):
    torch.save(content, "x.pt")
    with pytest.raises(DataError, match=r"--data 'x\.pt' holds .*; a tensor is needed"):
        open_data("x.pt", batch_size=3)


def test_a_csv_file_gives_all_columns_but_the_label(folder):
    pd.DataFrame({"a": [1, 2], "b": [0.5, 1.5], "flag": [True, False], "y": ["cat", "dog"]}).to_csv(
        "x.csv", index=False
    )
    source = open_data("x.csv", batch_size=2, label_column="y")
    assert gather(source).tolist() == [[1.0, 0.5, 1.0], [2.0, 1.5, 0.0]]
    with pytest.raises(DataError, match=r"column 'y' is not numeric \(it holds 'cat'\).*--label-column 'y'"):
        open_data("x.csv", batch_size=2)
    with pytest.raises(DataError, match="has no column 'flog' to leave out: did you mean 'flag'"):
        open_data("x.csv", batch_size=2, label_column="flog")


def test_a_csv_file_without_a_header_loses_no_row(folder):
    (folder / "x.csv").write_text("1.5,2\n3,4\n")
    source = open_data("x.csv", batch_size=2)
    assert gather(source).tolist() == [[1.5, 2.0], [3.0, 4.0]]
    assert "no header row" in source.description
    (folder / "y.csv").write_text("0,1\n3,4\n")
    assert gather(open_data("y.csv", batch_size=2)).tolist() == [[3.0, 4.0]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it is empty"),
        ("a,b\n", "is empty: 0 rows of 2 input columns"),
        ("a,b\n1,\n2,3\n", "1 value is missing or NaN in column 'b', the first in row 0"),
        ("a,b\n1,2\ninf,3\n", "1 value is NaN or Inf, the first in row 1"),
        ('a,b\n"1,2\n', r"cannot be read as a \.csv table"),
        ("a,b\n1,2\n1,2,3,4\n", r"cannot be read as a \.csv table"),
        ("\x1b[31m\nx\n", r"column '\\x1b\[31m' is not numeric"),
    ],
)
def test_a_bad_csv_file_gets_one_sentence(folder, text, message):
    (folder / "x.csv").write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        open_data("x.csv", batch_size=2)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("limit", [None, 100])
def test_values_that_are_not_finite_are_counted_and_placed(folder, limit):
    array = np.ones((100, 3, 2))
    array[40, 1] = np.nan
    array[70, 0, 0] = np.inf
    np.save("x.npy", array)
    with pytest.raises(DataError, match=r"'x\.npy': 3 values are NaN or Inf, the first in row 40"):
        open_data("x.npy", batch_size=2, max_inputs=limit)


def test_a_value_too_large_for_float32_is_not_finite(folder):
    np.save("x.npy", np.array([1.0, 1e300]))
    with pytest.raises(DataError, match="1 value is NaN or Inf, the first in row 1"):
        open_data("x.npy", batch_size=2)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array(3.0), "is a single number"),
        (np.zeros((0, 3)), "is empty: its shape is 0x3"),
        (np.zeros((3, 0)), "is empty: its shape is 3x0"),
        (np.array(["a", "b"]), "holds text"),
        (np.array([b"a"]), "holds text"),
        (np.array([None], dtype=object), "holds Python objects"),
        (np.array(["2020-01-01"], dtype="M8[D]"), "holds dates"),
        (np.zeros(2, dtype=[("a", "f4")]), "holds records"),
        (np.zeros(2, dtype=np.uint64), "dtype uint64, which torch does not compute with"),
    ],
)
def test_arrays_that_are_no_inputs_are_refused(folder, array, message):
    np.save("x.npy", array)
    with pytest.raises(DataError, match=message):
        open_data("x.npy", batch_size=2)
    np.savez("x.npz", x=array)
    with pytest.raises(DataError, match=message):
        open_data("x.npz", batch_size=2)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.npy", b"", "damaged or truncated"),
        ("x.npy", b"hello", "cannot be read as a NumPy"),
        ("x.npz", b"PK\x03\x04", "damaged or truncated"),
        ("x.pt", b"", "is empty"),
        ("x.pt", b"\x80\x04}.", "a plain pickle"),
        ("x.csv", b"\xff\xfe\x00\x01", "cannot be read"),
    ],
)
def test_damaged_files_get_one_sentence(folder, name, content, message):
    (folder / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        open_data(name, batch_size=2)
    assert str(caught.value).isprintable()


def test_a_truncated_npy_file_is_refused_at_every_length(folder):
    np.save("x.npy", np.ones((10, 3)))
    data = (folder / "x.npy").read_bytes()
    for length in range(0, len(data), 13):
        (folder / "y.npy").write_bytes(data[:length])
        with pytest.raises(DataError):
            open_data("y.npy", batch_size=2)


def test_a_wrong_suffix_is_named(folder):
    np.save("x.npy", np.ones(2))
    (folder / "x.npy").rename("y.npz")
    with pytest.raises(DataError, match=r"is a \.npy array by its content"):
        open_data("y.npz", batch_size=2)
    np.savez("z.npz", x=np.ones(2))
    (folder / "z.npz").rename("z.npy")
    with pytest.raises(DataError, match=r"is a \.npz archive by its content"):
        open_data("z.npy", batch_size=2)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nothing", "of no known kind. Expected a .npy"),
        ("images.jpg", "of no known kind"),
        ("random:", "expected a shape of one input"),
        ("random:3x", "expected a shape"),
        ("random:-3", "expected a shape"),
        ("random:0x3", "expected a shape"),
        ("random:3x²", "expected a shape"),
        ("C:/data/x.bin", "of no known kind"),
        ("missing.npy", "there is no file 'missing.npy'"),
    ],
)
def test_a_source_of_no_known_kind_is_refused(folder, source, message):
    with pytest.raises(DataError, match=message):
        open_data(source, batch_size=2)


def test_a_missing_file_suggests_its_neighbour(folder):
    np.save("digits.npy", np.ones(2))
    with pytest.raises(DataError, match=r"Did you mean 'digits\.npy'"):
        open_data("digit.npy", batch_size=2)


def test_a_label_column_for_anything_but_a_table_is_refused(folder):
    with pytest.raises(DataError, match=r"--label-column is for \.csv files"):
        open_data("random:3", batch_size=2, label_column="y")


# Random inputs


def test_random_inputs_do_not_depend_on_the_batch_size_nor_on_when_they_are_read():
    before = torch.get_rng_state()
    wholes = [gather(open_data("random:3x5", batch_size=size, max_inputs=150)) for size in (1, 7, 64, 150, 1000)]
    assert all(torch.equal(a, b) for a, b in pairwise(wholes))
    source = open_data("random:3x5", batch_size=7, max_inputs=150)
    assert torch.equal(gather(source), gather(source))
    assert torch.equal(before, torch.get_rng_state())
    assert (len(source.batches), source.num_inputs, source.random) == (22, 150, True)  # type: ignore[arg-type]


def test_random_inputs_are_standard_normal_and_follow_the_seed():
    first = gather(open_data("random:10", batch_size=64, max_inputs=5000))
    assert abs(float(first.mean())) < 0.02
    assert abs(float(first.std()) - 1) < 0.02
    assert len(first.unique()) > 49_000
    assert not torch.equal(first, gather(open_data("random:10", batch_size=64, max_inputs=5000, seed=1)))


def test_random_inputs_of_great_size_are_drawn_one_at_a_time():
    batches: Any = open_data("random:3x2000x2000", batch_size=1, max_inputs=10**9).batches
    assert batches[3].shape == (1, 3, 2000, 2000)


# Callables

CODE = """
import numpy as np
import torch
from torch.utils.data import DataLoader, TensorDataset

def stream():
    for i in range(3):
        yield torch.full((2, 1), float(i)), torch.zeros(2)

def tensor():
    return torch.arange(6.0).reshape(3, 2)

def array():
    return np.arange(6.0).reshape(3, 2)

def pair():
    return np.arange(6.0).reshape(3, 2), np.zeros(3)

def dataset():
    return TensorDataset(torch.arange(6.0).reshape(3, 2), torch.zeros(3))

loader = DataLoader(TensorDataset(torch.zeros(10, 1)), batch_size=4)

def empty():
    return []

def mapping():
    return {"x": 1}

def nothing():
    pass

def needs(root):
    pass

def raises():
    raise OSError("disk\\n gone")

number = 3
"""


@pytest.fixture
def code(folder):
    (folder / "data_for_test.py").write_text(CODE)
    return folder


def test_a_callables_batches_are_passed_on_as_they_are(code):
    source = open_data("data_for_test:stream", batch_size=1)
    batches: list[Any] = list(source.batches)
    assert [float(batch[0][0]) for batch in batches] == [0.0, 1.0, 2.0]
    assert (source.num_inputs, source.description) == (None, "'data_for_test:stream'")


@pytest.mark.parametrize("name", ["tensor", "array", "pair"])
def test_a_callable_that_returns_one_array_has_it_served_in_batches(code, name):
    source = open_data(f"data_for_test.py:{name}", batch_size=2)
    assert torch.equal(gather(source), torch.arange(6.0).reshape(3, 2))
    assert source.num_inputs == 3


def test_a_dataset_is_batched_and_a_loader_is_taken_as_it_is(code):
    source = open_data("data_for_test:dataset", batch_size=2)
    batches: list[Any] = list(source.batches)
    assert ([len(batch[0]) for batch in batches], source.num_inputs) == ([2, 1], 3)
    assert open_data("data_for_test:loader", batch_size=2).num_inputs == 10


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("empty", DataError, "returned no batches"),
        ("mapping", DataError, "returned a dict; an iterable of batches"),
        ("nothing", DataError, "returned a NoneType"),
        ("number", DataError, "is a int; a callable"),
        (
            "needs",
            ModelSpecError,
            "needs arguments that were not given: 'root'; name a callable that needs no arguments",
        ),
        ("raises", ModelSpecError, r"raised OSError: disk\\n gone"),
        ("absent", ModelSpecError, "has no attribute 'absent'"),
    ],
)
def test_a_callable_that_gives_no_batches_says_why(code, name, error, message):
    with pytest.raises(error, match=message):
        open_data(f"data_for_test:{name}", batch_size=2)
