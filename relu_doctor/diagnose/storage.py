"""Diagnoses on disk: JSON, or one columnar safetensors file where there are many units. Both are versioned."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import pandas as pd

from relu_doctor.config import load_config
from relu_doctor.diagnose.findings import Finding
from relu_doctor.diagnose.judgement import COLUMNS, Judgement
from relu_doctor.diagnose.origins import LearningRateEvidence
from relu_doctor.diagnose.table import EVIDENCE, INTEGERS, TRAIN_COLUMNS, Coverage, SiteRecord, UnitTable
from relu_doctor.errors import DiagnosisFormatError, OutputError, ReLUDoctorError

if TYPE_CHECKING:
    from relu_doctor.diagnose.diagnosis import Diagnosis

SCHEMA_VERSION = 1
JSON_LIMIT = 100_000  # units; above, a columnar file is written
_INTEGER_COLUMNS = {"unit", *INTEGERS, "train_inputs", "train_inputs_fired"}


def to_dict(diagnosis: Diagnosis) -> dict[str, Any]:
    """Plain JSON values: evidence and verdicts by column, NaN as ``None``."""
    units = {str(name): plain(diagnosis.units[name].tolist()) for name in diagnosis.units.columns}
    return {**_head(diagnosis), "units": units}


def _head(diagnosis: Diagnosis) -> dict[str, Any]:
    """Everything but the units."""
    table = diagnosis.table
    return {
        "schema_version": SCHEMA_VERSION,
        "metadata": dict(diagnosis.metadata),
        "summary": plain(diagnosis.summary),
        "coverage": plain(_fields(table.coverage)),
        "config": diagnosis.config.to_dict(),
        "needed": diagnosis.needed,
        "sites": [
            {**plain(counts), **plain(_fields(record)), "blamed": diagnosis.blamed.get(record.site_id)}
            for record, counts in zip(table.sites, records(diagnosis.sites), strict=True)
        ],
        "findings": [plain(_fields(finding)) for finding in diagnosis.findings],
        "history": None if diagnosis.history is None else plain(_fields(diagnosis.history)),
    }


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as dictionaries of plain values; ``to_dict("records")`` takes ten times as long where columns differ."""
    columns = [frame[name].tolist() for name in frame.columns]
    names = [str(name) for name in frame.columns]
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def _fields(record: Any) -> dict[str, Any]:
    """A dataclass as a dictionary that shares its values; ``asdict`` copies them, ten times as slow."""
    return {item.name: getattr(record, item.name) for item in fields(record)}


def from_dict(data: Mapping[str, Any]) -> Diagnosis:
    """The diagnosis that :func:`to_dict` described: evidence, verdicts and findings as they were saved.

    Raises:
        DiagnosisFormatError: not a diagnosis, or of a newer schema.
    """
    _check_version(data)
    with _whole():
        units = pd.DataFrame({name: _column(name, values) for name, values in data["units"].items()})
        return _assemble(data, units)


@contextmanager
def _whole() -> Iterator[None]:
    """What goes wrong with the content of a file is damage.

    Raises:
        DiagnosisFormatError: whatever was raised.
    """
    try:
        yield
    except DiagnosisFormatError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise DiagnosisFormatError(
            f"expected a saved diagnosis of schema {SCHEMA_VERSION}, found a damaged one "
            f"({type(error).__name__}: {error}); scan again."
        ) from error


def save(diagnosis: Diagnosis, path: Path) -> Path:
    """Write a diagnosis; see :meth:`~relu_doctor.Diagnosis.save`."""
    columnar = path.suffix == ".safetensors" or len(diagnosis.units) > JSON_LIMIT
    target = path.with_suffix(".safetensors") if columnar else path
    content = to_columns(diagnosis) if columnar else dump_json(to_dict(diagnosis)).encode()
    write_atomically(target, content)
    if target != path and path.is_file():
        path.unlink()  # what it held was to be overwritten, and would be loaded in place of this
    return target


def load(path: Path) -> Diagnosis:
    """Read a diagnosis; see :meth:`~relu_doctor.Diagnosis.load`."""
    found = load_all(path)
    if len(found) != 1:
        raise DiagnosisFormatError(f"expected one saved diagnosis, found {len(found)} in {path}; name them one by one.")
    return found[0]


def load_all(path: Path) -> list[Diagnosis]:
    """Read the diagnoses of a file: the one that was saved, or all that a scan of several checkpoints wrote.

    Raises:
        DiagnosisFormatError: the file is missing, damaged, holds none, or is of a newer schema.
    """
    if not path.is_file() and path.with_suffix(".safetensors").is_file():
        path = path.with_suffix(".safetensors")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DiagnosisFormatError(f"expected a saved diagnosis at {path}: {error.strerror}.") from error
    if content[8:9] == b"{" and b"\0" in content[:8]:  # the length of a header, which JSON never begins with
        return [from_columns(content, path)]
    try:
        data = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DiagnosisFormatError(f"expected a saved diagnosis, found no JSON in {path} ({error}).") from error
    if not isinstance(data, dict):
        raise DiagnosisFormatError(f"expected a saved diagnosis, found a JSON {type(data).__name__} in {path}.")
    several = data.get("diagnoses")
    return [from_dict(each) for each in several] if isinstance(several, list) else [from_dict(data)]


def dump_json(data: Any) -> str:
    """Strict JSON in one line per top-level block, byte for byte the same for the same data."""
    return json.dumps(data, allow_nan=False, separators=(",", ":")) + "\n"


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    with open_atomically(path) as file:
        file.write(content)


@contextmanager
def open_atomically(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which takes its name once the block is left without an error.

    Raises:
        OutputError: it cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            yield file
        partial.replace(path)
    except BaseException as error:
        partial.unlink(missing_ok=True) if partial.parent.is_dir() else None
        if not isinstance(error, OSError) or isinstance(error, ReLUDoctorError):
            raise
        raise OutputError(
            f"cannot write {path}: {error.strerror or error}. Give a path in a folder that can be written to."
        ) from error


def _check_version(data: Any) -> None:
    version = data.get("schema_version") if isinstance(data, Mapping) else None
    if not isinstance(version, int):
        raise DiagnosisFormatError(
            "expected a saved diagnosis with a schema_version, found none; is this file one of ours?"
        )
    if version > SCHEMA_VERSION:
        raise DiagnosisFormatError(
            f"expected schema version {SCHEMA_VERSION} or older, found {version}: update relu-doctor to read this file."
        )


def _assemble(data: Mapping[str, Any], units: pd.DataFrame) -> Diagnosis:
    from relu_doctor.diagnose.diagnosis import Diagnosis

    names = {item.name for item in fields(SiteRecord)}
    records = tuple(
        SiteRecord(
            **{
                **{key: value for key, value in site.items() if key in names},
                "feeds": tuple(site["feeds"]),
                "readers": tuple(site.get("readers", ())),  # older files have none
            }
        )
        for site in data["sites"]
    )
    rows = [record.site_id for record in records for _ in range(record.num_units)]
    if units["site_id"].tolist() != rows:
        raise ValueError(f"{len(units):,} units do not fit its sites, which have {len(rows):,}")
    missing = [name for name in COLUMNS if name not in units]
    if missing:
        raise KeyError(", ".join(missing))
    coverage = dict(data["coverage"])
    for key in ("unused", "notes"):
        coverage[key] = tuple(coverage[key])
    evidence = units[
        [name for name in ("site", "site_id", "rectifier", *EVIDENCE, *TRAIN_COLUMNS) if name in units]
    ].copy()
    for name in ("first_fired", "last_fired"):
        evidence[name] = evidence[name].fillna(-1).astype("int64")
    findings = tuple(Finding(**{**item, "unit_indices": tuple(item["unit_indices"])}) for item in data["findings"])
    return Diagnosis(
        table=UnitTable(records, evidence, Coverage(**coverage)),
        judgement=Judgement(
            units=units,
            blamed={site["site_id"]: site.get("blamed") for site in data["sites"]},
            num_units=sum(record.num_units for record in records if record.can_die),
            needed=int(data["needed"]),
        ),
        config=load_config(data["config"]),
        stored=findings,
        history=_history(data.get("history")),
        metadata=data["metadata"],
    )


def _history(data: Mapping[str, Any] | None) -> LearningRateEvidence | None:
    if data is None:
        return None
    arrays = {
        name: {
            key: np.array([math.nan if v is None else v for v in values], dtype=float)
            for key, values in data[name].items()
        }
        for name in ("last_update", "full_step", "between", "per_update")
    }
    newly = {key: np.array(values, dtype=bool) for key, values in data["newly_silent"].items()}
    return LearningRateEvidence(
        learning_rates=tuple(data["learning_rates"]),
        optimizer=data["optimizer"],
        earlier=data["earlier"],
        from_start=bool(data["from_start"]),
        at_start=bool(data["at_start"]),
        newly_silent=newly,
        **arrays,
    )


def _column(name: str, values: Any) -> Any:
    if name in {"first_fired", "last_fired"}:
        return pd.array([pd.NA if value is None else value for value in values], dtype="Int64")
    if name in _INTEGER_COLUMNS:
        return np.array(values, dtype=np.int64)
    if name in {"site", "site_id", "rectifier", "status", "mechanism"}:
        return list(values)
    return np.array([math.nan if value is None else value for value in values], dtype=float)


def plain(value: Any) -> Any:
    """JSON values only: arrays to lists, NaN and infinities to ``None``, anything unknown to text."""
    if value is None or value is pd.NA or isinstance(value, bool | str | int):
        return None if value is pd.NA else value if not isinstance(value, str) else str(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    return str(value)


def to_columns(diagnosis: Diagnosis) -> bytes:
    """The content of a columnar file: safetensors, exact."""
    from safetensors.numpy import save as save_arrays

    arrays: dict[str, np.ndarray[Any, Any]] = {}
    codes: dict[str, list[str]] = {}
    for name in diagnosis.units.columns:
        column = diagnosis.units[name]
        if name in {"site", "site_id", "rectifier", "status", "mechanism"}:
            values, uniques = pd.factorize(column)
            codes[name], arrays[name] = [str(item) for item in uniques], values.astype(np.int32)
        elif name in {"first_fired", "last_fired"}:
            arrays[name] = column.fillna(-1).to_numpy(np.int64)
        else:
            arrays[name] = np.ascontiguousarray(column.to_numpy(np.int64 if name in _INTEGER_COLUMNS else np.float64))
    order = [str(name) for name in diagnosis.units.columns]
    head = dump_json({**_head(diagnosis), "codes": codes, "order": order})
    return save_arrays(arrays, metadata={"relu_doctor": head})


def from_columns(content: bytes, path: Path) -> Diagnosis:
    """The diagnosis that :func:`to_columns` wrote.

    Args:
        content: of the file.
        path: of the file, for messages.

    Raises:
        DiagnosisFormatError: damaged, not a diagnosis, or of a newer schema.
    """
    from safetensors.numpy import load as load_arrays

    try:
        arrays = load_arrays(content)
        length = int.from_bytes(content[:8], "little")
        head = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["relu_doctor"])
    except Exception as error:  # safetensors raises its own type for each kind of damage
        raise DiagnosisFormatError(f"expected a saved diagnosis, found a damaged file at {path} ({error}).") from error
    _check_version(head)
    with _whole():
        units = pd.DataFrame(index=range(len(next(iter(arrays.values()), []))))
        for name in head["order"]:
            values = arrays[name]
            if name in head["codes"]:
                units[name] = np.array(head["codes"][name], dtype=object)[values]
            elif name in {"first_fired", "last_fired"}:
                units[name] = pd.array([pd.NA if value < 0 else value for value in values.tolist()], dtype="Int64")
            else:
                units[name] = values
        return _assemble(head, units)
