"""``--data``: where the inputs come from, opened and checked before the scan begins."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from relu_doctor.checkpoints.archives import SAFETENSORS, check_file, read_archive, tell_format
from relu_doctor.checkpoints.arrays import (
    RANDOM_INPUTS,
    NumpyRows,
    RandomBatches,
    Rows,
    TensorRows,
    check_rows,
    describe_shape,
)
from relu_doctor.checkpoints.search import TensorLike, as_mapping, as_tensor, describe
from relu_doctor.checkpoints.specs import call, importable, is_file_spec, resolve
from relu_doctor.errors import CheckpointError, DataError
from relu_doctor.observe.inputs.feeding import ArrayBatches
from relu_doctor.text import clean_text, closest_name, name_some

_FORMS = (
    "Expected a .npy, .npz, .pt or .csv file, random:3x32x32, or a callable that returns batches "
    "(package.module:name or path/to/file.py:name)"
)
_USUAL_KEYS = ("x", "inputs", "data", "images", "X", "input")
_FILES = (".npy", ".npz", ".pt", ".pth", ".csv")


@dataclass(frozen=True, slots=True)
class DataSource:
    """Inputs to be scanned on.

    Attributes:
        batches: any iterable of batches; for files one with a length that can be read again.
        description: what it is, as the end of "observed on …".
        num_inputs: how many inputs there are to read, or ``None`` when only reading will tell.
        random: whether the inputs are random numbers and no data.
    """

    batches: Iterable[object]
    description: str
    num_inputs: int | None
    random: bool = False


def open_data(
    source: str,
    *,
    batch_size: int,
    label_column: str | None = None,
    max_inputs: int | None = None,
    seed: int = 0,
) -> DataSource:
    """Open a source of inputs.

    Args:
        source: a ``.npy`` file (memory-mapped), ``.npz`` (array ``x``, else its only array), ``.pt`` (a tensor, or a
            mapping or tuple that holds one) or ``.csv`` file (all columns but the labels); ``random:3x32x32``; or a
            callable without arguments that returns batches, named as ``--model`` is.
        batch_size: inputs in a batch, for files and random inputs.
        label_column: the column of a ``.csv`` file that is no input.
        max_inputs: read only so many, spread evenly over a file; a callable's own batches are not limited here.
        seed: for random inputs.

    Raises:
        DataError: the source is missing, empty, no array of numbers, or holds NaN or Inf.
        ModelSpecError: a callable cannot be found, or raised.
    """
    if batch_size < 1 or (max_inputs is not None and max_inputs < 1):
        raise DataError(f"batch size and number of inputs must be at least 1, not {min(batch_size, max_inputs or 1)}.")
    suffix = Path(source).suffix.lower()
    if label_column is not None and suffix != ".csv":
        raise DataError(f"--label-column is for .csv files; '{clean_text(source)}' has no columns.")
    if source.startswith("random:"):
        return _open_random(source, batch_size, max_inputs, seed)
    if suffix in _FILES:
        return _open_file(Path(source), suffix, batch_size, label_column, max_inputs)
    if ":" in source:
        return _open_callable(source, batch_size, max_inputs)
    raise DataError(f"--data '{clean_text(source)}' is of no known kind. {_FORMS}.")


def _open_random(source: str, batch_size: int, max_inputs: int | None, seed: int) -> DataSource:
    parts = source.removeprefix("random:").lower().split("x")
    if not all(part.isascii() and part.isdigit() and 0 < int(part[:9]) < 2**24 and len(part) < 9 for part in parts):
        raise DataError(f"--data '{clean_text(source)}': expected a shape of one input such as random:3x32x32.")
    shape = tuple(int(part) for part in parts)
    batches = RandomBatches(shape, batch_size, num_inputs=max_inputs or RANDOM_INPUTS, seed=seed)
    description = f"{batches.num_inputs:,} standard-normal random inputs of shape {describe_shape(shape)}"
    return DataSource(batches, description, batches.num_inputs, random=True)


def _open_file(
    path: Path, suffix: str, batch_size: int, label_column: str | None, max_inputs: int | None
) -> DataSource:
    shown = clean_text(path)
    if path.is_dir():
        raise DataError(f"--data '{shown}' is a directory. {_FORMS}.")
    try:
        check_file(path)
    except CheckpointError as error:
        raise DataError(f"--data: {error}") from error
    notes = ""
    rows: Rows
    if suffix == ".csv":
        rows, notes = _read_csv(path, label_column)
    elif suffix in (".pt", ".pth"):
        rows = TensorRows(_read_torch(path))
    else:
        rows = NumpyRows(_read_numpy(path, suffix), shown=f"'{shown}'")
    return _serve(rows, f"'{shown}'", batch_size, max_inputs, notes)


def _serve(rows: Rows, shown: str, batch_size: int, max_inputs: int | None, notes: str = "") -> DataSource:
    check_rows(rows, torch.empty(0, dtype=torch.long), shown=shown)  # the shape first
    # ArrayBatches only takes the length of its rows and indexes them; these do both, and convert what comes out.
    batches = ArrayBatches(rows, batch_size)  # type: ignore[arg-type]
    total = len(rows)
    if max_inputs is not None:
        batches = batches.spread(max_inputs)
    check_rows(rows, batches.indices, shown=shown)
    dtype = str(rows.dtype).removeprefix("torch.")
    count = (
        f"{total:,} inputs"
        if batches.num_inputs == total
        else f"{batches.num_inputs:,} of {total:,} inputs, spread evenly"
    )
    shape = describe_shape(rows.shape[1:]) or "one number each"
    return DataSource(batches, f"{shown} ({count}, {shape}, {dtype}{notes})", batches.num_inputs)


def _read_numpy(path: Path, suffix: str) -> np.ndarray[Any, Any]:
    shown = clean_text(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about headers that Python 2 wrote
            if suffix == ".npy":
                array = np.load(path, mmap_mode="r", allow_pickle=False)
                if isinstance(array, np.ndarray):
                    return array
                array.close()
                raise DataError(f"--data '{shown}' is a .npz archive by its content; give it that suffix.")
            with path.open("rb") as file:
                archive = np.load(file, allow_pickle=False)
                if isinstance(archive, np.ndarray):
                    raise DataError(f"--data '{shown}' is a .npy array by its content; give it that suffix.")
                names = list(archive.files)
                if "x" not in names and len(names) != 1:
                    there = name_some(names, 8) or "no arrays"
                    raise DataError(f"--data '{shown}' needs an array 'x' or a single array; it has {there}.")
                only: np.ndarray[Any, Any] = archive["x" if "x" in names else names[0]]
                return only
    except DataError:
        raise
    except Exception as error:  # numpy, zipfile and zlib raise a dozen kinds for a damaged file
        reason = (
            "it holds Python objects"
            if "Python objects" in str(error) or "allow_pickle" in str(error)
            else f"it is damaged or truncated ({clean_text(error)})"
        )
        raise DataError(f"--data '{shown}' cannot be read as a NumPy {suffix} file: {reason}.") from error


def _read_torch(path: Path) -> Tensor:
    shown = clean_text(path)
    try:
        kind = tell_format(path)
        if kind == SAFETENSORS:
            raise DataError(f"--data '{shown}' is a safetensors file; a tensor saved by torch.save is needed.")
        root = read_archive(path, kind).root
        tensor = as_tensor(_pick_tensor(root))
    except CheckpointError as error:
        raise DataError(f"--data: {error}") from error
    if tensor is None:
        raise DataError(
            f"--data '{shown}' holds {describe(root)}; a tensor is needed, a dictionary with one under 'x', 'inputs', "
            "'data' or 'images' (or as its only tensor), or a tuple that begins with one."
        )
    return tensor


def _pick_tensor(root: object) -> object:
    items = as_mapping(root)
    if items is not None:
        named = [items[key] for key in _USUAL_KEYS if isinstance(items.get(key), TensorLike)]
        tensors = [value for value in items.values() if isinstance(value, TensorLike)]
        return named[0] if named else tensors[0] if len(tensors) == 1 else None
    if isinstance(root, tuple | list):
        return root[0] if root else None
    return root


def _read_csv(path: Path, label_column: str | None) -> tuple[Rows, str]:
    import pandas as pd  # here, because only this kind of data needs it

    shown = clean_text(path)
    try:
        table = pd.read_csv(path, low_memory=False)
        header = "" if _has_header(table.columns) else ", no header row"
        if header:
            table = pd.read_csv(path, low_memory=False, header=None)
            table.columns = [str(name) for name in table.columns]
    except Exception as error:  # pandas raises many kinds, of which ValueError is not the base
        reason = "it is empty" if type(error).__name__ == "EmptyDataError" else clean_text(error)
        raise DataError(f"--data '{shown}' cannot be read as a .csv table: {reason}.") from error
    names = [str(name) for name in table.columns]
    if label_column is not None:
        if label_column not in names:
            near = closest_name(label_column, names)
            hint = f"did you mean '{clean_text(near)}'?" if near else f"it has {name_some(names, 8)}."
            raise DataError(f"--data '{shown}' has no column '{clean_text(label_column)}' to leave out: {hint}")
        table = table.drop(columns=label_column)
    if table.shape[1] == 0 or table.shape[0] == 0:
        raise DataError(f"--data '{shown}' is empty: {table.shape[0]} rows of {table.shape[1]} input columns.")
    for name in table.columns:
        column = table[name]
        if not (pd.api.types.is_numeric_dtype(column) or pd.api.types.is_bool_dtype(column)):
            example = next((value for value in column if isinstance(value, str)), column.iloc[0])
            raise DataError(
                f"--data '{shown}': column '{clean_text(name)}' is not numeric (it holds '{clean_text(example, 40)}'). "
                f"If it is the label, give --label-column '{clean_text(name)}'."
            )
        missing = int(column.isna().sum())
        if missing:
            row = int(column.isna().to_numpy().argmax())
            values = "value is" if missing == 1 else "values are"
            raise DataError(
                f"--data '{shown}': {missing:,} {values} missing or NaN in column '{clean_text(name)}', "
                f"the first in row {row}; remove or replace them."
            )
    first = str(table.columns[0])
    index = ", with the column 'Unnamed: 0', which may be a row index" if first == "Unnamed: 0" else ""
    return NumpyRows(table.to_numpy(dtype=np.float32), shown=f"'{shown}'"), header + index


def _has_header(columns: Iterable[object]) -> bool:
    """Whether a table's first line names its columns: all numbers are data, unless they count 0, 1, 2."""
    names = [str(name) for name in columns]
    try:
        numbers = [float(name) for name in names]
    except ValueError:
        return True
    return numbers == list(range(len(names)))


def _open_callable(source: str, batch_size: int, max_inputs: int | None) -> DataSource:
    shown = f"--data '{clean_text(source)}'"
    place, _, attribute = source.rpartition(":")
    if not attribute.replace(".", "").isidentifier() or (is_file_spec(source) and not place.endswith(".py")):
        raise DataError(f"{shown} is of no known kind. {_FORMS}.")
    target = resolve(source, what="--data")
    result: object = target
    if not callable(target) and not isinstance(target, Iterable):
        raise DataError(f"{shown} is a {type(target).__name__}; a callable that returns batches is needed.")
    if callable(target) and not isinstance(target, Tensor | np.ndarray | Dataset | DataLoader):
        with importable(source):
            result = call(target, {}, shown=shown, option="")
    if isinstance(result, tuple) and result and all(isinstance(part, Tensor | np.ndarray) for part in result):
        lengths = {len(part) if part.ndim else -1 for part in result}
        if len(lengths) == 1:
            result = result[0]  # (inputs, labels) of the whole set, not a sequence of batches
    if isinstance(result, Tensor | np.ndarray):
        rows = TensorRows(result) if isinstance(result, Tensor) else NumpyRows(result, shown=shown)
        return _serve(rows, shown, batch_size, max_inputs)
    name = clean_text(source)
    if isinstance(result, Dataset) and not isinstance(result, IterableDataset):
        loader: DataLoader[Any] = DataLoader(result, batch_size=batch_size)
        return DataSource(loader, f"'{name}' (a {type(result).__name__})", _length_of(result))
    if isinstance(result, Mapping | str | bytes) or not isinstance(result, Iterable):
        raise DataError(f"{shown} returned a {type(result).__name__}; an iterable of batches is needed.")
    if _length_of(result) == 0:
        raise DataError(f"{shown} returned no batches: its {type(result).__name__} is empty.")
    sampled = _length_of(getattr(result, "sampler", None)) if isinstance(result, DataLoader) else None
    return DataSource(result, f"'{name}'", sampled)


def _length_of(value: object) -> int | None:
    try:
        return len(value)  # type: ignore[arg-type]  # that it may have none is what is found out
    except Exception:  # noqa: BLE001  # __len__ is the user's own code
        return None
