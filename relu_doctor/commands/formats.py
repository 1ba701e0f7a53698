"""What commands print of diagnoses, in each format."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from relu_doctor.commands.output import console, write_bytes, write_text

if TYPE_CHECKING:
    from relu_doctor.diagnose.diagnosis import Diagnosis


class OutputFormat(StrEnum):
    """What ``--format`` takes."""

    TABLE = "table"
    JSON = "json"
    CSV = "csv"
    PARQUET = "parquet"
    HTML = "html"


def check_format(output_format: OutputFormat) -> None:
    """Refuse at once what could not be written.

    Raises:
        OutputError: a package that it needs is not installed.
    """
    if output_format is OutputFormat.PARQUET:
        from relu_doctor.reports.tables import need_parquet

        need_parquet()


def write_diagnoses(named: Sequence[tuple[str, Diagnosis]], output_format: OutputFormat, output: Path | None) -> None:
    """Write some diagnoses to a file, or to stdout.

    Args:
        named: name and diagnosis, in the order to tell of them.
        output_format: how.
        output: where.
    """
    from relu_doctor.diagnose.storage import SCHEMA_VERSION, dump_json
    from relu_doctor.reports.scans import render_scans, render_scans_text
    from relu_doctor.reports.tables import units_csv, units_parquet

    match output_format:
        case OutputFormat.JSON:
            blocks = [diagnosis.to_dict() for _, diagnosis in named]
            write_text(dump_json({"schema_version": SCHEMA_VERSION, "diagnoses": blocks}), output)
        case OutputFormat.CSV:
            write_text(units_csv(dict(named)), output)
        case OutputFormat.PARQUET:
            write_bytes(units_parquet(dict(named)), output)
        case OutputFormat.HTML:
            write_text(_page(named), output)
        case OutputFormat.TABLE if output is None:
            render_scans([(Path(name).name, diagnosis) for name, diagnosis in named], console())
        case OutputFormat.TABLE:
            write_text(render_scans_text([(Path(name).name, diagnosis) for name, diagnosis in named]), output)


def _page(named: Sequence[tuple[str, Diagnosis]]) -> str:
    from relu_doctor.checkpoints.updates import steps_of
    from relu_doctor.reports.frames import Frame
    from relu_doctor.reports.page import build_page

    sources = [diagnosis.table.coverage.source for _, diagnosis in named]
    saved = [(name, source.get("step"), source.get("epoch")) for (name, _), source in zip(named, sources, strict=True)]
    pairs = sorted(zip(steps_of(saved), (diagnosis for _, diagnosis in named), strict=True), key=lambda pair: pair[0])
    frames = [Frame.of_diagnosis(diagnosis, step) for step, diagnosis in pairs]
    title = ", ".join(Path(name).name for name, _ in named[:3]) + (", …" if len(named) > 3 else "")
    return build_page(frames, title=title, command=command_line())


def command_line() -> str:
    """The command that is running, as a shell would read it."""
    return shlex.join(["relu-doctor", *sys.argv[1:]])
