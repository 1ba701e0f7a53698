"""``relu-doctor explain``: what a finding means."""

from __future__ import annotations

from typing import Annotated

import typer

from relu_doctor.commands.output import fail
from relu_doctor.text import clean_text


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
        fail(f"there is no finding {clean_text(code)!r}; the codes are {', '.join(sorted(RULES))}.")
    print(f"{code.upper()}\n\n{explanation(code.upper())}")
