"""Imports run one way, and each kind of dependency lives where it belongs; read from the source, never by importing."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import relu_doctor

PACKAGE = Path(relu_doctor.__file__).parent
LAYERS = (
    {"errors", "terms", "text", "thresholds", "numerals", "config"},
    {"observe"},
    {"diagnose"},
    {"checkpoints", "training", "trials", "reports", "scanner", "scanning"},
    {"integrations", "demo", "plot"},
    {"commands", "cli"},
    {"__init__", "__main__"},  # the doors: the public names, imported lazily, and `python -m relu_doctor`
)
RANK = {room: rank for rank, rooms in enumerate(LAYERS) for room in rooms}
# A result shows itself (print, notebooks) and a scan shows its progress: looked up when asked for, never before.
LATE = {("diagnose", "diagnosis"): {"reports"}}
# The folders and files of observe/, lowest first.
OBSERVE = (
    "inputs",
    "rectifiers",
    "statistics",
    "graph",
    "models",
    "sites",
    "forwards",
    "parameters",
    "assembling",
    "probe",
    "live",
    "instep",
    "parts",
    "gradients",
)
REGISTERS = {
    "observe/probe.py",
    "observe/live.py",
    "observe/instep.py",
    "observe/parts.py",
    "observe/gradients.py",
    *(f"observe/forwards/{name}.py" for name in ("dispatch", "paths", "watching")),
}
PRESENTATION = {"rich", "typer", "tensorboard"}


@dataclass(frozen=True)
class Import:
    """One import statement: from which file, of what, and whether it runs when the file is imported."""

    file: tuple[str, ...]
    line: int
    module: str
    late: bool
    for_types: bool

    @property
    def room(self) -> str:
        """Folder or file of the package that it is in."""
        return self.file[0]


def sources() -> Iterator[tuple[tuple[str, ...], ast.Module]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        yield parts, ast.parse(path.read_text())


def imports_in(file: tuple[str, ...], tree: ast.Module) -> Iterator[Import]:
    def walk(node: ast.AST, late: bool, for_types: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (Import(file, child.lineno, name.name, late, for_types) for name in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{file}: relative import"
                yield Import(file, child.lineno, child.module or "", late, for_types)
            inside = late or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            typing = for_types or (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test))
            yield from walk(child, inside, typing)

    yield from walk(tree, False, False)


ALL = [found for file, tree in sources() for found in imports_in(file, tree)]
OWN = [found for found in ALL if found.module.split(".")[0] == "relu_doctor" and found.module != "relu_doctor"]


def place(found: Import) -> str:
    return f"{'/'.join(found.file)}.py:{found.line} imports {found.module}"


def test_every_room_has_its_place():
    """Each file and folder of the package stands in one layer."""
    assert {file[0] for file, _ in sources()} <= set(RANK)


def test_imports_run_one_way():
    """A room imports from its own and lower layers only; a result shows itself by an import in the function."""
    wrong = []
    for found in OWN:
        target = found.module.split(".")[1]
        allowed = LATE.get(found.file, set()) if found.late else set()
        if RANK[target] > RANK[found.room] and not found.for_types and target not in allowed:
            wrong.append(place(found))
    assert wrong == []


def test_observe_is_read_from_the_bottom_up():
    """Inside observe/, a folder or file imports from those that are named before it."""
    rank = {name: position for position, name in enumerate(OBSERVE)}
    assert {file[1] for file, _ in sources() if file[0] == "observe"} - {"__init__"} <= set(rank)
    inner = [found for found in OWN if found.file[0] == "observe" and found.module.startswith("relu_doctor.observe.")]
    assert [place(found) for found in inner if rank[found.module.split(".")[2]] > rank[found.file[1]]] == []


def test_no_file_imports_itself_in_a_circle():
    """What runs at import time has no cycles."""
    graph: dict[str, set[str]] = {}
    for found in OWN:
        if not found.late and not found.for_types:
            graph.setdefault("relu_doctor." + ".".join(found.file), set()).add(found.module)
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        if module not in done:
            for target in graph.get(module, ()):
                visit(target, (*path, module))
            done.add(module)

    for module in list(graph):
        visit(module, ())


def test_reports_know_no_torch_hooks_and_observe_no_presentation():
    """Only reports/ and cli.py know Rich, Typer and TensorBoard."""
    wrong = [
        place(found)
        for found in ALL
        if (found.module.split(".")[0] in PRESENTATION or found.module.startswith("torch.utils.tensorboard"))
        and found.room not in {"reports", "commands", "cli"}
    ]
    assert wrong == []


def test_only_the_probe_registers_hooks():
    """Only the probes and their modes register on models, only observe/gradients.py on optimizers."""
    wrong = []
    for file, tree in sources():
        if f"{'/'.join(file)}.py" in REGISTERS:
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr.startswith("register_") and "hook" in node.attr:
                wrong.append(f"{'/'.join(file)}.py:{node.lineno} {node.attr}")
            if isinstance(node, ast.Name | ast.Attribute):
                name = node.id if isinstance(node, ast.Name) else node.attr
                if name in {"TorchFunctionMode", "TorchDispatchMode"}:
                    wrong.append(f"{'/'.join(file)}.py:{node.lineno} {name}")
    # The graph's own nodes, of a discovery's throw-away graph, are no part of any model.
    assert [
        place for place in wrong if not place.startswith("observe/graph/axes.py") or "register_prehook" not in place
    ] == []


def test_what_a_light_door_needs_needs_no_torch():
    """errors, terms, text, thresholds and config import neither torch nor pandas."""
    heavy = {"torch", "pandas", "numpy", "scipy"}
    assert [place(found) for found in ALL if found.room in LAYERS[0] and found.module.split(".")[0] in heavy] == []


@pytest.mark.parametrize(
    "statement", ["import relu_doctor", "import relu_doctor.cli", "from relu_doctor import Config"]
)
def test_importing_is_cheap(statement):
    """Neither the package, nor the command, nor the configuration import torch or pandas before they are needed."""
    code = f"import sys; {statement}; print(sorted({{'torch', 'pandas', 'tensorboard', 'scipy'}} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_public_names_are_all_there():
    """Every name of __all__ is had, and an unknown one is an AttributeError."""
    for name in relu_doctor.__all__:
        if name != "__version__":  # known once the package is installed
            assert getattr(relu_doctor, name) is not None
    assert dir(relu_doctor) == sorted(relu_doctor.__all__)
    with pytest.raises(AttributeError, match="nonsense"):
        relu_doctor.nonsense  # noqa: B018
