"""Planted models against this project and its rivals, cell by cell: what was found, missed and falsely called dead.

    python scripts/bench_correctness.py [--tools NAME…] [--rows WORD…] [--quick] [--json FILE]

Needs the environment that `python scripts/test.py` makes. The rivals that are installed take part:

    pip install torchlens==2.36.1 neural-observatory==0.5.1 torchdiag==0.1.0 dead-relu-viz==0.1.0 \
        torchmortem==0.1.1 torch-audit==0.3.0 -c scripts/constraints.txt

How a tool is scored, wherever in its favour:

* A tool that tells how many units of a layer are dead, and not which, is credited as if they were the right ones.
* What a tool says of a module that serves several sites goes to the site where it is most right.
* A tool that tells only that a layer has dead units is scored by layers.
* A tool that judges one batch gets all inputs as one batch; one that asks where the units lie is told.
* A tool that watches the user's own forward is not charged with what that forward changes by itself.
* "other units" means that it counted something else than the model's units, positions or time steps, say.

Every model has 1,024 inputs, and beside its dead units others that fire on one of them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from bench_checks import CHECKS
from bench_planted import ROWS, Row, dead_units
from bench_scoring import Cell, attempt, score
from rivals import TOOLS, Tool


def cell(row: Row, tool: Tool) -> Cell:
    """What a tool made of a planted model."""
    case = row.case
    model, batches = case.build()
    truth = dead_units(case, model, batches)
    planned = {site.name: frozenset(site.dead) for site in case.sites}
    assert truth == planned, f"{row.title}: planted {planned}, found {truth} by what was stored"
    outcome = attempt(tool, model, batches, row.dim)
    whole = torch.cat(batches)
    order = case.order(whole) if case.order else [site.name for site in case.sites for _ in range(site.calls)]
    found = score(tool, outcome.report, model, case.sites, truth, order)
    return outcome.cell(found.text, right=found.right, found=found.found, planted=found.planted, false=found.false)


def cells(tool: Tool, words: Sequence[str] = ()) -> dict[str, Cell]:
    """Every row of one tool, or those whose title holds one of the words."""
    rows = {row.title: row for row in ROWS}
    titles = [title for title in (*rows, *CHECKS) if not words or any(word in title for word in words)]
    return {title: CHECKS[title](tool) if title in CHECKS else cell(rows[title], tool) for title in titles}


def table(columns: dict[str, dict[str, Cell]]) -> str:
    """The cells in Markdown, a tool per column; a right one is marked."""
    names = [f"{name} {TOOLS[name].version}" for name in columns]
    lines = [f"| | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for title in next(iter(columns.values())):
        shown = [column[title] for column in columns.values()]
        lines.append(f"| {title} | {' | '.join(('✓ ' if each.right else '') + each.text for each in shown)} |")
    right = [sum(each.right for each in column.values()) for column in columns.values()]
    total = len(next(iter(columns.values())))
    lines.append(f"| **right** | {' | '.join(f'**{count} of {total}**' for count in right)} |")
    return "\n".join(lines)


def main() -> None:
    """Parses the arguments, runs the tools that are installed, and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", nargs="*", choices=list(TOOLS), default=list(TOOLS), help="these tools only")
    parser.add_argument("--rows", nargs="*", default=[], help="rows whose title holds one of these words only")
    parser.add_argument("--quick", action="store_true", help="this project only")
    parser.add_argument("--json", type=Path, help="write every cell to this file")
    arguments = parser.parse_args()
    wanted = ["relu-doctor"] if arguments.quick else arguments.tools
    columns = {}
    for name in wanted:
        if TOOLS[name].version is None:
            print(f"{name} is not installed: see the pip line of --help", file=sys.stderr)
            continue
        columns[name] = cells(TOOLS[name], arguments.rows)
    print(table(columns))
    if arguments.json:
        rows = [
            {"row": title, "tool": name, "version": TOOLS[name].version, **asdict(each)}
            for name, column in columns.items()
            for title, each in column.items()
        ]
        arguments.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
