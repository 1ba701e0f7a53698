"""The command line: its commands, and how each of them ends."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from relu_doctor.commands.demo import demo
from relu_doctor.commands.explain import explain
from relu_doctor.commands.history import export, watch
from relu_doctor.commands.output import BAD_INPUT, PASSED, StopError
from relu_doctor.commands.report import report
from relu_doctor.commands.scan import scan
from relu_doctor.errors import ReLUDoctorError
from relu_doctor.text import clean_text

app = typer.Typer(
    name="relu-doctor",
    help="Find the ReLU units of a PyTorch network that have died: which, how sure, why, and what to do.",
    epilog="Exit codes: 0 passed, 1 a gate failed, 2 bad usage or input, 3 a gate was asked for and cannot be decided.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


for _command in (scan, explain, demo, report, watch, export):
    app.command()(_command)

_CLICK_ERROR = next(each for each in typer.BadParameter.__mro__ if each.__name__ == "ClickException")


def main() -> None:
    """Run the command; every error becomes one sentence and an exit code, never a traceback."""
    message, code = "", BAD_INPUT
    try:
        code = app(standalone_mode=False) or PASSED
    except (StopError, ReLUDoctorError) as error:
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
