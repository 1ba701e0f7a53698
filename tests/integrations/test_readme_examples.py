"""The examples of the README's section on training run as they stand there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import relu_doctor
from tests.integrations.toys import QUIET

pytestmark = [pytest.mark.filterwarnings(each) for each in QUIET]
README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
SECTION = README.split("\n## In training\n")[1].split("\n## ")[0]
EXAMPLES = dict(
    zip(("plain", "lightning", "trainer", "dqn"), re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL), strict=True)
)
HISTORIES = {"plain": "exp1", "lightning": "lightning", "trainer": "trainer", "dqn": "dqn"}


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs_as_it_stands(name, tmp_path, monkeypatch, capsys):
    """In under 30 lines, from an empty folder; it prints a verdict, and its history can be read."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    assert len(EXAMPLES[name].splitlines()) < 30
    names = {"__name__": "example"}
    exec(compile(EXAMPLES[name], f"README.md, {name}", "exec"), names)
    monitor = names["monitor"] if name == "plain" else names["doctor"].monitor
    history = relu_doctor.History.read(f"runs/{HISTORIES[name]}")
    assert len(history.windows) == monitor.windows > 1
    assert "dead" in capsys.readouterr().out
