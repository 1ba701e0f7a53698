"""The set-up behind `python scripts/demo.py` and `python scripts/test.py`, without any real installation."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import subprocess
import sys
import tomllib
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "scripts"
VERSION = "3.11.7"
GIGABYTE = 1024**3

Usage = namedtuple("Usage", "total used free")


def load_setup() -> Any:
    """The shared module, which is no part of any package."""
    spec = importlib.util.spec_from_file_location("relu_doctor_scripts_setup", SCRIPTS / "_setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


setup = load_setup()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with the two files that decide what is installed, and an environment made but empty."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "constraints.txt").write_text("torch==2.13.0\n")
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    (tmp_path / ".venv").mkdir()
    return tmp_path


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Takes the place of all that would make or install something; records what was asked for."""
    done: list[str] = []
    environment = setup.Environment

    def create(self: Any) -> None:
        done.append("create")
        self.path.mkdir()

    monkeypatch.setattr(environment, "version", lambda self: VERSION if self.path.exists() else None)
    monkeypatch.setattr(environment, "create", create)
    monkeypatch.setattr(environment, "install", lambda self, extra: done.append(f"install {extra}"))
    monkeypatch.setattr(setup, "check_disk", lambda _directory: done.append("check disk"))
    return done


@pytest.mark.parametrize("name", ["_setup.py", "demo.py", "test.py"])
def test_an_old_python_can_parse_the_scripts(name):
    ast.parse((SCRIPTS / name).read_text(encoding="utf-8"), feature_version=(3, 8))


@pytest.mark.parametrize("name", ["_setup.py", "demo.py", "test.py"])
def test_the_scripts_need_the_standard_library_only(name):
    tree = ast.parse((SCRIPTS / name).read_text(encoding="utf-8"))
    found = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    found |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert {str(module).split(".")[0] for module in found} <= {*sys.stdlib_module_names, "_setup"}


def test_an_old_python_gets_one_sentence(capsys, monkeypatch):
    check = setup.check_python
    monkeypatch.setattr(setup, "check_python", lambda: check((3, 9, 2)))
    assert setup.main("test", []) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: relu_doctor needs Python 3.11 or newer and this is Python 3.9.2 (")
    assert said.count("\n") == 1


def test_a_full_disk_gets_one_sentence_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(setup.shutil, "disk_usage", lambda _path: Usage(9 * GIGABYTE, 8 * GIGABYTE, GIGABYTE))
    with pytest.raises(setup.SetupError, match=r"needs about 3 GB of free disk .* has 1\.0 GB left"):
        setup.set_up(tmp_path, "demo")
    assert list(tmp_path.iterdir()) == []


def test_a_python_without_venv_gets_the_package_to_install(monkeypatch):
    monkeypatch.setattr(setup.importlib.util, "find_spec", lambda name: None if name == "ensurepip" else object())
    with pytest.raises(setup.SetupError, match=r"apt install python3\.\d+-venv"):
        setup.check_venv_module()


@pytest.mark.parametrize(
    ("output", "sentence"),
    [
        (
            "NewConnectionError(... [Errno -3] Temporary failure in name resolution')",
            "could not reach the package index",
        ),
        ("ERROR: Could not install packages: [Errno 28] No space left on device", "ran out of disk space"),
        ("error: metadata-generation-failed", "pip could not install relu_doctor"),
    ],
)
def test_a_failed_installation_says_why(output, sentence):
    assert sentence in setup.install_failure(output)


def test_a_failed_installation_shows_the_end_of_what_pip_said_and_leaves_no_stamp(checkout, capsys, monkeypatch):
    environment = setup.Environment(checkout)
    environment.write_stamp("demo", "an older one")
    monkeypatch.setattr(setup.Environment, "version", lambda _self: VERSION)
    output = "\n".join([*(f"line {number}" for number in range(99)), "ERROR: Max retries exceeded"])
    monkeypatch.setattr(setup, "run_pip", lambda _command: (1, output))
    with pytest.raises(setup.SetupError, match="could not reach the package index"):
        setup.set_up(checkout, "demo")
    said = capsys.readouterr().err
    assert "line 98\nERROR: Max retries exceeded" in said
    assert "line 10\n" not in said
    assert not environment.stamp_path.exists()


def test_an_interrupted_installation_leaves_no_stamp(checkout, steps, monkeypatch):
    def interrupt(_self: object, _extra: str) -> None:
        raise KeyboardInterrupt

    setup.set_up(checkout, "demo")
    monkeypatch.setattr(setup.Environment, "install", interrupt)
    with pytest.raises(KeyboardInterrupt):
        setup.set_up(checkout, "dev")
    assert not setup.Environment(checkout).stamp_path.exists()


def test_the_set_up_is_done_once(checkout, steps):
    for _ in range(3):
        setup.set_up(checkout, "demo")
    assert steps == ["check disk", "install demo"]


def test_a_missing_environment_is_made(checkout, steps):
    (checkout / ".venv").rmdir()
    setup.set_up(checkout, "dev")
    assert steps == ["check disk", "create", "install dev"]


def test_the_tests_bring_what_the_demo_needs_but_not_the_other_way_round(checkout, steps):
    setup.set_up(checkout, "demo")
    setup.set_up(checkout, "dev")
    setup.set_up(checkout, "demo")
    assert steps == ["check disk", "install demo", "install dev"]


@pytest.mark.parametrize("name", ["pyproject.toml", "scripts/constraints.txt"])
def test_a_changed_requirement_is_installed(checkout, steps, name):
    setup.set_up(checkout, "demo")
    (checkout / name).write_text("# changed\n")
    setup.set_up(checkout, "demo")
    assert steps.count("install demo") == 2


def test_another_python_in_the_environment_is_noticed(checkout):
    environment = setup.Environment(checkout)
    environment.write_stamp("demo", VERSION)
    assert environment.is_current("demo", VERSION)
    assert not environment.is_current("demo", "3.12.1")


@pytest.mark.parametrize("text", ["", "{", "[]", "3", json.dumps({"extra": "other", "fingerprint": ""}), "{}"])
def test_a_damaged_stamp_counts_for_nothing(checkout, text):
    environment = setup.Environment(checkout)
    environment.stamp_path.write_text(text)
    assert not environment.is_current("demo", VERSION)


def test_an_environment_without_a_working_python_counts_for_nothing(checkout):
    environment = setup.Environment(checkout)
    assert environment.version() is None
    (checkout / ".venv" / "pyvenv.cfg").write_text("")
    environment.python.parent.mkdir(parents=True)
    environment.python.write_text("not a program")
    assert environment.version() is None


def test_the_first_stage_that_fails_ends_the_run_with_its_exit_code(monkeypatch):
    ran: list[str] = []

    def stage(command: list[str], _root: Path) -> int:
        ran.append(command[2])
        return 5 if command[2] == "mypy" else 0

    monkeypatch.setattr(setup, "set_up", lambda root, _extra: setup.Environment(root))
    monkeypatch.setattr(setup, "run_stage", stage)
    assert setup.test([], ROOT) == 5
    assert ran == ["ruff", "ruff", "mypy"]


def test_pytest_comes_last_and_gets_the_arguments(monkeypatch):
    ran: list[list[str]] = []

    def stage(command: list[str], _root: Path) -> int:
        ran.append(command[2:])
        return 0

    monkeypatch.setattr(setup, "set_up", lambda root, _extra: setup.Environment(root))
    monkeypatch.setattr(setup, "run_stage", stage)
    assert setup.test(["-k", "config"], ROOT) == 0
    assert ran[-1] == ["pytest", "-k", "config"]


def test_settings_of_the_shell_that_lead_pip_astray_are_left_out(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    monkeypatch.setenv("PIP_TARGET", "/elsewhere")
    environment = setup.clean_environment()
    assert "PYTHONPATH" not in environment
    assert "PIP_TARGET" not in environment
    assert environment["PATH"] == os.environ["PATH"]
    assert environment["PIP_DISABLE_PIP_VERSION_CHECK"] == "1"


def test_the_constraints_pin_every_direct_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [
        *project["dependencies"],
        *(line for extra in project["optional-dependencies"].values() for line in extra),
    ]
    names = {line.split("[")[0].split(">")[0].split("=")[0].strip() for line in wanted} - {"relu-doctor"}
    pins = {line.split("==")[0] for line in (SCRIPTS / "constraints.txt").read_text().splitlines() if "==" in line}
    assert names <= pins


@pytest.mark.skipif(os.name == "nt", reason="a bash script")
def test_continuous_integration_calls_the_command_of_the_readme_in_a_fresh_environment(tmp_path):
    (tmp_path / ".ci").mkdir()
    (tmp_path / "scripts").mkdir()
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".ci" / "run").write_text((ROOT / ".ci" / "run").read_text())
    (tmp_path / "scripts" / "test.py").write_text(
        "import os, sys; print(os.getcwd(), sys.argv, os.path.exists('.venv')); sys.exit(7)"
    )
    answer = subprocess.run(["bash", str(tmp_path / ".ci" / "run")], capture_output=True, text=True, check=False)
    assert answer.stdout.strip() == f"{tmp_path} ['scripts/test.py'] False"
    assert answer.returncode == 7
