"""Event files: whole records, whatever the disk does; a run neither waits for it nor ends for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relu_doctor.errors import OutputError
from relu_doctor.reports.tensorboard import TensorBoardSink, files
from tests.builders import make_diagnosis, site
from tests.reports.events import events_of, points
from tests.training.made import PERIOD, window_of

# A run of windows in a directory whose disk fills up; prints what was told, how long the close took and what was read.
RUN = """
import json, resource, sys, time, warnings
import torch
from torch import nn
import relu_doctor
from relu_doctor.errors import DyingUnitsWarning

folder, limit = sys.argv[1], int(sys.argv[2])
model = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 4))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
warnings.simplefilter("ignore", DyingUnitsWarning)
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    warnings.simplefilter("ignore", DyingUnitsWarning)
    monitor = relu_doctor.Monitor(model, optimizer=optimizer, every=2, window=4, sinks=f"tensorboard:{folder}")
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    for step in range(60):
        model(torch.randn(16, 64)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        monitor.step()
        if limit and step == 47:
            time.sleep(0.2)  # what waits is refused before there is room again
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    begin = time.perf_counter()
    monitor.close()
    took = time.perf_counter() - begin
print(json.dumps({"told": [str(each.message) for each in told], "windows": monitor.windows, "close": took}))
"""


def run(folder: Path, limit: int = 0) -> dict[str, object]:
    result = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-c", RUN, str(folder), str(limit)],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return json.loads(result.stdout)


@given(st.binary(max_size=700), st.integers(0, 3))
def test_checksums_are_tensorboards(text, longer):
    """Of texts of any length."""
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c as theirs

    text = text * (1 + 7 * longer)
    assert files.masked_crc32c(text) == theirs(text)


def test_a_file_that_may_grow_no_further(tmp_path):
    """One warning; the run goes on, and once there is room later windows are written; the file is read to its end."""
    told = run(tmp_path, 60_000)
    assert told["windows"] == 15
    assert len(told["told"]) == 1
    assert "cannot write TensorBoard events" in told["told"][0]
    assert told["close"] < 10
    steps = [step for step, _ in points(events_of(tmp_path), "relu_doctor/dead_fraction")]
    assert steps[0] == 4
    assert steps[-3:] == [52, 56, 60]
    assert 3 < len(steps) < 15


def cannot(write, *what):
    """Why something cannot be written; ``None`` where it can."""
    try:
        write(*what)
    except OutputError as error:
        return str(error).partition("': ")[2].partition(";")[0]
    return None


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 256 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if os.name != "posix" or os.getuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(small_disk):
    """One warning for the whole run, the close included; what had room is read to its end."""
    (small_disk / "filler").write_bytes(bytes(160_000))
    told = run(small_disk)
    assert told["windows"] == 15
    assert [("No space left on device" in each) for each in told["told"]] == [True]
    assert told["close"] < 10
    assert points(events_of(small_disk), "relu_doctor/dead_fraction")[0][0] == 4


def test_a_scan_says_that_the_disk_is_full(small_disk):
    """At once, where there is nothing else to do than to write."""
    (small_disk / "filler").write_bytes(bytes(200_000))
    diagnosis = make_diagnosis(*(site(f"s{i}", active=500) for i in range(8)))
    noisy = diagnosis.units["pre_max"].to_numpy(copy=True)
    noisy += np.random.default_rng(0).normal(size=len(noisy))
    diagnosis.units["pre_max"] = noisy
    sink = TensorBoardSink(small_disk)
    told = [step for step in range(20) if cannot(sink.write, diagnosis, step) == "No space left on device"]
    assert 0 < told[0] < 20
    with pytest.raises(OutputError, match="No space left"):
        sink.close()


def test_a_disk_that_hangs_is_not_waited_for(tmp_path, monkeypatch):
    """Windows are taken all the same, up to a limit of memory; the close gives up after a while and says so."""
    monkeypatch.setattr(files, "_PATIENCE", 0.2)
    monkeypatch.setattr(files, "_MOST_PENDING", 50_000)
    sink = TensorBoardSink(tmp_path)
    reading, writing = os.pipe()  # whose reader does not read
    os.dup2(writing, sink._events._file)
    os.close(writing)
    diagnosis = make_diagnosis(site("a", active=2000))
    begin = time.perf_counter()
    told = [cannot(sink, window_of(diagnosis, index)) for index in range(200)]
    assert told[0] is None
    assert told[-1] == "the disk does not take them as fast as they come"
    assert sink._events._weight <= 50_000
    thread = sink._events._thread
    sink.close()  # which was told
    assert time.perf_counter() - begin < 60
    os.close(reading)
    thread.join(10)
    assert not thread.is_alive()


def test_what_could_not_be_written_in_the_end_is_told_at_the_close(tmp_path):
    """Nobody was told before."""
    sink = TensorBoardSink(tmp_path)
    reading, writing = os.pipe()
    os.dup2(writing, sink._events._file)
    os.close(writing)
    os.close(reading)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sink(window_of(make_diagnosis(site("a", active=5))))
        time.sleep(0.2)
        with pytest.raises(OutputError, match="Broken pipe"):
            sink.close()


def test_a_killed_run_leaves_what_it_wrote(tmp_path):
    """Each window is in the file as soon as the thread has had its turn, without a flush or a close."""
    sink = TensorBoardSink(tmp_path)
    sink(window_of(make_diagnosis(site("a", active=5))))
    sink._events.settle()
    assert points(events_of(tmp_path), "relu_doctor/dead_fraction") == [(PERIOD - 1, 0)]
    sink.close()
