"""What a scan saw and what it did not, in plain lines: the first thing that every report tells."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from relu_doctor.numerals import plural
from relu_doctor.reports.words import listed, plain_name

if TYPE_CHECKING:
    from relu_doctor.diagnose.diagnosis import Diagnosis


def coverage_line(diagnosis: Diagnosis) -> str:
    """What was seen, in one line: the first of every report."""
    coverage, summary = diagnosis.table.coverage, diagnosis.summary
    kind = f"random {coverage.evidence}" if coverage.random_inputs else coverage.evidence
    sites = plural(summary["num_sites"], "site")
    told = "; ".join(_reading(diagnosis))
    return f"{summary['num_observed_sites']:,} of {sites} observed on {plural(coverage.num_inputs, kind)} ({told})"


def _reading(diagnosis: Diagnosis) -> Iterator[str]:
    coverage = diagnosis.table.coverage
    number, available = coverage.num_inputs, coverage.available_inputs
    if coverage.sequences is not None:
        yield "every position that is no padding counts"
        number = coverage.sequences
    yield "eval and train mode" if coverage.mode == "both" else f"{coverage.mode} mode"
    of_all = f" of {available:,}" if available is not None else ""
    if coverage.sampling == "spread":
        yield f"{number:,}{of_all}, spread evenly"
    elif coverage.sampling == "head" or not coverage.read_to_end:
        yield f"the first {number:,}{of_all or ' of a stream'}"
    elif not coverage.random_inputs:
        yield f"all {number:,} {'' if coverage.sequences is None else 'sequences '}read"
    repeated = coverage.num_inputs - coverage.distinct_inputs
    if repeated > 0:
        yield f"{repeated:,} repeated, {coverage.distinct_inputs:,} distinct"
    if coverage.exhaustive:
        yield "said to be the whole population"
    if coverage.masked:
        yield "padding masked"
    if coverage.statistics == "minimal":
        yield "minimal statistics"
    if coverage.excluded:
        yield f"{plural(coverage.excluded, 'site')} left out"
    if coverage.passed:
        yield f"passed: {plain_name(coverage.passed)}"


def coverage_remarks(diagnosis: Diagnosis) -> tuple[str, ...]:
    """Where the model came from, and what else must be told of the reading; one line each."""
    coverage = diagnosis.table.coverage
    source = coverage.source
    lines = []
    if path := source.get("checkpoint") or source.get("path"):
        within = [str(source[key]) for key in ("format",) if source.get(key)]
        within += [f"under {source['key']}"] if source.get("key") else []
        parts = [plain_name(path) + (f" ({plain_name(', '.join(within))})" if within else "")]
        for word in ("epoch", "step"):
            if source.get(word) is not None:
                value = source[word]
                parts.append(f"{word} {value:,}" if isinstance(value, int) else f"{word} {plain_name(value)}")
        lines.append("Checkpoint: " + ", ".join(parts))
    if source.get("data"):
        lines.append(f"Data: {plain_name(source['data'])}")
    inert = [plain_name(item) for item in source.get("placeholders") or ()]
    if inert:
        lines.append(f"{plural(len(inert), 'object')} in the file read as inert placeholders: {listed(inert, 4)}")
    lines += [plain_name(note) for note in (*(source.get("notes") or ()), *coverage.notes)]
    return tuple(lines)
