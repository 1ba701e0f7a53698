"""``relu-doctor scan``: what died in saved checkpoints."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from relu_doctor.commands.formats import OutputFormat, check_format, write_diagnoses
from relu_doctor.commands.output import (
    FAILED,
    INCONCLUSIVE,
    PASSED,
    check_output,
    fail,
    warnings_as_notes,
    while_it_is_read,
)
from relu_doctor.errors import ReLUDoctorError
from relu_doctor.terms import Evidence, Mode
from relu_doctor.text import clean_text

if TYPE_CHECKING:
    from relu_doctor.checkpoints.scanning import ScannedCheckpoint
    from relu_doctor.diagnose.gates import Gate
    from relu_doctor.scanner import ScanRequest


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
        fail(
            "--model is missing: name the code that builds the network, as package.module:factory or "
            "path/to/net.py:factory."
        )
    if data is None:
        fail(
            "--data is missing: give inputs as a .npy, .npz, .pt or .csv file, package.module:function, or "
            "random:3x32x32."
        )
    check_output(output, tensorboard)
    check_format(output_format)
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
        stack.enter_context(warnings_as_notes())
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
    with while_it_is_read():  # gates are decided all the same
        write_diagnoses([(clean_text(each.checkpoint.path), each.diagnosis) for each in scanned], output_format, output)
    if tensorboard is not None:
        _write_tensorboard(scanned, tensorboard)
    raise typer.Exit(_gate(scanned, Gate(per_site=fail_over, total=fail_over_total, min_units=min_units)))


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
            fail(f"--forward {clean_text(forward)!r} is a {type(found).__name__}; a function (model, batch) is needed.")
        run = found
    given: list[Any] = [resolve(spec, what="--rectifier") for spec in rectifiers]
    try:
        custom_rectifiers(given)
    except ReLUDoctorError as error:
        fail(f"--rectifier: {error}")
    try:
        place = usable_device(device)
    except ReLUDoctorError as error:
        fail(f"--device: {error}")
    limit: int | str | None = max_inputs
    if max_inputs is not None and max_inputs != "auto":
        if not max_inputs.isascii() or not max_inputs.isdigit() or int(max_inputs) == 0:
            fail(f"--max-inputs expects a positive whole number or auto, found {clean_text(max_inputs)!r}.")
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


def _write_tensorboard(scanned: list[ScannedCheckpoint], directory: Path) -> None:
    """Each run's checkpoints are its steps; several runs get a folder each, which TensorBoard shows as curves."""
    from relu_doctor.checkpoints.updates import run_name, steps_of
    from relu_doctor.reports.tensorboard import TensorBoardSink

    runs: dict[str, list[ScannedCheckpoint]] = {}
    for each in scanned:
        runs.setdefault(run_name(each.checkpoint), []).append(each)
    for name, members in runs.items():
        with TensorBoardSink(directory if len(runs) == 1 else directory / name) as sink:
            saved = [each.checkpoint for each in members]
            steps = steps_of([(str(each.path), each.step, each.epoch) for each in saved])
            for step, each in sorted(zip(steps, members, strict=True), key=lambda pair: pair[0]):
                sink.write(each.diagnosis, step=step)


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
