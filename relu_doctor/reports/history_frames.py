"""The frames of a history: every live window of a run, as the page and the pictures draw them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd

from relu_doctor.diagnose.diagnosis import Diagnosis
from relu_doctor.diagnose.table import SiteRecord
from relu_doctor.reports.frames import Frame, numbers_of, ranges_of, site_of, statuses_of, verdict_of
from relu_doctor.reports.standing import window_sentence
from relu_doctor.reports.words import plain_name
from relu_doctor.training.history_reading import HistoryReader


def frames_of(reader: HistoryReader) -> Iterator[Frame]:
    """Each live window, in the order of steps; the latest with its whole verdict, the others with what was kept of it.

    Raises:
        HistoryError: the history was removed or is damaged.
    """
    with reader:
        windows, latest = reader.windows, reader.latest
        timeline = dict(iter(reader.timeline.groupby("window_id")))
        findings = dict(iter(reader.findings.groupby("window_id")))
        alerts = reader.alerts
        records = {} if latest is None else {site.site_id: site for site in latest.table.sites}
        last = None if windows.empty else int(windows["window_id"].max())
        before = 0
        for row in windows.to_dict("records"):
            window = int(row["window_id"])
            units = reader.units(window)
            rows = timeline.get(window, pd.DataFrame()).to_dict("records")
            in_it = alerts[(alerts["step"] > before) & (alerts["step"] <= row["last_step"])]
            before = int(row["last_step"])
            yield _frame(
                row,
                units,
                [site_of({**each, **_facts(records.get(str(each["site_id"])))}) for each in rows],
                findings.get(window, pd.DataFrame()),
                in_it,
                latest if window == last else None,
            )


def _facts(site: SiteRecord | None) -> dict[str, Any]:
    """What a site is; ``None`` where the latest window does not have it any more."""
    if site is None:
        return {"rectifier": "", "producer": ""}
    return {name: getattr(site, name) for name in ("rectifier", "producer", "can_die", "note")}


def _frame(
    row: Mapping[Any, Any],
    units: pd.DataFrame,
    sites: list[dict[str, Any]],
    findings: pd.DataFrame,
    alerts: pd.DataFrame,
    diagnosis: Diagnosis | None,
) -> Frame:
    whole, stop, columns = numbers_of(units, units), 0, []
    for site in sites:
        start, stop = stop, stop + site["num_units"]
        columns.append({name: values[start:stop] for name, values in whole.items()})
    span = {name: row[name] for name in ("first_step", "last_step", "closed")}
    numbers = {name: float(value) for name, value in json.loads(row["numbers"] or "{}").items() if value is not None}
    return Frame(
        span={"window": int(row["index"]), **span},
        verdict=_kept_verdict(row) if diagnosis is None else verdict_of(diagnosis),
        numbers=numbers,
        sites=sites,
        status=statuses_of(units),
        units=columns,
        findings=[
            {name: plain_name(str(each[name])) for name in ("code", "site", "title", "evidence", "advice")}
            | {"units": ranges_of(each["units"])}
            for each in findings.to_dict("records")
        ],
        alerts=[
            {"code": each["code"], "step": int(each["step"])}
            | {name: plain_name(str(each[name])) for name in ("site", "message")}
            for each in alerts.to_dict("records")
        ],
    )


def _kept_verdict(row: Mapping[Any, Any]) -> dict[str, Any]:
    """Of a window before the last, of which the counts were kept and not the words."""
    severity = str(row["severity"])
    sentence = f"{severity.replace('_', ' ').capitalize()}: {window_sentence(row)}."
    return {
        "label": severity.replace("_", " "),
        "severity": severity,
        "sentence": sentence,
        "details": [],
        "coverage": f"{int(row['num_inputs']):,} inputs, {int(row['distinct_inputs']):,} distinct",
        "remarks": [],
        "unit_word": "inputs",
    }
