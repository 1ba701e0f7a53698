"""``relu-doctor report`` and the formats that it shares with scan: what was saved is shown as it was found."""

from __future__ import annotations

import json
from functools import partial

import pandas as pd
import pytest
import torch

import relu_doctor
from relu_doctor.training.monitor import Monitor
from tests.commands import call, one_sentence
from tests.training.loops import batches, perceptron, train

pytestmark = pytest.mark.filterwarnings("ignore::relu_doctor.errors.DyingUnitsWarning")


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the command in this process: exit code, stdout, stderr."""
    return partial(call, monkeypatch, capsys)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """``diagnosis.json`` of a sick net, ``sound.json`` of a sound one, and the ``history`` of a run."""
    place = tmp_path_factory.mktemp("reported")
    model = perceptron()
    inputs = torch.randn(2000, 16, generator=torch.Generator().manual_seed(0))
    relu_doctor.scan(model, inputs).save(place / "sound.json")
    with torch.no_grad():
        model[0].bias[:12] = -100
    relu_doctor.scan(model, inputs).save(place / "diagnosis.json")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    monitor = Monitor(model, optimizer=optimizer, every=2, window=100, history=place / "history")
    train(model, batches(300), optimizer, monitor)
    return place


def test_a_saved_diagnosis_is_shown_as_it_was_found(run, folder):
    """As text, and as the same JSON."""
    path = folder / "diagnosis.json"
    kept = relu_doctor.Diagnosis.load(path)
    assert "12 of 32" in run("report", path).out
    found = json.loads(run("report", path, "--format", "json").out)["diagnoses"]
    assert found == [kept.to_dict()]


def test_the_units_table_is_the_same_in_csv_and_parquet(run, folder, tmp_path):
    """A row per unit; of several diagnoses with the name of each."""
    kept = relu_doctor.Diagnosis.load(folder / "diagnosis.json").units
    for form, read in (("csv", pd.read_csv), ("parquet", pd.read_parquet)):
        output = tmp_path / f"units.{form}"
        paths = (folder / "diagnosis.json", folder / "sound.json")
        assert run("report", *paths, "--format", form, "--output", output).code == 0
        table = read(output)
        assert len(table) == 2 * len(kept)
        first = table[table["checkpoint"] == table["checkpoint"].iloc[0]]
        assert first["status"].tolist() == kept["status"].tolist()
        assert first["pre_max"].to_numpy() == pytest.approx(kept["pre_max"].to_numpy(float), nan_ok=True)


def test_the_history_of_a_run_is_a_page_too(run, folder, tmp_path):
    """With every unit, the verdict as plain text, and no address to ask."""
    assert run("report", folder / "history", "--format", "html", "--output", tmp_path / "page.html").code == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "Content-Security-Policy" in page
    assert "src=" not in page
    assert "of 48 units" in page
    assert run("report", folder / "history", "--format", "csv", "--output", tmp_path / "units.csv").code == 0
    assert len(pd.read_csv(tmp_path / "units.csv")) == 48


def test_the_file_of_a_history_stands_for_its_directory(run, folder):
    """Whoever names it means the run."""
    assert run("report", folder / "history" / "relu_doctor.sqlite").out == run("report", folder / "history").out


def test_what_cannot_be_reported_is_told_in_a_sentence(run, folder, tmp_path):
    """Nothing there, a checkpoint, several with a directory among them, a history without a window."""
    assert "found nothing at" in one_sentence(run("report", tmp_path / "none"))
    torch.save(perceptron().state_dict(), tmp_path / "net.pt")
    assert "relu-doctor scan FILE" in one_sentence(run("report", tmp_path / "net.pt"))
    assert "one by one" in one_sentence(run("report", folder / "history", folder / "sound.json"))
    with Monitor(perceptron(), history=tmp_path / "empty"):
        pass
    assert "no window" in one_sentence(run("report", tmp_path / "empty", "--format", "html"))
    assert run("report", tmp_path / "empty").code == 0
