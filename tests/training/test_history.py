"""What a history keeps of a run, of a resumed one and of one that went back."""

from __future__ import annotations

import importlib.util
import json
import re
import sqlite3
import threading
import warnings
from contextlib import closing
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from relu_doctor.config import load_config
from relu_doctor.diagnose.storage import to_dict
from relu_doctor.errors import HistoryError, ReLUDoctorWarning
from relu_doctor.training import history_schema
from relu_doctor.training.history import History
from relu_doctor.training.history_schema import COUNTS, FILE, FRACTIONS, UNIT_DATA
from relu_doctor.training.windows import SITE_COLUMNS, UNIT_COLUMNS, Alert
from tests.builders import make_diagnosis, site
from tests.training.made import PERIOD, scanned, window_of

DEAD, ALIVE = scanned(), scanned(bias=0.1)


def steps(reader) -> list[int]:
    return reader.windows["first_step"].tolist()


def run(path, indices, *, start: int = 0, diagnosis=DEAD, **begin):
    """A run that keeps some windows and ends."""
    with History.open(path) as history, warnings.catch_warnings():
        warnings.simplefilter("ignore", ReLUDoctorWarning)
        history.begin(start_step=start, **begin)
        return [history.append(window_of(diagnosis, index, start=start)) for index in indices]


def test_every_number_of_a_window_comes_back(tmp_path):
    """Windows, sites, units, findings and the whole diagnosis are what the window held; floats of units to float32."""
    window = window_of(DEAD, 3, numbers={"grad_norm": 2.0, "lr/1": 0.01})
    with History.open(tmp_path) as history:
        history.begin()
        history.append(window)
    reader = History.read(tmp_path)
    row = reader.windows.iloc[0]
    assert (row["index"], row["first_step"], row["last_step"], row["closed"]) == (3, 30, 39, window.closed)
    assert (row["loss"], row["grad_norm"], row["lr"], row["observed_inputs"]) == (1 / 31, 2.0, 0.1, 96)
    assert pd.isna(row["observed_steps"])
    assert json.loads(row["numbers"]) == dict(window.numbers)
    for name in ("severity", "num_units", *COUNTS, *FRACTIONS, "num_inputs", "distinct_inputs", "inputs_needed"):
        assert row[name] == DEAD.summary[name], name
    timeline = reader.timeline
    pd.testing.assert_frame_equal(
        timeline[["site", "site_id", "num_units", *COUNTS, *FRACTIONS]],
        DEAD.sites[["site", "site_id", "num_units", *COUNTS, *FRACTIONS]],
    )
    for name in SITE_COLUMNS:
        np.testing.assert_array_equal(timeline[name].astype(float), window.sites[name].astype(float))
    units = reader.units()
    assert units["site_id"].tolist() == DEAD.units["site_id"].tolist()
    for column in UNIT_DATA:
        expected = (window.units if column.carried else DEAD.units)[column.name]
        if column.kind == "real":
            np.testing.assert_array_equal(units[column.name], expected.to_numpy(np.float32))
        else:
            assert units[column.name].tolist() == expected.tolist(), column.name
    assert reader.findings["code"].tolist() == [finding.code for finding in DEAD.findings]
    assert reader.findings["units"].tolist() == [list(finding.unit_indices) for finding in DEAD.findings]
    assert to_dict(reader.latest) == to_dict(DEAD)
    assert reader.sites["producer"].tolist() == DEAD.sites["producer"].tolist()


def test_the_schema_has_a_place_for_every_column_of_a_window():
    """What a monitor adds to its windows must be added here too, or it would be lost."""
    assert {column.name for column in UNIT_DATA if column.carried} == set(UNIT_COLUMNS)
    tables = "\n".join(history_schema.TABLES)
    assert all(f"{name} " in tables for name in SITE_COLUMNS)


def test_the_readme_names_every_table():
    """One row per table and view of the schema."""
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    section = readme.split("## The history of a run")[1].split("\n## ")[0]
    named = set(re.findall(r"^\| `(\w+)`", section, flags=re.MULTILINE))
    assert named == {re.match(r"CREATE (?:TABLE|VIEW) (\w+)", each)[1] for each in history_schema.TABLES}


def test_two_lines_of_pandas_read_it(tmp_path):
    """Without relu_doctor: the timeline by one query, a blob by one line, words by the table of codes."""
    run(tmp_path, range(2))
    with closing(sqlite3.connect(tmp_path / FILE)) as connection:
        timeline = pd.read_sql("SELECT * FROM timeline", connection)
        assert timeline["silent"].tolist() == DEAD.sites["silent"].tolist() * 2
        (blob,) = connection.execute("SELECT status FROM units WHERE window_id = 2 AND site_key = 1").fetchone()
        codes = dict(connection.execute("SELECT code, word FROM codes WHERE kind = 'status'"))
        assert [codes[code] for code in np.frombuffer(blob, "u1")] == DEAD.units["status"].tolist()[:8]
        assert connection.execute("SELECT value FROM meta WHERE key = 'schema_version'").fetchone() == ("1",)
        columns = pd.read_sql("SELECT * FROM unit_columns", connection)
        assert columns["name"].tolist() == [column.name for column in UNIT_DATA]


def test_a_run_tells_who_it_was(tmp_path, monkeypatch):
    """Command line, versions, thresholds and start are kept; the environment is not."""
    monkeypatch.setenv("WANDB_API_KEY", "very-secret-key")
    monkeypatch.setattr("sys.argv", ["train.py", "--lr", "0.1"])
    run(tmp_path, [0], config=load_config("strict"), details={"every": 50})
    found = History.read(tmp_path).runs.iloc[0]
    assert json.loads(found["command"]) == ["train.py", "--lr", "0.1"]
    assert {"torch", "relu-doctor", "python"} <= set(json.loads(found["versions"]))
    assert json.loads(found["config"])["max_firing_rate"] == load_config("strict").max_firing_rate
    assert json.loads(found["details"]) == {"every": 50}
    assert found["reason"] == "finished"
    assert found["ended"] >= found["started"]
    assert b"very-secret-key" not in (tmp_path / FILE).read_bytes()


def test_a_run_that_raises_says_so(tmp_path):
    """The reason of the end is the exception; the windows are there."""
    with pytest.raises(KeyError), History.open(tmp_path) as history:  # noqa: PT012
        history.begin()
        history.append(window_of(DEAD))
        raise KeyError("no such batch")
    assert History.read(tmp_path).runs["reason"].tolist() == ["KeyError: 'no such batch'"]


def test_a_resumed_run_continues_the_timeline(tmp_path):
    """Another run with the same directory adds to it by global step; nothing is superseded."""
    run(tmp_path, range(3))
    with History.open(tmp_path) as history:
        history.begin(start_step=30)  # no warning: it goes on where the other ended
        history.append(window_of(ALIVE, 0, start=30))
    reader = History.read(tmp_path)
    assert steps(reader) == [0, 10, 20, 30]
    assert reader.windows["run_id"].tolist() == [1, 1, 1, 2]
    assert reader.windows["superseded_by"].isna().all()
    assert reader.latest.summary["dead"] == ALIVE.summary["dead"]
    assert reader.state.state == "ended"


def test_a_rewound_run_supersedes_the_abandoned_branch(tmp_path):
    """Windows from its first step on are kept and marked by the window that took their place; readers see the rest."""
    run(tmp_path, range(5))
    with History.open(tmp_path) as history:
        with pytest.warns(ReLUDoctorWarning, match="already reaches step 49 and this run begins at step 20"):
            history.begin(start_step=20)
        assert steps(History.read(tmp_path)) == [0, 10, 20, 30, 40]  # nothing is lost before there is better
        history.append(window_of(ALIVE, 0, start=20))
    reader = History.read(tmp_path)
    assert steps(reader) == [0, 10, 20]
    assert reader.windows["run_id"].tolist() == [1, 1, 2]
    assert reader.num_superseded == 3
    everything = History.read(tmp_path, superseded=True).windows
    assert sorted(everything["first_step"]) == [0, 10, 20, 20, 30, 40]
    assert everything["superseded_by"].dropna().tolist() == [6, 6, 6]
    assert len(reader.timeline) == 6
    assert len(History.read(tmp_path, superseded=True).timeline) == 12
    assert reader.units()["status"].tolist() == ALIVE.units["status"].tolist()
    assert reader.units(5)["status"].tolist() == DEAD.units["status"].tolist()


def test_a_window_that_is_partly_taken_again_is_superseded_whole(tmp_path):
    """A run that goes back into the middle of a window abandons that window."""
    run(tmp_path, range(2))
    run(tmp_path, [0], start=15)
    assert steps(History.read(tmp_path)) == [0, 15]


def test_rewound_twice(tmp_path):
    """Each rewinding marks what was live before it, and nothing twice."""
    for start in (0, 10, 0):
        run(tmp_path, range(3), start=start)
    everything = History.read(tmp_path, superseded=True).windows
    assert steps(History.read(tmp_path)) == [0, 10, 20]
    assert everything.set_index("window_id")["superseded_by"].fillna(0).to_dict() == {
        1: 7, 2: 4, 3: 4, 4: 7, 5: 7, 6: 7, 7: 0, 8: 0, 9: 0
    }  # fmt: skip


def test_an_alert_is_kept_at_once_and_once(tmp_path):
    """An alert told before its window closes is there, and the window that tells it again adds nothing."""
    alert = Alert("RD701", 3, "1", "update 3 at lr 0.5: 41 of 64 units", {"units": 41, "rate": 0.5, "why": "lr"})
    with History.open(tmp_path) as history:
        history.begin()
        history.append_alert(alert)
        early = History.read(tmp_path).alerts
        assert early["message"].tolist() == [alert.message]
        assert early["window_id"].isna().all()
        history.append(window_of(DEAD, alerts=[alert, Alert("RD702", 8, "", "a wave")]))
    alerts = History.read(tmp_path).alerts
    assert alerts["code"].tolist() == ["RD701", "RD702"]
    assert alerts["window_id"].tolist() == [1, 1]
    assert json.loads(alerts["evidence"][0]) == dict(alert.evidence)


def test_alerts_of_an_abandoned_branch_go_with_it(tmp_path):
    """Also one whose window never closed, because the run was killed; one from before the rewinding stays."""
    with History.open(tmp_path) as history:
        history.begin()
        history.append(window_of(DEAD, 0, alerts=[Alert("RD701", 5, "", "stays")]))
        history.append(window_of(DEAD, 1, alerts=[Alert("RD701", 15, "", "goes")]))
        history.append_alert(Alert("RD701", 22, "", "goes too"))
    run(tmp_path, [0], start=10)
    assert History.read(tmp_path).alerts["message"].tolist() == ["stays"]
    assert len(History.read(tmp_path, superseded=True).alerts) == 3


def test_hostile_names_are_kept_as_text(tmp_path):
    """Quotes, SQL, markup, NUL, line breaks, bidi marks and lone surrogates neither break nor change anything."""
    name = "a'); DROP TABLE windows; --\"[red]\0\n\u202e😀" + "x" * 3000
    odd = "odd" if importlib.util.find_spec("pyarrow") else "\ud800odd"  # pyarrow's texts hold no surrogates
    diagnosis = make_diagnosis(site(name, active=3, negative_bias=2), site(odd, active=2))
    folder = tmp_path / "run 'one' %20?mode=memory#[red]\n"
    window = window_of(diagnosis, alerts=[Alert("RD7'", 3, name, "\udcff")])
    with History.open(folder) as history:
        history.begin(command=["train.py", "\udc80", name])
        history.append(window)
    reader = History.read(folder)
    assert reader.sites["site"].tolist() == [name, odd.encode("utf-8", "backslashreplace").decode()]
    assert set(reader.units()["site"]) == set(reader.sites["site"])
    assert reader.latest.sites["site"].tolist() == [name, odd]
    assert reader.alerts["site"].tolist() == [name]
    assert json.loads(reader.runs["command"][0]) == ["train.py", "\udc80", name]
    assert len(reader.windows) == 1


def test_a_site_that_changes_keeps_its_key(tmp_path):
    """Another width under the same site_id, as of another model in the same directory, changes no older window."""
    run(tmp_path, [0], diagnosis=make_diagnosis(site("a", active=3)))
    run(tmp_path, [0], start=10, diagnosis=make_diagnosis(site("b", active=2), site("a", active=5)))
    reader = History.read(tmp_path)
    assert reader.sites[["site", "num_units"]].to_numpy().tolist() == [["b", 2], ["a", 5]]
    assert len(reader.units(1)) == 3
    assert reader.timeline["num_units"].tolist() == [3, 2, 5]


def test_extreme_numbers_survive(tmp_path):
    """NaN, infinities and what float32 cannot hold neither raise nor warn."""
    diagnosis = make_diagnosis(site("a", active=2, non_finite=1, unobserved=2), num_inputs=10**10)
    diagnosis.units.loc[0, "pre_max"] = 1e300
    diagnosis.units.loc[1, "weight_l2"] = np.inf
    with History.open(tmp_path) as history:
        history.begin()
        history.append(window_of(diagnosis, numbers={"loss": np.nan, "grad_norm": np.inf}))
    reader = History.read(tmp_path)
    units = reader.units()
    assert units["pre_max"][0] == np.inf
    assert units["weight_l2"][1] == np.inf
    assert units["inputs"].tolist() == [10**10] * 3 + [0] * 2
    assert reader.windows["loss"].isna().all()
    assert reader.windows["grad_norm"].tolist() == [np.inf]
    assert json.loads(reader.windows["numbers"][0])["grad_norm"] is None


def test_a_model_without_units_and_a_window_without_onsets_are_kept(tmp_path):
    """Nothing to tell of a unit is no error."""
    run(tmp_path, [0], diagnosis=make_diagnosis(site("a")))
    bare = window_of(DEAD, 1)
    object.__setattr__(bare, "units", bare.units.iloc[:0])
    object.__setattr__(bare, "sites", bare.sites.iloc[:0])
    with History.open(tmp_path) as history:
        history.begin(start_step=PERIOD)
        history.append(bare)
    reader = History.read(tmp_path)
    assert reader.units(1).empty
    assert set(reader.units()["onset"]) == {""}
    assert reader.units()["onset_step"].tolist() == [-1] * 13
    assert reader.timeline["deaths"][1:].isna().all()


def test_a_window_that_does_not_fit_itself_is_refused(tmp_path):
    """Rows for other units than the diagnosis has would be told of the wrong ones."""
    wrong = window_of(DEAD)
    object.__setattr__(wrong, "units", wrong.units.iloc[1:])
    with History.open(tmp_path) as history:
        history.begin()
        with pytest.raises(ValueError, match=r"expected 13 rows in window\.units, found 12"):
            history.append(wrong)
        assert history.append(window_of(DEAD)) == 1


def test_a_window_without_a_run_is_refused(tmp_path):
    """``begin`` comes first."""
    with History.open(tmp_path) as history, pytest.raises(HistoryError, match=r"expected begin\(\)"):
        history.append(window_of(DEAD))


def test_one_moment_is_one_moment(tmp_path):
    """Inside ``with reader`` nothing changes; outside, each look is new."""
    run(tmp_path, [0])
    with History.open(tmp_path) as history:
        history.begin(start_step=PERIOD)
        reader = History.read(tmp_path)
        with reader:
            assert len(reader.windows) == 1
            history.append(window_of(DEAD, 1))
            assert len(reader.windows) == 1
        assert len(reader.windows) == 2


def test_several_threads_may_write(tmp_path):
    """Appending from threads keeps every window whole."""
    with History.open(tmp_path) as history:
        history.begin()
        threads = [threading.Thread(target=history.append, args=[window_of(DEAD, index)]) for index in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    reader = History.read(tmp_path, superseded=True)
    assert sorted(reader.windows["first_step"]) == [10 * index for index in range(8)]
    assert all(len(frame) == 13 for frame in reader.unit_frames())


def test_the_latest_diagnosis_may_be_larger_than_a_row(tmp_path, monkeypatch):
    """It is kept in parts, and only the latest."""
    monkeypatch.setattr("relu_doctor.training.history_rows._PART", 1000)
    run(tmp_path, range(2))
    with closing(sqlite3.connect(tmp_path / FILE)) as connection:
        assert connection.execute("SELECT count(*) > 1, min(window_id) FROM diagnosis").fetchone() == (1, 2)
    assert to_dict(History.read(tmp_path).latest) == to_dict(DEAD)
