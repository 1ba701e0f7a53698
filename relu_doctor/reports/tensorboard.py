"""Diagnoses for TensorBoard: fractions per site and in all, histograms of firing rates, verdict and findings.

Of a monitor's windows also what changed in them: deaths, updates, and the run's own numbers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pandas as pd

from relu_doctor.errors import OutputError
from relu_doctor.numerals import plural
from relu_doctor.reports.coverage import coverage_line, coverage_remarks
from relu_doctor.reports.scalars import ALL, UNKNOWN, fractions, share_of, site_tags, window_numbers
from relu_doctor.reports.verdict import verdict
from relu_doctor.reports.words import plain_name, ranges
from relu_doctor.terms import Status

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from relu_doctor.diagnose.diagnosis import Diagnosis
    from relu_doctor.training.windows import Window

_EDGES = np.linspace(0, 1, 41)  # of the histograms of firing rates
_MARKDOWN = re.compile(r"[\\`*_{}\[\]()<>#+!|~&-]")
_MAX_FINDINGS = 50


class TensorBoardSink:
    """Writes diagnoses as event files that TensorBoard shows. A context manager; closing twice is fine.

    It is called with a :class:`~relu_doctor.training.windows.Window`, too, and so is a sink of a
    :class:`~relu_doctor.Monitor`, which opens one itself for ``sinks=["tensorboard:runs/exp1"]``.

    Per diagnosis: scalars ``relu_doctor/dead_fraction``, ``silent_fraction`` and ``non_finite_fraction``, the same per
    site under ``relu_doctor_sites/<site>/``, histograms ``firing_rate`` of units, and the texts ``relu_doctor/verdict``
    and ``relu_doctor/findings``. A fraction is NaN where nothing is known of the units, so that a diverged network
    shows a gap, not 0. Per window also ``relu_doctor/deaths``, ``revivals``, ``update_ratio``, ``loss``, ``lr`` and the
    like, at its last step, and what it has per site.

    Args:
        log_dir: made where it is missing.

    Raises:
        OutputError: the directory cannot be written to.

    Example:
        >>> with TensorBoardSink("runs/scan") as sink:  # doctest: +SKIP
        ...     sink.write(diagnosis, step=1200)
    """

    def __init__(self, log_dir: str | Path) -> None:
        self.log_dir = Path(log_dir)
        self._writer: SummaryWriter | None = None
        try:
            self.log_dir.mkdir(parents=True, exist_ok=True)
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(log_dir=str(self.log_dir))
        except OSError as error:
            raise self._cannot_write(error) from error

    def write(self, diagnosis: Diagnosis, step: int) -> None:
        """Write one diagnosis at a training step.

        Raises:
            OutputError: the event file cannot be written.
            ValueError: the sink is closed.
        """
        with self._writing() as writer:
            _write(writer, diagnosis, step)

    def __call__(self, window: Window) -> None:
        """Write one window at its last step.

        Raises:
            OutputError: the event file cannot be written.
            ValueError: the sink is closed.
        """
        with self._writing() as writer:
            _write(writer, window.diagnosis, window.last_step)
            _write_window(writer, window)

    @contextmanager
    def _writing(self) -> Iterator[SummaryWriter]:
        if self._writer is None:
            raise ValueError("expected an open TensorBoardSink, found a closed one; write inside its with block.")
        try:
            yield self._writer
            self._writer.flush()
        except OSError as error:
            raise self._cannot_write(error) from error

    def close(self) -> None:
        """Finish the event file.

        Raises:
            OutputError: it cannot be written.
        """
        writer, self._writer = self._writer, None
        if writer is not None:
            try:
                writer.close()
            except OSError as error:
                raise self._cannot_write(error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _cannot_write(self, error: OSError) -> OutputError:
        return OutputError(
            f"cannot write TensorBoard events to '{plain_name(self.log_dir)}': {error.strerror or error}; "
            "give a directory that can be written to."
        )


def _write(writer: SummaryWriter, diagnosis: Diagnosis, step: int) -> None:
    mortal = {site.site_id for site in diagnosis.table.sites if site.can_die}
    units = diagnosis.units
    own = units[units["site_id"].isin(mortal)]
    non_finite = {"non_finite_fraction": share_of(units, Status.NON_FINITE)}
    _scalars(writer, ALL, {**fractions(own), **non_finite}, step)
    _histogram(writer, ALL, own, step)
    tags = site_tags(diagnosis)
    for site_id, rows in units.groupby("site_id", sort=False):
        non_finite = {"non_finite_fraction": share_of(rows, Status.NON_FINITE)}
        _scalars(writer, tags[str(site_id)], {**(fractions(rows) if site_id in mortal else {}), **non_finite}, step)
        _histogram(writer, tags[str(site_id)], rows, step)
    writer.add_text(f"{ALL}/verdict", verdict_markdown(diagnosis), step)
    writer.add_text(f"{ALL}/findings", findings_markdown(diagnosis), step)


def _write_window(writer: SummaryWriter, window: Window) -> None:
    tags = site_tags(window.diagnosis)
    _scalars(writer, ALL, window_numbers(window), window.last_step)
    for row in window.sites.to_dict("records"):
        tag = tags[str(row.pop("site_id"))]
        had = {str(name): float(value) for name, value in row.items() if pd.notna(value)}
        _scalars(writer, tag, had, window.last_step)


def verdict_markdown(diagnosis: Diagnosis) -> str:
    """Coverage and verdict as Markdown, names escaped."""
    said = verdict(diagnosis)
    lines = [f"**{_escape(said.sentence)}**", *map(_escape, said.details), _escape(coverage_line(diagnosis))]
    return "\n\n".join([*lines, *map(_escape, coverage_remarks(diagnosis))])


def findings_markdown(diagnosis: Diagnosis) -> str:
    """The findings as a Markdown list, names escaped."""
    if not diagnosis.findings:
        return "No findings."
    lines = []
    for finding in diagnosis.findings[:_MAX_FINDINGS]:
        place = f"{finding.site}: " if finding.site else ""
        parts = [f"**{_escape(finding.code)}** {_escape(place + finding.title)}"]
        parts += [_escape(finding.evidence)] if finding.evidence else []
        parts += [f"units {_escape(ranges(finding.unit_indices, 20))}"] if finding.unit_indices else []
        parts += [f"*{_escape(finding.advice)}*"] if finding.advice else []
        lines.append("- " + "  \n  ".join(parts))
    if rest := len(diagnosis.findings) - _MAX_FINDINGS:
        lines += [f"- and {plural(rest, 'more finding')}"] if rest > 0 else []
    return "\n".join(lines)


def _escape(text: str) -> str:
    """Markup as character references: which backslashes Markdown obeys differs between its readers."""
    return _MARKDOWN.sub(lambda found: f"&#{ord(found.group())};", plain_name(text))


def _scalars(writer: SummaryWriter, tag: str, values: dict[str, float], step: int) -> None:
    add: Any = writer.add_scalar
    for name, value in values.items():
        add(f"{tag}/{name}", value, step)


def _histogram(writer: SummaryWriter, tag: str, rows: pd.DataFrame, step: int) -> None:
    rates = rows.loc[~rows["status"].isin(UNKNOWN), "firing_rate"].to_numpy(float)
    rates = rates[np.isfinite(rates)]
    if len(rates):
        add: Any = writer.add_histogram
        add(f"{tag}/firing_rate", rates, step, bins=_EDGES)
