"""Neither the import nor a scan changes the process: no filter, no logger, no flag, no file, no thread but our own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

PROGRAM = textwrap.dedent(
    """
    import json, logging, os, signal, sys, threading, time, warnings
    import torch
    from torch import nn
    sys.path.insert(0, os.environ["TESTS"])
    from tests.left_as_it_was.fingerprint import of_process

    def state():
        found = of_process()
        found["loggers"] = sorted(
            (name, logger.level, len(logger.handlers)) for name, logger in logging.Logger.manager.loggerDict.items()
            if isinstance(logger, logging.Logger) and not name.startswith(("numba", "matplotlib"))
        )
        found["root logger"] = (logging.root.level, list(logging.root.handlers))
        found["environment"] = dict(os.environ)
        found["handlers"] = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        found["hooks"] = (sys.excepthook, threading.excepthook, sys.unraisablehook, sys.gettrace(), sys.getprofile())
        return found

    def changed(before, after):
        return [name for name in before if before[name] != after[name]]

    def run(size=500):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 600), nn.ReLU())
        return relu_doctor.scan(model, torch.randn(2 * size, 64).split(size)).units

    told = {"modules": []}
    before = state()
    import relu_doctor
    told["import"] = changed(before, state())
    torch.manual_seed(1)
    before = state()
    numbers = torch.get_rng_state()
    relu_doctor.scan
    units = run()
    torch.set_rng_state(numbers)
    told["scan"] = changed(before, state())
    told["compiler"] = "torch._dynamo" in sys.modules
    told["threads"] = [thread.name.partition("-")[0] for thread in threading.enumerate()]
    child = os.fork()
    if not child:
        torch.set_num_threads(1)  # torch's own threads are not in the child
        os._exit(0 if run().equals(units) else 1)
    told["child"] = os.waitpid(child, 0)[1]
    print(json.dumps(told))
    """
)


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a fresh process finds changed after the import, after a scan that loads the kernel, and in its child."""
    folder = tmp_path_factory.mktemp("here")
    home = Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM],
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=300,
        env={**os.environ, "TESTS": str(home), "OMP_NUM_THREADS": "2"},
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return {**json.loads(result.stdout.splitlines()[-1]), "files": [path.name for path in folder.iterdir()]}


def test_the_import_and_a_scan_change_nothing_in_the_process(told):
    """Random states, modes, flags of torch, threads, loggers, filters, signal handlers."""
    assert told["import"] == []
    assert told["scan"] == []


def test_a_scan_writes_no_file_and_loads_no_compiler(told):
    """Nothing lands in the working directory, and torch's compiler, which takes seconds to load, is not loaded."""
    assert told["files"] == []
    assert not told["compiler"]


def test_the_only_thread_left_is_the_kernels(told):
    """Its pool, which bears our name."""
    assert set(told["threads"]) <= {"MainThread", "relu_doctor"}


def test_a_forked_child_scans_like_its_parent(told):
    """The kernel's threads are not in the child: it makes its own."""
    assert told["child"] == 0
