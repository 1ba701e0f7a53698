"""The command: parse, call, print, exit code. Torch is imported only by the commands that need it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from relu_doctor.errors import ReLUDoctorError
from relu_doctor.terms import Evidence, Mode
from relu_doctor.text import clean_text

if TYPE_CHECKING:
    from rich.console import Console

    from relu_doctor.checkpoints.scanning import ScannedCheckpoint
    from relu_doctor.diagnose.gates import Gate
    from relu_doctor.scanner import ScanRequest

PASSED, FAILED, BAD_INPUT, INCONCLUSIVE = 0, 1, 2, 3

app = typer.Typer(
    name="relu-doctor",
    help="Find the ReLU units of a PyTorch network that have died: which, how sure, why, and what to do.",
    epilog="Exit codes: 0 passed, 1 a gate failed, 2 bad usage or input, 3 a gate was asked for and cannot be decided.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class OutputFormat(StrEnum):
    """What ``--format`` takes."""

    TABLE = "table"
    JSON = "json"
    CSV = "csv"


class ReportFormat(StrEnum):
    """What ``report --format`` takes."""

    TABLE = "table"
    JSON = "json"


class TableFormat(StrEnum):
    """What ``export --format`` takes."""

    CSV = "csv"
    JSON = "json"
    PARQUET = "parquet"


class HistoryTable(StrEnum):
    """What ``export --table`` takes."""

    TIMELINE = "timeline"
    WINDOWS = "windows"
    SITES = "sites"
    UNITS = "units"
    FINDINGS = "findings"
    ALERTS = "alerts"
    RUNS = "runs"


_CLICK_ERROR = next(each for each in typer.BadParameter.__mro__ if each.__name__ == "ClickException")


class _StopError(Exception):
    """Ends the command with a sentence on stderr and an exit code."""

    def __init__(self, message: str, code: int = BAD_INPUT) -> None:
        super().__init__(message)
        self.code = code


def main() -> None:
    """Run the command; every error becomes one sentence and an exit code, never a traceback."""
    message, code = "", BAD_INPUT
    try:
        code = app(standalone_mode=False) or PASSED
    except (_StopError, ReLUDoctorError) as error:
        message, code = str(error), getattr(error, "code", BAD_INPUT)
    except (KeyboardInterrupt, typer.Abort):
        message, code = "interrupted; nothing was written.", 130
    except MemoryError:
        message = "out of memory; try a smaller --batch-size, or --max-inputs auto."
    except SystemExit as error:
        message = f"the code of the model or of the data ended the program (SystemExit: {error.code}); it must not."
    except BaseException as error:
        if isinstance(error, _CLICK_ERROR):
            message = error.format_message()  # type: ignore[attr-defined]
        elif os.environ.get("RELU_DOCTOR_DEBUG"):
            raise
        else:
            message = (
                f"unexpected {type(error).__name__}: {clean_text(error)}. This is a fault of relu-doctor: please "
                "report it, with the traceback that RELU_DOCTOR_DEBUG=1 shows."
            )
    if message and sys.stderr is not None:
        print(f"relu-doctor: {clean_text(message, limit=2000)}", file=sys.stderr)
    sys.exit(code)


def _fail(message: str) -> NoReturn:
    raise _StopError(message)


def _show_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"relu-doctor {version('relu-doctor')}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Find the ReLU units of a PyTorch network that have died: which, how sure, why, and what to do."""


@app.command()
def scan(
    checkpoints: Annotated[
        list[str], typer.Argument(metavar="CHECKPOINT…", help="Files of torch.save or .safetensors.")
    ],
    model: Annotated[
        str | None,
        typer.Option(help="What builds the network: package.module:factory or path/to/net.py:factory."),
    ] = None,
    model_arg: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="An argument of the factory, a TOML value or bare text."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE", help="Inputs: .npy, .npz, .pt or .csv, package.module:function, or random:3x32x32."
        ),
    ] = None,
    label_column: Annotated[str | None, typer.Option(help="Column of a .csv that is no input.")] = None,
    forward: Annotated[
        str | None, typer.Option(metavar="SPEC", help="package.module:function(model, batch) that runs the model.")
    ] = None,
    rectifier: Annotated[
        list[str] | None,
        typer.Option(metavar="SPEC", help="An activation class of your own, or a Rectifier: path/to/net.py:MyReLU."),
    ] = None,
    mode: Annotated[Mode, typer.Option(help="Run the model in eval mode, train mode, or both.")] = Mode.EVAL,
    sites: Annotated[list[str] | None, typer.Option(metavar="GLOB", help="Only sites of these names.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(metavar="GLOB", help="Not sites of these names.")] = None,
    device: Annotated[str | None, typer.Option(help="Where to run, for example cpu or cuda:0.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Inputs per batch, for files and random inputs.")] = 256,
    max_inputs: Annotated[
        str | None,
        typer.Option(metavar="N|auto", help="Read at most N inputs, spread evenly; auto: as many as the bound needs."),
    ] = None,
    evidence: Annotated[
        Evidence, typer.Option(help="What counts: inputs, or tokens, every position that is no padding.")
    ] = Evidence.INPUT,
    config: Annotated[str | None, typer.Option(metavar="NAME|FILE", help="A profile's name or a TOML file.")] = None,
    max_firing_rate: Annotated[
        float | None,
        typer.Option(
            metavar="P", help="A silent unit is dead once it is sure to fire on at most this share of inputs."
        ),
    ] = None,
    exhaustive: Annotated[bool, typer.Option("--exhaustive", help="These data are all there will ever be.")] = False,
    output_format: Annotated[OutputFormat, typer.Option("--format", help="What to print.")] = OutputFormat.TABLE,
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="Write there instead of to stdout.")] = None,
    tensorboard: Annotated[Path | None, typer.Option(metavar="DIR", help="Write the verdict for TensorBoard.")] = None,
    fail_over: Annotated[
        float | None,
        typer.Option(metavar="FRACTION", min=0, max=1, help="Fail if any site has a larger dead fraction."),
    ] = None,
    fail_over_total: Annotated[
        float | None,
        typer.Option(metavar="FRACTION", min=0, max=1, help="Fail if the whole model has a larger dead fraction."),
    ] = None,
    min_units: Annotated[int, typer.Option(min=1, help="Sites smaller than this are left to the total.")] = 16,
    trust: Annotated[
        bool, typer.Option("--trust", help="Run the code that a pickle asks for. Only for your own files.")
    ] = False,
) -> None:
    """Name the dead units of saved checkpoints, with how sure that is, what holds them dead, and what to do."""
    if model is None:
        _fail(
            "--model is missing: name the code that builds the network, as package.module:factory or "
            "path/to/net.py:factory."
        )
    if data is None:
        _fail(
            "--data is missing: give inputs as a .npy, .npz, .pt or .csv file, package.module:function, or "
            "random:3x32x32."
        )
    _check_output(output, tensorboard)
    model_spec, data_spec = model, data

    from relu_doctor.checkpoints.data import open_data
    from relu_doctor.checkpoints.models import build_model
    from relu_doctor.checkpoints.scanning import compare_within_runs, scan_checkpoint
    from relu_doctor.checkpoints.specs import importable
    from relu_doctor.diagnose.gates import Gate
    from relu_doctor.reports.progress import progress_bar

    request = _request(
        forward=forward,
        rectifiers=rectifier or (),
        mode=mode,
        sites=[*(sites or ()), *(f"!{pattern}" for pattern in exclude or ())],
        device=device,
        max_inputs=max_inputs,
        evidence=evidence,
        config=config,
        max_firing_rate=max_firing_rate,
        exhaustive=exhaustive,
    )
    scanned: list[ScannedCheckpoint] = []
    with ExitStack() as stack:
        stack.enter_context(_warnings_as_notes())
        stack.enter_context(redirect_stdout(sys.stderr))  # what the user's code prints is no part of the result
        for spec in (model, data, forward, *(rectifier or ())):  # what these import while they run lies beside them
            if spec is not None:
                stack.enter_context(importable(spec))
        for path in checkpoints:
            with progress_bar(f"scanning {clean_text(Path(path).name)}") as progress:
                one = scan_checkpoint(
                    path,
                    lambda: build_model(model_spec, model_arg or ()),
                    lambda: open_data(data_spec, batch_size=batch_size, label_column=label_column),
                    replace(request, progress=progress),
                    trust=trust,
                )
                scanned.append(one)
    scanned = compare_within_runs(scanned)
    with _while_it_is_read():  # gates are decided all the same
        _write(scanned, output_format, output)
    if tensorboard is not None:
        _write_tensorboard(scanned, tensorboard)
    raise typer.Exit(_gate(scanned, Gate(per_site=fail_over, total=fail_over_total, min_units=min_units)))


@app.command()
def explain(
    code: Annotated[str | None, typer.Argument(help="A finding's code, as RD205; all of them when left out.")] = None,
) -> None:
    """Say what a finding means: how it is decided, what it is confused with, what helps."""
    import relu_doctor.diagnose.rules  # noqa: F401 registers the rules
    from relu_doctor.diagnose.findings import RULES, explanation

    if code is None:
        for known in sorted(RULES):
            print(f"{known}  {explanation(known).splitlines()[0]}")
        return
    if code.upper() not in RULES:
        _fail(f"there is no finding {clean_text(code)!r}; the codes are {', '.join(sorted(RULES))}.")
    print(f"{code.upper()}\n\n{explanation(code.upper())}")


@app.command()
def demo(
    directory: Annotated[Path, typer.Argument(help="Where the checkpoints are left.")] = Path("relu-doctor-demo"),
    seed: Annotated[int, typer.Option(help="Of the initial weights and the order of the data.")] = 0,
) -> None:
    """Train on real handwritten digits four times, watch, scan what was saved, and show verdicts beside accuracies."""
    from rich.console import Console

    from relu_doctor.demo.running import run_stories, scan_line, watch_line
    from relu_doctor.reports.progress import progress_bar
    from relu_doctor.reports.side_by_side import render_comparison
    from relu_doctor.reports.verdict import verdict

    with progress_bar("training on 1,437 digits and scanning") as progress:
        results = list(run_stories(directory, seed=seed, on_progress=progress))
    console = Console(highlight=False)
    console.print("Four stories of the same digits; nothing but the optimizer's settings differs.\n")
    rows = []
    for result in results:
        story = result.run.story
        name = f"{story.name.replace('_', ' ')} ({story.net})"
        extra = {"accuracy": f"{100 * result.run.accuracy:.1f} %"}
        rows.append((name, result.after.diagnosis, extra))
        console.print(f"[bold]{name}[/bold]  {story.settings}, {story.epochs} epochs", soft_wrap=False)
        console.print(f"  accuracy {extra['accuracy']}; {verdict(result.after.diagnosis).sentence}\n", markup=False)
    render_comparison(rows, console)
    console.print("\nA monitor watched each run while it was trained. Its first words:\n")
    for (name, _, _), result in zip(rows, results, strict=True):
        console.print(f"[bold]{name}[/bold]")
        console.print(f"  {watch_line(result)}", markup=False)
    console.print(f"\nThe checkpoints are in {directory}. Look closer at any of them:\n", markup=False)
    for result in results:
        print(f"{scan_line(result)}\n")


_HISTORY = typer.Argument(metavar="DIR", help="The directory of a run's history, Monitor(history=DIR).")


@app.command()
def report(
    directory: Annotated[Path, _HISTORY],
    output_format: Annotated[ReportFormat, typer.Option("--format", help="What to print.")] = ReportFormat.TABLE,
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="Write there instead of to stdout.")] = None,
) -> None:
    """Show the history of a monitored run, finished or still running: each site over time, alerts, the last verdict."""
    _check_output(output, None)

    from relu_doctor.reports.history import history_json, look, render_history, render_history_text
    from relu_doctor.training.history import History

    view = look(History.read(directory))
    with _while_it_is_read():
        if output_format is ReportFormat.JSON:
            _write_text(history_json(view), output)
        elif output is not None:
            _write_text(render_history_text(view), output)
        else:
            render_history(view, _console())


@app.command()
def watch(
    directory: Annotated[Path, _HISTORY],
    once: Annotated[bool, typer.Option("--once", help="Show it as it stands, and leave.")] = False,
    every: Annotated[float, typer.Option(metavar="SECONDS", min=0.1, help="Between two looks.")] = 2.0,
) -> None:
    """Follow a monitored run live until it ends; Ctrl-C leaves it alone."""
    try:
        from relu_doctor.reports.watching import watch_history
        from relu_doctor.training.history import History

        with _while_it_is_read():
            watch_history(History.read(directory), _console(), every=every, once=once)
    except KeyboardInterrupt:  # while it was still being loaded
        return


@app.command()
def export(
    directory: Annotated[Path, _HISTORY],
    output_format: Annotated[TableFormat, typer.Option("--format", help="What to write.")],
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="Write there instead of to stdout.")] = None,
    table: Annotated[
        HistoryTable, typer.Option(help="timeline: a row per window and site; units: a row per window and unit.")
    ] = HistoryTable.TIMELINE,
    window: Annotated[int | None, typer.Option(metavar="ID", help="Only the window of this window_id.")] = None,
    superseded: Annotated[
        bool, typer.Option("--superseded", help="Also windows of branches that a rewound run has abandoned.")
    ] = False,
) -> None:
    """Write a table of a history for other programs: CSV, JSON or Parquet."""
    _check_output(output, None)

    from relu_doctor.diagnose.storage import open_atomically
    from relu_doctor.reports.exports import check_format, frames, write
    from relu_doctor.training.history import History

    check_format(output_format)
    pieces = frames(History.read(directory, superseded=superseded), table, window)
    if output is None:
        with _while_it_is_read():
            write(pieces, table, output_format, sys.stdout.buffer)
    else:
        with open_atomically(output) as file:
            write(pieces, table, output_format, file)


def _request(
    *,
    forward: str | None,
    rectifiers: Sequence[str],
    mode: Mode,
    sites: list[str],
    device: str | None,
    max_inputs: str | None,
    evidence: Evidence,
    config: str | None,
    max_firing_rate: float | None,
    exhaustive: bool,
) -> ScanRequest:
    from relu_doctor.checkpoints.specs import resolve
    from relu_doctor.config import load_config
    from relu_doctor.observe.rectifiers.custom import custom_rectifiers
    from relu_doctor.scanner import ScanRequest
    from relu_doctor.scanning import usable_device

    thresholds = load_config(config)
    if max_firing_rate is not None:
        thresholds = replace(thresholds, max_firing_rate=max_firing_rate)
    run = None
    if forward is not None:
        found = resolve(forward, what="--forward")
        if not callable(found):
            _fail(
                f"--forward {clean_text(forward)!r} is a {type(found).__name__}; a function (model, batch) is needed."
            )
        run = found
    given: list[Any] = [resolve(spec, what="--rectifier") for spec in rectifiers]
    try:
        custom_rectifiers(given)
    except ReLUDoctorError as error:
        _fail(f"--rectifier: {error}")
    try:
        place = usable_device(device)
    except ReLUDoctorError as error:
        _fail(f"--device: {error}")
    limit: int | str | None = max_inputs
    if max_inputs is not None and max_inputs != "auto":
        if not max_inputs.isascii() or not max_inputs.isdigit() or int(max_inputs) == 0:
            _fail(f"--max-inputs expects a positive whole number or auto, found {clean_text(max_inputs)!r}.")
        limit = int(max_inputs)
    return ScanRequest(
        forward=run,
        mode=mode,
        sites=tuple(sites),
        max_inputs=limit,
        evidence=evidence,
        device=place,
        rectifiers=given,
        exhaustive=exhaustive,
        config=thresholds,
    )


def _raise_broken_pipe() -> None:
    raise BrokenPipeError


def _console() -> Console:
    from rich.console import Console

    console = Console(highlight=False)
    console.on_broken_pipe = _raise_broken_pipe  # type: ignore[method-assign]  # Rich's own would exit
    return console


@contextmanager
def _while_it_is_read() -> Iterator[None]:
    """What is printed inside ends in silence where its reader has seen enough."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the exit would try again


def _check_output(output: Path | None, tensorboard: Path | None) -> None:
    """Refuse before the scan what could not be written after it."""
    if output is not None and (output.is_dir() or not _writable(output if output.exists() else output.parent)):
        _fail(
            f"--output {clean_text(output)} cannot be written: give a file in a folder that exists and "
            "can be written to."
        )
    if tensorboard is not None:
        nearest = next(folder for folder in (tensorboard, *tensorboard.absolute().parents) if folder.exists())
        if not nearest.is_dir() or not _writable(nearest):
            _fail(f"--tensorboard {clean_text(tensorboard)} cannot be written: give a folder that can be written to.")


def _writable(path: Path) -> bool:
    return path.exists() and os.access(path, os.W_OK)


class _warnings_as_notes:  # noqa: N801 a context manager that reads as a verb
    """Show relu_doctor's warnings as one line each on stderr."""

    def __enter__(self) -> None:
        import warnings

        from relu_doctor.errors import ReLUDoctorWarning

        self._caught = warnings.catch_warnings()
        self._caught.__enter__()
        shown = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *rest: object) -> None:
            if issubclass(category, ReLUDoctorWarning):
                print(f"relu-doctor: note: {clean_text(message, limit=500)}", file=sys.stderr)
            else:
                shown(message, category, *rest)  # type: ignore[arg-type]

        warnings.simplefilter("always", ReLUDoctorWarning)
        warnings.showwarning = show  # type: ignore[assignment]

    def __exit__(self, *error: object) -> None:
        self._caught.__exit__(*error)  # type: ignore[arg-type]


def _write(scanned: list[ScannedCheckpoint], output_format: OutputFormat, output: Path | None) -> None:
    from relu_doctor.diagnose.storage import SCHEMA_VERSION, dump_json

    if output_format is OutputFormat.JSON:
        text = dump_json(
            {"schema_version": SCHEMA_VERSION, "diagnoses": [each.diagnosis.to_dict() for each in scanned]}
        )
    elif output_format is OutputFormat.CSV:
        from relu_doctor.reports.tables import units_csv

        text = units_csv({clean_text(each.checkpoint.path): each.diagnosis for each in scanned})
    else:
        from relu_doctor.reports.scans import render_scans

        if output is None:
            render_scans([(each.checkpoint.path.name, each.diagnosis) for each in scanned], _console())
            return
        from relu_doctor.reports.scans import render_scans_text

        text = render_scans_text([(each.checkpoint.path.name, each.diagnosis) for each in scanned])
    _write_text(text, output)


def _write_text(text: str, output: Path | None) -> None:
    from relu_doctor.diagnose.storage import write_atomically

    if output is None:
        sys.stdout.write(text)
    else:
        write_atomically(output, text.encode())


def _write_tensorboard(scanned: list[ScannedCheckpoint], directory: Path) -> None:
    """Each run's checkpoints are its steps; several runs get a folder each, which TensorBoard shows as curves."""
    from relu_doctor.checkpoints.updates import run_name
    from relu_doctor.reports.tensorboard import TensorBoardSink

    runs: dict[str, list[ScannedCheckpoint]] = {}
    for each in scanned:
        runs.setdefault(run_name(each.checkpoint), []).append(each)
    for name, members in runs.items():
        with TensorBoardSink(directory if len(runs) == 1 else directory / name) as sink:
            for place, each in enumerate(members):
                step = each.checkpoint.step if each.checkpoint.step is not None else each.checkpoint.epoch
                sink.write(each.diagnosis, step=place if step is None else step)


def _gate(scanned: list[ScannedCheckpoint], gate: Gate) -> int:
    from relu_doctor.diagnose.gates import Outcome, decide

    if not gate.asked:
        return PASSED
    codes = {Outcome.PASSED: PASSED, Outcome.FAILED: FAILED, Outcome.INCONCLUSIVE: INCONCLUSIVE}
    results = [(each, decide(each.diagnosis, gate)) for each in scanned]
    for each, result in results:
        print(
            f"gate {result.outcome}: {clean_text(each.checkpoint.path.name)}: {clean_text(result.reason, limit=500)}",
            file=sys.stderr,
        )
    outcomes = {result.outcome for _, result in results}
    worst = next(value for value in (Outcome.FAILED, Outcome.INCONCLUSIVE, Outcome.PASSED) if value in outcomes)
    return codes[worst]
