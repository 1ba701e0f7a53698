"""The set-up that demo.py and test.py share: makes `.venv` in the checkout and installs the package into it.

Needs the standard library only, and parses on Python 3.8, so that an old interpreter gets a sentence and no traceback.
Everything said here goes to stderr: stdout belongs to what is run afterwards.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

MINIMUM_PYTHON = (3, 11)
FREE_BYTES_NEEDED = 3 * 1024**3
KEPT_LINES = 25  # of pip's output, shown when it fails

# What each extra brings along: a set-up made for `dev` serves the demo too.
EXTRAS_INCLUDED = {"demo": {"demo"}, "dev": {"dev", "demo"}}

# Settings of the caller's shell that would send pip or Python elsewhere than into the environment made here.
FOREIGN_SETTINGS = (
    "PYTHONHOME",
    "PYTHONPATH",
    "PYTHONSTARTUP",
    "__PYVENV_LAUNCHER__",
    "PIP_PREFIX",
    "PIP_REQUIRE_VIRTUALENV",
    "PIP_ROOT",
    "PIP_TARGET",
    "PIP_USER",
)

NO_NETWORK = re.compile(
    "NewConnectionError|ConnectTimeoutError|ReadTimeoutError|ProxyError|SSLError|NameResolutionError"
    "|Max retries exceeded|Temporary failure in name resolution|Name or service not known|Network is unreachable"
    "|getaddrinfo failed"
    "|Connection (?:refused|reset|timed out|aborted|broken)|Could not fetch URL|[Rr]ead timed out",
)
NO_DISK = re.compile(r"No space left on device|Errno 28|not enough space on the disk|WinError 112", re.IGNORECASE)


class SetupError(Exception):
    """The set-up cannot go on; the message is the one sentence that says why and what to do."""


def say(line: str) -> None:
    """Prints one line about what is being done."""
    print(line, file=sys.stderr, flush=True)


def check_python(version: tuple[int, ...] = tuple(sys.version_info[:3])) -> None:
    """Raises :class:`SetupError` when the running Python is older than the package needs."""
    if version < MINIMUM_PYTHON:
        found = ".".join(str(number) for number in version)
        needed = ".".join(str(number) for number in MINIMUM_PYTHON)
        raise SetupError(
            f"relu_doctor needs Python {needed} or newer and this is Python {found} ({sys.executable}): "
            f"run the same command with a newer one, for example `python{needed} {' '.join(sys.argv[:1])}`."
        )


def check_venv_module() -> None:
    """Raises :class:`SetupError` when this Python cannot make environments (Debian packs that separately)."""
    if importlib.util.find_spec("venv") is None or importlib.util.find_spec("ensurepip") is None:
        version = ".".join(str(number) for number in sys.version_info[:2])
        raise SetupError(
            "this Python cannot make virtual environments, its modules venv and ensurepip are not both there: "
            f"on Debian and Ubuntu run `sudo apt install python{version}-venv`, then this command again."
        )


def check_disk(directory: Path) -> None:
    """Raises :class:`SetupError` when `directory` lies on a disk that is too full for an installation of torch."""
    free = shutil.disk_usage(directory).free
    if free < FREE_BYTES_NEEDED:
        raise SetupError(
            f"the set-up needs about {FREE_BYTES_NEEDED / 1024**3:.0f} GB of free disk (more with a CUDA build of "
            f"torch) and {directory} has {free / 1024**3:.1f} GB left: free some space, then run this command again."
        )


def clean_environment() -> dict[str, str]:
    """The caller's environment variables without those that would lead pip or Python astray."""
    kept = {name: value for name, value in os.environ.items() if name not in FOREIGN_SETTINGS}
    return {**kept, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1", "PYTHONUTF8": "1"}


class Environment:
    """The virtual environment of one checkout, and the stamp that says what was installed into it.

    Args:
        root: the checkout, where pyproject.toml lies.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.path = root / ".venv"
        self.stamp_path = self.path / "relu-doctor-setup.json"

    def command(self, name: str) -> Path:
        """Where the environment keeps the command `name`."""
        return self.path / "Scripts" / f"{name}.exe" if os.name == "nt" else self.path / "bin" / name

    @property
    def python(self) -> Path:
        """The environment's interpreter."""
        return self.command("python")

    def version(self) -> str | None:
        """The environment's Python version, or ``None`` where there is none that works and is new enough."""
        if not (self.path / "pyvenv.cfg").is_file() or not self.python.exists():
            return None
        program = "import sys, pip; print(*sys.version_info[:3], sep='.')"
        try:
            answer = subprocess.run(
                [str(self.python), "-c", program],
                env=clean_environment(),
                capture_output=True,
                text=True,
                timeout=120,
                check=True,
            ).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return None
        numbers = tuple(int(number) for number in answer.split(".") if number.isdigit())
        return answer if numbers >= MINIMUM_PYTHON else None

    def fingerprint(self, version: str) -> str:
        """A hash of all that decides what gets installed; the package's own code is not part of it (editable)."""
        digest = hashlib.sha256()
        for part in (
            (self.root / "pyproject.toml").read_bytes(),
            (self.root / "scripts" / "constraints.txt").read_bytes(),
            version.encode(),
            str(self.root).encode(),
        ):
            digest.update(hashlib.sha256(part).digest())
        return digest.hexdigest()

    def is_current(self, extra: str, version: str) -> bool:
        """Whether the stamp says that `extra`, or one that includes it, was installed from these very files."""
        try:
            stamp = json.loads(self.stamp_path.read_text(encoding="utf-8"))
            installed = EXTRAS_INCLUDED[stamp["extra"]]
            return extra in installed and stamp["fingerprint"] == self.fingerprint(version)
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def write_stamp(self, extra: str, version: str) -> None:
        """Records a finished installation, in one step."""
        draft = self.stamp_path.with_suffix(".part")
        draft.write_text(json.dumps({"extra": extra, "fingerprint": self.fingerprint(version)}), encoding="utf-8")
        draft.replace(self.stamp_path)

    def remove_stamp(self) -> None:
        """Forgets the last installation, so that an interrupted one is never taken for finished."""
        if self.stamp_path.exists():
            self.stamp_path.unlink()

    def create(self) -> None:
        """Makes the environment anew, over whatever was left of an older one."""
        say(f"making the environment {self.path}")
        command = [sys.executable, "-m", "venv", "--clear", str(self.path)]
        made = subprocess.run(command, env=clean_environment(), capture_output=True, text=True, check=False)
        if made.returncode != 0:
            output = made.stdout + made.stderr
            say(last_lines(output))
            if NO_DISK.search(output):
                raise SetupError(f"the disk that holds {self.root} is full: free some space, then run this again.")
            raise SetupError(
                f"{self.path} could not be made (see above): remove it if it is there, then run this again."
            )

    def install(self, extra: str) -> None:
        """Installs the checkout, editable, with the pinned versions of all that `extra` needs."""
        command = [str(self.python), "-m", "pip", "install", "--progress-bar", "off"]
        command += ["-c", str(self.root / "scripts" / "constraints.txt"), "-e", f"{self.root}[{extra}]"]
        say("installing relu_doctor and what it needs (the first time takes some minutes, most of it for torch)")
        code, output = run_pip(command)
        if code != 0:
            say(last_lines(output))
            raise SetupError(install_failure(output))


def run_pip(command: list[str]) -> tuple[int, str]:
    """Runs pip, says only what it downloads, and returns its exit code and its whole output."""
    lines = []
    with subprocess.Popen(
        command,
        env=clean_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        encoding="utf-8",
        errors="replace",
    ) as process:
        assert process.stdout is not None  # asked for above
        for line in process.stdout:
            lines.append(line)
            if line.strip().startswith(("Downloading ", "Installing collected")):
                say("  " + shortened(line.strip()))
    return process.returncode, "".join(lines)


def shortened(line: str, width: int = 100) -> str:
    """`line` cut to `width` characters, with a mark where it was cut."""
    return line if len(line) <= width else line[: width - 3] + "..."


def last_lines(output: str) -> str:
    """The end of a program's output, where the reason stands."""
    return "\n".join(output.rstrip().splitlines()[-KEPT_LINES:])


def install_failure(output: str) -> str:
    """The sentence for an installation that failed, judged by what pip said."""
    if NO_DISK.search(output):
        return "the installation ran out of disk space: free some (about 3 GB are needed), then run this command again."
    if NO_NETWORK.search(output):
        return (
            "pip could not reach the package index (its last lines are above): "
            "check the network connection or the proxy settings, then run this command again."
        )
    return "pip could not install relu_doctor (its last lines are above): mend what they name, then run this again."


def set_up(root: Path, extra: str) -> Environment:
    """Brings the environment of the checkout `root` up to date for `extra`, doing only what is missing."""
    check_python()
    environment = Environment(root)
    version = environment.version()
    if version is not None and environment.is_current(extra, version):
        say(f"the environment {environment.path} is up to date")
        return environment
    if version is None or not environment.stamp_path.exists():
        check_disk(root)
    if version is None:
        check_venv_module()
        environment.create()
        version = environment.version()
        if version is None:
            raise SetupError(
                f"{environment.path} was made but its Python does not run: remove it, then run this again."
            )
    environment.remove_stamp()
    environment.install(extra)
    environment.write_stamp(extra, version)
    return environment


def run_stage(command: list[str], root: Path | None = None) -> int:
    """Runs one command with the terminal handed over to it and returns its exit code."""
    sys.stdout.flush()
    sys.stderr.flush()
    return subprocess.run(command, cwd=root, env=clean_environment(), check=False).returncode


def demo(arguments: list[str], root: Path) -> int:
    """Sets up and runs `relu-doctor demo` where the caller stands; returns its exit code."""
    environment = set_up(root, "demo")
    say("running relu-doctor demo")
    return run_stage([str(environment.command("relu-doctor")), "demo", *arguments])


def test(arguments: list[str], root: Path) -> int:
    """Sets up and runs lint, types and tests in the checkout; returns the exit code of the first that fails."""
    environment = set_up(root, "dev")
    stages = (
        ("lint", ["ruff", "check", "."]),
        ("format", ["ruff", "format", "--check", "."]),
        ("types", ["mypy"]),
        ("tests", ["pytest", *arguments]),
    )
    for name, stage in stages:
        say(f"{name}: {' '.join(stage)}")
        code = run_stage([str(environment.python), "-m", *stage], root)
        if code != 0:
            return code
    return 0


def main(task: str, arguments: list[str]) -> int:
    """Runs the task `demo` or `test`, and turns what can go wrong in the set-up into one sentence and exit code 1."""
    root = Path(__file__).resolve().parent.parent
    try:
        check_python()
        return {"demo": demo, "test": test}[task](arguments, root)
    except SetupError as error:
        say(f"error: {error}")
    except KeyboardInterrupt:
        say("stopped; run the same command again to go on")
        return 130
    except OSError as error:
        say(f"error: the set-up could not read or write what it needs: {error}.")
    return 1
