"""``relu-doctor demo``: the main job, on real input."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_GOOD = 0.9  # an accuracy that gives nobody a reason to look


def demo(
    directory: Annotated[Path, typer.Argument(help="Where the checkpoints are left.")] = Path("relu-doctor-demo"),
    seed: Annotated[int, typer.Option(help="Of the initial weights and the order of the data.")] = 0,
) -> None:
    """Train on real handwritten digits four times, watch, scan what was saved, and show verdicts beside accuracies."""
    from rich.console import Console

    from relu_doctor.demo.running import dashboard_line, run_stories, scan_line, watch_line, write_page
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
    sick = max(results, key=lambda each: (each.run.accuracy > _GOOD, each.after.diagnosis.summary["dead_fraction"]))
    page = write_page(sick, directory)
    console.print("See the runs: the tab ReLU Doctor of the dashboard, and a page of the quietly sick one to share:\n")
    print(f"{dashboard_line(directory)}\npython -m webbrowser {page.resolve().as_uri()}")
