"""A history's tables for other programs: CSV, JSON and Parquet, written window by window."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any, BinaryIO

import pandas as pd

from relu_doctor.diagnose.storage import plain, records
from relu_doctor.errors import HistoryError
from relu_doctor.reports.tables import inert
from relu_doctor.training.history_reading import HistoryReader
from relu_doctor.training.history_schema import SCHEMA_VERSION

CSV, JSON, PARQUET = "csv", "json", "parquet"


def frames(reader: HistoryReader, table: str, window: int | None = None) -> Iterator[pd.DataFrame]:
    """A table of a history, in one or more pieces of the same columns.

    Args:
        reader: of the history.
        table: ``windows``, ``sites``, ``timeline``, ``units``, ``findings``, ``alerts`` or ``runs``.
        window: ``window_id`` to keep to; all by default.

    Raises:
        HistoryError: the history is damaged, the window is none of it, or the table is not told by windows.
    """
    if table == "units" and window is None:
        pieces = reader.unit_frames()
        yield next(pieces, reader.units())
        yield from pieces
    elif table == "units":
        yield reader.units(window)
    else:
        frame: pd.DataFrame = getattr(reader, table)
        if window is not None and "window_id" not in frame:
            raise HistoryError(f"the table {table} is not told by windows; leave --window out.")
        if window is not None:
            frame = frame[frame["window_id"] == window]
        yield frame


def write(pieces: Iterable[pd.DataFrame], table: str, form: str, file: BinaryIO) -> None:
    """Write a table.

    CSV: missing values empty, texts that a spreadsheet would take for formulas made inert. JSON:
    ``{"schema_version", "table", "rows"}``, missing values ``null``. Parquet: a row group per piece.

    Args:
        pieces: of :func:`frames`, at least one.
        table: its name.
        form: ``csv``, ``json`` or ``parquet``.
        file: to write to.
    """
    _WRITERS[form](pieces, table, file)


def _csv(pieces: Iterable[pd.DataFrame], table: str, file: BinaryIO) -> None:
    for place, frame in enumerate(pieces):
        safe = {
            str(name): inert(frame[name].map(_text))
            for name in frame.columns
            if not pd.api.types.is_numeric_dtype(frame[name])
        }
        content = frame.assign(**safe).to_csv(index=False, header=place == 0, lineterminator="\n")
        file.write(content.encode())


def _text(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list) else value


def _json(pieces: Iterable[pd.DataFrame], table: str, file: BinaryIO) -> None:
    file.write(f'{{"schema_version":{SCHEMA_VERSION},"table":{json.dumps(table)},"rows":['.encode())
    rows = chain.from_iterable(records(frame) for frame in pieces)
    for place, row in enumerate(rows):
        file.write(b",\n" if place else b"\n")
        file.write(json.dumps(plain(row), allow_nan=False, separators=(",", ":")).encode())
    file.write(b"\n]}\n")


def _parquet(pieces: Iterable[pd.DataFrame], table: str, file: BinaryIO) -> None:
    import pyarrow as pa
    from pyarrow.parquet import ParquetWriter

    writer: ParquetWriter | None = None
    try:
        for frame in pieces:
            schema = writer.schema if writer is not None else None
            content = pa.Table.from_pandas(frame, schema=schema, preserve_index=False)
            if writer is None:
                writer = ParquetWriter(file, content.schema)
            writer.write_table(content)
    finally:
        if writer is not None:
            writer.close()


_WRITERS = {CSV: _csv, JSON: _json, PARQUET: _parquet}
