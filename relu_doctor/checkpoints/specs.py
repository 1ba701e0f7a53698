"""``package.module:name`` and ``path/to/file.py:name``: finding what a user names on the command line."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import inspect
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

from relu_doctor.errors import ModelSpecError
from relu_doctor.text import clean_text, closest_name, name_some

_FORM = "Give it as package.module:name or path/to/file.py:name"


def resolve(spec: str, *, what: str) -> object:
    """The object that a spec names.

    Args:
        spec: ``"package.module:attr.sub"`` or ``"path/to/net.py:make_net"``. The current directory is importable, and
            so is the directory of a named file while it is imported. The same file gives the same module every time.
        what: the option that it comes from, for messages (``"--model"``).

    Raises:
        ModelSpecError: the module cannot be imported, or has no such attribute.
    """
    place, colon, attribute = spec.rpartition(":")
    shown = f"{what} '{clean_text(spec)}'"
    if not colon or not place or not attribute or not all(part.isidentifier() for part in attribute.split(".")):
        raise ModelSpecError(f"{shown} is not of the form expected. {_FORM}.")
    with importable(spec):
        module = _import_file(Path(place), shown) if is_file_spec(spec) else _import_module(place, shown)
    found: object = module
    for part in attribute.split("."):
        try:
            found = getattr(found, part)
        except Exception:  # noqa: BLE001  # a module or class may compute its attributes
            names = [name for name in dir(found) if not name.startswith("_")]
            near = closest_name(part, names)
            hint = (
                f"Did you mean '{clean_text(near)}'?"
                if near
                else f"It has {name_some(_own(found, names), 8) or 'none'}."
            )
            owner = clean_text(place if found is module else f"{place}:{attribute}")
            raise ModelSpecError(f"{shown}: '{owner}' has no attribute '{clean_text(part)}'. {hint}") from None
    return found


def is_file_spec(spec: str) -> bool:
    """Whether a spec names a file, rather than a module."""
    place = spec.rpartition(":")[0]
    return place.endswith(".py") or "/" in place or "\\" in place


@contextlib.contextmanager
def importable(spec: str) -> Iterator[None]:
    """Make the current directory importable, and before it the directory of the file that ``spec`` names, if any."""
    wanted = [str(Path.cwd())]
    if is_file_spec(spec):
        wanted.insert(0, str(Path(spec.rpartition(":")[0]).absolute().parent))
    added = [directory for directory in dict.fromkeys(wanted) if directory not in sys.path]
    sys.path[:0] = added
    importlib.invalidate_caches()  # files may be younger than the last look
    try:
        yield
    finally:
        for directory in added:
            with contextlib.suppress(ValueError):
                sys.path.remove(directory)


def call(target: Callable[..., object], arguments: dict[str, object], *, shown: str, option: str) -> object:
    """Call what a user named, with the arguments that he gave.

    Args:
        target: what to call.
        arguments: keyword arguments.
        shown: how messages call the target (``"--model 'net:Net'"``).
        option: the option that gives an argument (``"--model-arg"``), or ``""`` when there is none.

    Raises:
        ModelSpecError: the arguments do not fit the signature, or the call raised.
    """
    _check_signature(target, arguments, shown, option)
    try:
        return target(**arguments)
    except (Exception, SystemExit) as error:
        raise ModelSpecError(f"{shown} raised {_describe(error)}") from error


def _check_signature(target: Callable[..., object], arguments: dict[str, object], shown: str, option: str) -> None:
    try:
        signature = inspect.signature(target)
    except (ValueError, TypeError):
        return  # some builtins have none; the call itself will tell
    try:
        signature.bind(**arguments)
    except TypeError:
        parameters = signature.parameters.values()
        named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        unknown = [name for name in arguments if name not in named]
        if unknown:
            near = closest_name(unknown[0], named)
            accepted = f"it takes {name_some(named, 8)}" if named else "it takes no arguments"
            hint = f"did you mean '{near}'?" if near else accepted
            raise ModelSpecError(f"{shown} takes no argument '{clean_text(unknown[0])}': {hint}.") from None
        missing = [
            p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
        ]
        missing = [name for name in missing if name not in arguments]
        way_on = f"give {option} {missing[0]}=…" if option and missing else "name a callable that needs no arguments"
        raise ModelSpecError(f"{shown} needs arguments that were not given: {name_some(missing)}; {way_on}.") from None


def _own(owner: object, names: list[str]) -> list[str]:
    """The names that were defined there, without what was imported; all when there are none."""
    here = getattr(owner, "__name__", None)
    defined = [name for name in names if getattr(getattr(owner, name, None), "__module__", None) == here]
    return defined or names


def _import_module(name: str, shown: str) -> types.ModuleType:
    if not all(part.isidentifier() for part in name.split(".")):
        raise ModelSpecError(f"{shown}: '{clean_text(name)}' is no module name. {_FORM}.")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        absent = error.name or ""
        if absent and (name == absent or name.startswith(f"{absent}.")):
            raise ModelSpecError(
                f"{shown}: there is no module '{clean_text(absent)}', neither installed nor in the current directory. "
                f"{_FORM}."
            ) from error
        raise ModelSpecError(_inner_import(shown, clean_text(name), error)) from error
    except (Exception, SystemExit) as error:
        raise ModelSpecError(f"{shown}: importing '{clean_text(name)}' raised {_describe(error)}") from error


def _import_file(path: Path, shown: str) -> types.ModuleType:
    if not path.is_file():
        siblings = [entry.name for entry in path.parent.glob("*.py")] if path.parent.is_dir() else []
        near = closest_name(path.name, siblings)
        hint = f" Did you mean '{clean_text(near)}'?" if near else ""
        raise ModelSpecError(f"{shown}: there is no file '{clean_text(path)}'.{hint}")
    real = path.resolve()
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        if not isinstance(file, str) or not file.endswith(real.name) or module.__name__ == "__main__":
            continue
        if Path(file).resolve() == real:
            return module
    name = f"{real.stem}_{hashlib.sha256(str(real).encode('utf-8', 'surrogateescape')).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, real)
    if spec is None or spec.loader is None:
        raise ModelSpecError(f"{shown}: '{clean_text(path)}' is no Python file. {_FORM}.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        sys.modules.pop(name, None)
        if isinstance(error, ModuleNotFoundError):
            raise ModelSpecError(_inner_import(shown, clean_text(path), error)) from error
        if isinstance(error, Exception | SystemExit):
            raise ModelSpecError(f"{shown}: importing '{clean_text(path)}' raised {_describe(error)}") from error
        raise
    return module


def _inner_import(shown: str, place: str, error: ModuleNotFoundError) -> str:
    absent = clean_text(error.name or error)
    return f"{shown}: '{place}' imports '{absent}', which is not installed here; install it first."


def _describe(error: BaseException) -> str:
    """An exception's type and message, and its line for a syntax error, as the end of a sentence."""
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__} in line {error.lineno}: {clean_text(error.msg)}."
    message = clean_text(error)
    if isinstance(error, ImportError) and "relative import" in message:
        return f"{type(error).__name__}: the file is part of a package; name it as package.module:name instead."
    return (
        f"{type(error).__name__}: {message}" + ("" if message.endswith(".") else ".")
        if message
        else f"{type(error).__name__}."
    )
