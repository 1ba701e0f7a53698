"""``relu-doctor report``: the history of a run, or diagnoses that were saved, in any format."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from relu_doctor.commands.formats import OutputFormat, check_format, command_line, write_diagnoses
from relu_doctor.commands.output import check_output, console, fail, while_it_is_read, write_text
from relu_doctor.errors import DiagnosisFormatError
from relu_doctor.text import clean_text

if TYPE_CHECKING:
    from relu_doctor.diagnose.diagnosis import Diagnosis


def report(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="DIR|FILE…", help="The directory of a run's history, Monitor(history=DIR), or saved diagnoses."
        ),
    ],
    output_format: Annotated[OutputFormat, typer.Option("--format", help="What to print.")] = OutputFormat.TABLE,
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="Write there instead of to stdout.")] = None,
) -> None:
    """Show a monitored run, finished or still running, or diagnoses that were saved; html is a page to share."""
    check_output(output, None)
    check_format(output_format)

    from relu_doctor.training.history_schema import FILE

    paths = [path.parent if path.name == FILE and path.is_file() else path for path in paths]
    for path in paths:
        if not path.exists() and not path.with_suffix(".safetensors").exists():
            fail(f"expected the directory of a history, or a saved diagnosis, found nothing at {clean_text(path)}.")
    directories = [path for path in paths if path.is_dir()]
    if not directories:
        named = [each for path in paths for each in _saved(path)]
        with while_it_is_read():
            write_diagnoses(named, output_format, output)
    elif len(paths) > 1:
        fail(
            f"expected the directory of one history, or files, found {len(paths)} paths with "
            f"{clean_text(directories[0])} among them; report them one by one."
        )
    else:
        _history(paths[0], output_format, output)


def _history(directory: Path, output_format: OutputFormat, output: Path | None) -> None:
    from relu_doctor.reports.history import history_json, look, render_history, render_history_text
    from relu_doctor.reports.history_frames import frames_of
    from relu_doctor.training.history import History

    reader = History.read(directory)
    view = look(reader)
    if output_format in {OutputFormat.CSV, OutputFormat.PARQUET, OutputFormat.HTML} and view.diagnosis is None:
        fail(f"no window of the history {clean_text(directory)} has closed yet: there is nothing to write.")
    with while_it_is_read():
        match output_format:
            case OutputFormat.JSON:
                write_text(history_json(view), output)
            case OutputFormat.HTML:
                from relu_doctor.reports.page import build_page

                title = directory.resolve().name
                write_text(build_page(frames_of(reader), title=title, command=command_line()), output)
            case OutputFormat.TABLE if output is None:
                render_history(view, console())
            case OutputFormat.TABLE:
                write_text(render_history_text(view), output)
            case _:
                assert view.diagnosis is not None
                write_diagnoses([(str(directory), view.diagnosis)], output_format, output)


def _saved(path: Path) -> list[tuple[str, Diagnosis]]:
    """The diagnoses of a file, each under the name of the checkpoint that it is of, or of the file."""
    from relu_doctor.diagnose.storage import load_all

    try:
        found = load_all(path)
    except DiagnosisFormatError as error:
        hint = ""
        if path.is_file() and path.suffix in {".pt", ".pth", ".ckpt", ".bin", ".safetensors"}:
            hint = " A checkpoint is scanned: relu-doctor scan FILE --model … --data … --format html."
        fail(f"{error}{hint}")
    return [(str(each.table.coverage.source.get("checkpoint") or path), each) for each in found]
