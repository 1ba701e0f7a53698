"""The command, on files that the demo's own training made."""

from __future__ import annotations

import argparse
import base64
import json
import os
import pickle
import re
import subprocess
import sys
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from relu_doctor import Diagnosis
from relu_doctor.checkpoints.updates import steps_of
from relu_doctor.demo.stories import STORIES
from relu_doctor.demo.training import train_story
from tests.commands import Result, call, one_sentence

DATA = "relu_doctor.demo.data:digits"
MLP = "relu_doctor.demo.models:make_mlp"


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the command in this process: exit code, stdout, stderr."""

    return partial(call, monkeypatch, capsys)


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> dict[str, list[Path]]:
    """Checkpoints of every story, by ``story-net``, in the order of training."""
    folder = tmp_path_factory.mktemp("runs")
    return {story.key: list(train_story(story, folder).paths) for story in STORIES}


def scan_mlp(run, *arguments: object, data: object = DATA) -> Result:
    return run("scan", *arguments, "--model", MLP, "--data", data)


def test_the_quietly_sick_run_is_named_sick_and_the_sound_one_sound(run, runs):
    """The main job: the verdict follows the training, not the accuracy."""
    sick = json.loads(scan_mlp(run, runs["quietly_sick-mlp"][-1], "--format", "json").out)["diagnoses"][0]
    sound = json.loads(scan_mlp(run, runs["sound-mlp"][-1], "--format", "json").out)["diagnoses"][0]
    assert sick["summary"]["severity"] in {"serious", "critical"}
    assert sick["summary"]["dead_fraction"] > 0.2
    assert sound["summary"]["dead_fraction"] < 0.1
    assert sick["summary"]["num_inputs"] == 1797
    assert sick["summary"]["unproven"] == 0


def test_a_collapsed_run_has_a_dead_layer_and_a_diverged_one_is_not_called_zero_percent_dead(run, runs):
    """A whole dead layer is told; NaN is non-finite, never alive and never silently dead."""
    collapsed = json.loads(scan_mlp(run, runs["collapsed-mlp"][-1], "--format", "json").out)["diagnoses"][0]
    assert collapsed["sites"][1]["dead_fraction"] == 1.0
    diverged = json.loads(scan_mlp(run, runs["diverged-mlp"][-1], "--format", "json").out)["diagnoses"][0]
    assert diverged["summary"]["severity"] == "non_finite"
    assert diverged["summary"]["non_finite"] > 0
    assert any(finding["code"] == "RD101" for finding in diverged["findings"])


def test_the_learning_rate_finding_tells_sick_from_sound(run, runs):
    """An earlier checkpoint of the run beside the last one: the rate fits the deaths, or it does not."""

    def verdict(story: str) -> str:
        files = (runs[story][0], runs[story][-1])
        found = json.loads(scan_mlp(run, *files, "--format", "json").out)["diagnoses"][1]
        return next(finding for finding in found["findings"] if finding["code"] == "RD301")["title"]

    assert ": consistent with a too high learning rate" in verdict("quietly_sick-mlp")
    assert ": consistent with a too high learning rate" in verdict("collapsed-mlp")
    assert "not consistent with a too high learning rate" in verdict("sound-mlp")


def test_json_is_all_that_stdout_holds_and_is_the_same_twice(run, runs):
    """``--format json | jq`` works; but for its metadata the output is byte-identical."""
    first, second = (scan_mlp(run, runs["sound-mlp"][-1], "--format", "json") for _ in range(2))
    documents = [json.loads(result.out) for result in (first, second)]
    for document in documents:
        assert document["schema_version"] == 1
        document["diagnoses"][0].pop("metadata")
    assert json.dumps(documents[0]) == json.dumps(documents[1])
    assert first.err == ""


def test_csv_has_a_row_per_unit(run, runs, tmp_path):
    """CSV on stdout or in a file: 320 units of the perceptron."""
    output = tmp_path / "units.csv"
    assert scan_mlp(run, runs["sound-mlp"][-1], "--format", "csv", "--output", output).code == 0
    table = pd.read_csv(output)
    assert len(table) == 320
    assert {"site", "unit", "status", "mechanism", "firing_rate_upper"} <= set(table.columns)


def test_the_table_reads_at_80_columns_without_colour(run, runs):
    """Coverage first, then the verdict; no escape codes when piped, no line over 80 columns."""
    result = scan_mlp(run, runs["quietly_sick-mlp"][-1])
    assert result.code == 0
    assert "2 of 2 sites observed on 1,797 inputs" in result.out.splitlines()[0]
    assert "20–50 %" in result.out
    assert "\x1b" not in result.out
    assert max(len(line) for line in result.out.splitlines()) <= 80


def test_several_checkpoints_get_one_row_each(run, runs):
    """Independent files are shown side by side."""
    result = scan_mlp(run, *runs["quietly_sick-mlp"])
    assert result.code == 0
    for path in runs["quietly_sick-mlp"]:
        assert path.name[:20] in result.out


def test_a_saved_diagnosis_is_the_json_of_the_command(run, runs, tmp_path):
    """What the command writes, Python reads."""
    output = tmp_path / "d.json"
    scan_mlp(run, runs["sound-mlp"][-1], "--format", "json", "--output", output)
    assert len(Diagnosis.load(output).units) == 320


@pytest.mark.parametrize(
    ("gate", "code"),
    [
        (("--fail-over", 0.9), 0),
        (("--fail-over", 0.2), 1),
        (("--fail-over-total", 0.2), 1),
        (("--fail-over-total", 0.95), 0),
    ],
)
def test_gates_fail_on_dead_units(run, runs, gate, code):
    """0 passed, 1 failed."""
    assert scan_mlp(run, runs["quietly_sick-mlp"][-1], *gate).code == code


def test_a_gate_is_never_green_where_nothing_was_proved(run, runs):
    """360 images prove nothing dead at 1 %, random inputs prove nothing at all, NaN is no pass: exit code 3."""
    sick = runs["quietly_sick-mlp"][-1]
    small = scan_mlp(run, sick, "--fail-over", 0.2, data="relu_doctor.demo.data:validation")
    assert small.code == 3
    assert scan_mlp(run, sick, "--fail-over", 0.2, data="random:1x8x8").code == 3
    assert scan_mlp(run, runs["diverged-mlp"][-1], "--fail-over", 0.95).code == 3


def test_exhaustive_data_prove_what_they_show(run, runs):
    """Where the data are the whole population, silent is dead."""
    sick = runs["quietly_sick-mlp"][-1]
    result = scan_mlp(run, sick, "--fail-over", 0.2, "--exhaustive", data="relu_doctor.demo.data:validation")
    assert result.code == 1


def test_random_inputs_are_said_in_every_verdict(run, runs):
    """A verdict on random numbers says so."""
    result = scan_mlp(run, runs["quietly_sick-mlp"][-1], data="random:1x8x8")
    assert "random" in result.out
    assert (
        json.loads(scan_mlp(run, runs["quietly_sick-mlp"][-1], "--format", "json", data="random:1x8x8").out)[
            "diagnoses"
        ][0]["summary"]["dead"]
        == 0
    )


def test_max_inputs_auto_stops_where_the_bound_needs_no_more(run, runs):
    """320 units at 1 % need 873 inputs: ln(0.05 / 320) / ln(0.99)."""
    found = json.loads(scan_mlp(run, runs["sound-mlp"][-1], "--max-inputs", "auto", "--format", "json").out)
    summary = found["diagnoses"][0]["summary"]
    assert summary["num_inputs"] == summary["inputs_needed"] == 873


def test_tensorboard_shows_the_verdict_at_the_step_of_the_checkpoint(run, runs, tmp_path):
    """TensorBoard's own reader finds the dead fraction at the steps that the files record, whatever their order."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    files = runs["quietly_sick-mlp"]
    assert scan_mlp(run, files[-1], files[0], "--tensorboard", tmp_path / "tb").code == 0
    events = EventAccumulator(str(tmp_path / "tb")).Reload()
    points = events.Scalars("relu_doctor/dead_fraction")
    steps = [int(torch.load(path)["step"]) for path in (files[0], files[-1])]
    assert [point.step for point in points] == steps
    assert [event.step for event in events.Tensors("relu_doctor/windows")] == steps
    assert events.Images("relu_doctor/map_of_units")[0].step == steps[-1]
    assert points[1].value > 0.2 > points[0].value


def test_files_that_record_no_step_come_in_the_order_of_their_names_numbers(run, runs, tmp_path):
    """For TensorBoard and in the page, in whatever order the shell gives them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    weights = [torch.load(path)["model_state_dict"] for path in runs["quietly_sick-mlp"]]
    numbers = [100, 200, 1000]
    files = [tmp_path / f"step{number}.pt" for number in numbers]
    for path, state in zip(files, (weights[0], weights[0], weights[-1]), strict=True):
        torch.save(state, path)
    given = sorted(files, key=str)
    assert given != files
    page = tmp_path / "page.html"
    options = ("--tensorboard", tmp_path / "tb", "--format", "html", "--output", page)
    assert scan_mlp(run, *given, *options).code == 0
    points = EventAccumulator(str(tmp_path / "tb")).Reload().Scalars("relu_doctor/dead_fraction")
    assert [point.step for point in points] == numbers
    assert points[2].value > 0.2 > points[1].value
    packed = re.search(r'id="rd-data">([^<]*)', page.read_text("utf-8"))[1]
    windows = json.loads(zlib.decompress(base64.b64decode(packed)))["timeline"]["windows"]
    assert [window["last_step"] for window in windows] == numbers


@pytest.mark.parametrize(
    ("saved", "steps"),
    [
        ([("b.pt", 7, 1), ("a.pt", 3, 2)], [7, 3]),
        ([("b.pt", 7, 1), ("a.pt", None, 2)], [1, 2]),
        ([("c-100/m.pt", None, None), ("c-20/m.pt", None, None)], [100, 20]),
        ([("epoch=1-step=90.pt", None, None), ("epoch=0-step=50.pt", None, None)], [90, 50]),
        ([("loss=0.5-step9.pt", None, None), ("loss=0.4-step10.pt", None, None)], [9, 10]),
        ([("last.pt", None, None), ("a10.pt", None, None), ("a9.pt", None, None)], [2, 1, 0]),
        ([("step20.pt", 20, None), ("step3.pt", None, None)], [20, 3]),
        ([("step20.pt", None, None)], [0]),
        ([("a.pt", None, None), ("a.pt", None, None)], [0, 1]),
    ],
)
def test_checkpoints_lie_on_one_scale(saved, steps):
    """Recorded steps, recorded epochs, numbers in names, or places in natural order; never two of them mixed."""
    assert steps_of(saved) == steps


def test_objects_in_a_checkpoint_stay_inert_and_are_listed(run, runs, tmp_path):
    """An argparse.Namespace beside the weights is read as a placeholder; the report says so."""
    content = torch.load(runs["sound-mlp"][-1])
    torch.save({**content, "args": argparse.Namespace(lr=0.05)}, tmp_path / "trainer.pt")
    result = scan_mlp(run, tmp_path / "trainer.pt")
    assert result.code == 0
    assert "argparse.Namespace" in result.out


def test_explain_lists_all_findings_and_explains_each(run):
    """Every code is listed, every listed code has an explanation."""
    listing = run("explain")
    assert listing.code == 0
    codes = [line.split()[0] for line in listing.out.splitlines()]
    assert "RD205" in codes
    for code in codes:
        assert len(run("explain", code.lower()).out.splitlines()) >= 3
    assert "RD205" in one_sentence(run("explain", "RD999"))


def test_version_and_help_answer(run):
    """``--version`` and ``--help`` exit with 0."""
    assert run("--version").out.startswith("relu-doctor 0.")
    for command in ((), ("scan",), ("explain",), ("demo",)):
        assert run(*command, "--help").code == 0


def test_help_does_not_import_torch():
    """``relu-doctor --help`` is quick because torch, pandas and numpy stay out of it."""
    program = (
        "import sys; sys.argv = ['relu-doctor', '--help']\n"
        "from relu_doctor.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = [name for name in ('torch', 'pandas', 'numpy', 'scipy', 'tensorboard') if name in sys.modules]\n"
        "sys.exit(len(heavy))"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, check=False).returncode == 0


def test_the_module_runs_as_the_command(tmp_path):
    """``python -m relu_doctor`` is the command."""
    done = subprocess.run(
        [sys.executable, "-m", "relu_doctor", "scan", "nowhere.pt", "--model", MLP, "--data", DATA],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 2
    assert "nowhere.pt" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_reader_that_has_seen_enough_changes_no_exit_code(runs):
    """`relu-doctor scan … | head -1`: no complaint, and the gates are decided."""
    command = [sys.executable, "-m", "relu_doctor", "scan", runs["quietly_sick-mlp"][-1], "--model", MLP]
    command += ["--data", DATA, "--fail-over", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        said = process.stderr.read()
    assert process.returncode == 1
    assert said.startswith("gate failed")
    assert len(said.splitlines()) == 1


class TestTheUsersOwnCode:
    """What the model or the data print or do is theirs: it neither spoils the output nor decides the exit code."""

    @pytest.fixture
    def scan_own(self, run, tmp_path):
        def call(body: str, *arguments: object, data: str = "random:2") -> Result:
            (tmp_path / "own.py").write_text(f"import sys, torch\nfrom torch import nn\n\n\n{body}\n")
            torch.save(torch.nn.Linear(2, 4).state_dict(), tmp_path / "own.pt")
            spec = f"{tmp_path / 'own.py'}:Net"
            source = data.replace("own:", f"{tmp_path / 'own.py'}:")
            own = [str(argument).replace("own:", f"{tmp_path / 'own.py'}:") for argument in arguments]
            return run("scan", tmp_path / "own.pt", "--model", spec, "--data", source, *own)

        return call

    NET = (
        "class Net(nn.Linear):\n    def __init__(self):\n        super().__init__(2, 4)\n"
        "    def forward(self, x):\n        {}\n        return torch.relu(super().forward(x))\n"
    )

    @pytest.mark.parametrize("code", [0, 3])
    def test_exit_in_the_forward_is_no_exit_code(self, scan_own, code):
        sentence = one_sentence(scan_own(self.NET.format(f"sys.exit({code})"), "--fail-over-total", 0))
        assert "SystemExit" in sentence

    def test_a_rectifier_of_ones_own_is_named(self, scan_own):
        body = (
            "class Halves(nn.Module):\n    def forward(self, z):\n"
            "        return z * (torch.tanh(z * 1e4) + 1) / 2\n\n\n"
            "class Net(nn.Linear):\n    def __init__(self):\n        super().__init__(2, 4)\n"
            "        self.act = Halves()\n"
            "    def forward(self, x):\n        return self.act(super().forward(x))\n"
        )
        assert "act (Halves) looks like a rectifier" in one_sentence(scan_own(body))
        result = scan_own(body, "--rectifier", "own:Halves", "--format", "json")
        assert json.loads(result.out)["diagnoses"][0]["summary"]["num_units"] == 4
        assert "nn.Module classes" in one_sentence(scan_own(body, "--rectifier", "own:sys"))

    def test_prints_go_to_stderr(self, scan_own):
        result = scan_own(self.NET.format("print('hello')"), "--format", "json")
        assert json.loads(result.out)["schema_version"] == 1
        assert "hello" in result.err

    def test_data_that_raise_are_named(self, scan_own):
        body = self.NET.format("pass") + "\n\ndef rows():\n    yield torch.randn(4, 2)\n    raise OSError('no disc')\n"
        sentence = one_sentence(scan_own(body, data="own:rows"))
        assert "the data raised OSError at batch 1: no disc" in sentence

    def test_a_gate_that_compares_nothing_is_not_green(self, scan_own):
        body = self.NET.format("pass") + "\n\ndef rows():\n    return [torch.randn(1000, 2)]\n"
        result = scan_own(body, "--fail-over", 0.99, data="own:rows")
        assert result.code == 3
        assert "nothing was compared" in result.err


class TestBadInput:
    """Each gets one sentence, exit code 2, and nothing half-written."""

    @pytest.fixture
    def good(self, runs) -> Path:
        return runs["sound-mlp"][-1]

    def test_a_missing_file_is_named_with_the_closest_one(self, run, good):
        assert good.name in one_sentence(scan_mlp(run, good.with_name("sound-mlp-epoch21.pt")))

    def test_a_folder_without_checkpoints(self, run, tmp_path):
        assert "checkpoint" in one_sentence(scan_mlp(run, tmp_path))

    def test_a_truncated_file(self, run, good, tmp_path):
        cut = tmp_path / "cut.pt"
        cut.write_bytes(good.read_bytes()[:5000])
        assert "cut.pt" in one_sentence(scan_mlp(run, cut))

    def test_a_file_that_is_no_checkpoint(self, run, tmp_path):
        text = tmp_path / "notes.txt"
        text.write_text("hello")
        assert "notes.txt" in one_sentence(scan_mlp(run, text))

    def test_a_state_dict_of_another_model(self, run, runs):
        sentence = one_sentence(scan_mlp(run, runs["sound-cnn"][-1]))
        assert "linear1.weight" in sentence
        assert "conv1" in sentence

    @pytest.mark.parametrize(
        "spec", ["nowhere.at_all:make", "relu_doctor.demo.models:make_mpl", "os:getcwd", "nocolon"]
    )
    def test_a_factory_that_cannot_be_had(self, run, good, spec):
        assert "--model" in one_sentence(run("scan", good, "--model", spec, "--data", DATA))

    def test_a_factory_that_raises(self, run, good, tmp_path):
        (tmp_path / "net.py").write_text("def make():\n    raise RuntimeError('no weights here')\n")
        assert "no weights here" in one_sentence(
            run("scan", good, "--model", f"{tmp_path / 'net.py'}:make", "--data", DATA)
        )

    def test_data_of_the_wrong_shape_name_the_module(self, run, good, tmp_path):
        np.save(tmp_path / "x.npy", np.zeros((50, 7), dtype=np.float32))
        assert "linear1" in one_sentence(scan_mlp(run, good, data=tmp_path / "x.npy"))

    def test_data_of_the_wrong_dtype(self, run, good, tmp_path):
        np.save(tmp_path / "x.npy", np.zeros((50, 1, 8, 8), dtype=np.int64))
        assert "int64" in one_sentence(scan_mlp(run, good, data=tmp_path / "x.npy"))

    def test_an_empty_data_set(self, run, good, tmp_path):
        np.save(tmp_path / "x.npy", np.zeros((0, 1, 8, 8), dtype=np.float32))
        assert "empty" in one_sentence(scan_mlp(run, good, data=tmp_path / "x.npy"))

    def test_nan_in_the_data(self, run, good, tmp_path):
        rows = np.zeros((50, 1, 8, 8), dtype=np.float32)
        rows[17] = np.nan
        np.save(tmp_path / "x.npy", rows)
        sentence = one_sentence(scan_mlp(run, good, data=tmp_path / "x.npy"))
        assert "NaN" in sentence
        assert "17" in sentence

    def test_a_model_without_rectifiers(self, run, tmp_path):
        (tmp_path / "net.py").write_text("import torch\n\ndef make():\n    return torch.nn.Linear(2, 2)\n")
        torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "linear.pt")
        result = run("scan", tmp_path / "linear.pt", "--model", f"{tmp_path / 'net.py'}:make", "--data", "random:2")
        assert "no rectifier" in one_sentence(result)

    def test_an_output_path_that_cannot_be_written_is_refused_before_the_scan(self, run, good, tmp_path):
        result = scan_mlp(run, good, "--output", tmp_path / "missing" / "out.json")
        assert "--output" in one_sentence(result)

    def test_a_tensorboard_folder_that_cannot_be_written(self, run, good, tmp_path):
        (tmp_path / "file").write_text("")
        assert "--tensorboard" in one_sentence(scan_mlp(run, good, "--tensorboard", tmp_path / "file" / "tb"))

    def test_an_unknown_config_key_suggests_the_nearest(self, run, good, tmp_path):
        (tmp_path / "mine.toml").write_text("max_fireing_rate = 0.1\n")
        assert "max_firing_rate" in one_sentence(scan_mlp(run, good, "--config", tmp_path / "mine.toml"))

    def test_a_pickle_that_would_run_code_does_not_run(self, run, tmp_path):
        class Evil:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "ran"),)

        (tmp_path / "evil.pt").write_bytes(pickle.dumps({"state_dict": Evil()}))
        torch.save({"state_dict": Evil()}, tmp_path / "evil-zip.pt")
        for name in ("evil.pt", "evil-zip.pt"):
            one_sentence(scan_mlp(run, tmp_path / name))
        assert not (tmp_path / "ran").exists()

    @pytest.mark.parametrize("limit", ["0", "-5", "many", "1.5"])
    def test_a_wrong_number_of_inputs(self, run, good, limit):
        assert "--max-inputs" in one_sentence(scan_mlp(run, good, f"--max-inputs={limit}"))

    @pytest.mark.parametrize("device", ["cuda:77", "abacus"])
    def test_a_device_that_is_not_there(self, run, good, device):
        assert "--device" in one_sentence(scan_mlp(run, good, "--device", device))

    def test_missing_model_and_data_are_asked_for(self, run, good):
        assert "--model" in one_sentence(run("scan", good, "--data", DATA))
        assert "--data" in one_sentence(run("scan", good, "--model", MLP))

    def test_names_from_files_cannot_control_the_terminal(self, run, tmp_path):
        name = "\x1b[31mred[bold]x[/bold]"
        torch.save({name: torch.zeros(2)}, tmp_path / "odd.pt")
        result = scan_mlp(run, tmp_path / "odd.pt")
        assert "\x1b" not in result.err + result.out
        assert "[bold]" in one_sentence(result)
