"""What a report that is shared may show of the command that made it: no passwords, no tokens, nobody's home."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

HIDDEN = "[redacted]"
_SECRET = re.compile(
    r"passw|passphrase|pwd|secret|token|credential|cookie|bearer|signature|(^|[-_.])(auth|sig|key|pat|pin|salt|session)$|"
    r"(api|access|private|account|ssh|encryption|sas)[-_.]?key",
    re.IGNORECASE,
)
_HARMLESS = re.compile(
    r"(max|min|num|n|per|pad|eos|bos|special|vocab)[-_.]?tokens?|tokens?[-_.]?(per|size|count)|tokeniz", re.IGNORECASE
)
_HOMES = re.compile(r"(?<![\w.~-])(?:/(?:home|Users)/[^/\s:=,'\"]+|[A-Za-z]:[\\/]+Users[\\/]+[^\\/\s:=,'\"]+)")
_ROOT = re.compile(r"(?<![\w.~-])/root(?=[/\s]|$)")
_PREFIXES = re.compile(
    r"\b(?:hf_|gh[pousr]_|github_pat_|glpat-|sk-|pk_live_|sk_live_|xox[abprs]-|AKIA|ASIA|AIza|ya29\.|eyJ)[\w.\-/+=]{8,}"
)
_LONG = re.compile(r"(?<![\w/.\-])(?=[\w+=-]*\d)(?=[\w+=-]*[A-Za-z])[A-Za-z0-9_+=-]{32,}(?![\w/.\-])")
_IN_URL = re.compile(
    r"(?P<scheme>[a-z][\w+.-]*://)(?:[^/\s@]+@)?(?P<rest>[^\s?#]*)(?P<query>\?[^\s#]*)?(?P<end>#\S*)?", re.IGNORECASE
)


def redacted(command: str | Sequence[str]) -> str:
    """A command as a shell would read it, fit to be shared.

    The values of arguments whose names speak of secrets, what looks like a token, user and password and the query of an
    address are replaced; a home directory becomes ``~``.

    >>> redacted("relu-doctor scan /home/ann/net.pt --model-arg api_key=123 --token abc")
    'relu-doctor scan ~/net.pt --model-arg api_key=[redacted] --token [redacted]'
    """
    words = _split(command) if isinstance(command, str) else list(command)
    found: list[str] = []
    hide = False
    for word in words:
        name, sign, value = word.partition("=")
        if "://" in name:  # the sign is a part of an address
            name, sign, value = word, "", ""
        if hide and not word.startswith("--"):
            found.append(HIDDEN)
            hide = False
            continue
        hide = False
        if sign and _is_secret(name):
            found.append(f"{_plain(name)}={HIDDEN}")
        elif not sign and word.startswith("-") and _is_secret(word):
            found.append(word)
            hide = True
        elif ":" in word and "/" not in word and "\\" not in word and _is_secret(word.split(":", 1)[0]):
            found.append(f"{word.split(':', 1)[0]}:{HIDDEN}")
        else:
            found.append(_plain(name) + sign + _plain(value))
    return " ".join(_quoted(word) for word in found)


def without_home(text: str) -> str:
    """A text in which home directories are ``~``."""
    return _HOMES.sub("~", _ROOT.sub("~", text))


def _is_secret(name: str) -> bool:
    return bool(_SECRET.search(name)) and not _HARMLESS.search(name)


def _plain(text: str) -> str:
    text = _IN_URL.sub(_address, text)
    text = _PREFIXES.sub(HIDDEN, text)
    text = _LONG.sub(HIDDEN, text)
    return without_home(text)


def _address(found: re.Match[str]) -> str:
    who = f"{HIDDEN}@" if "@" in found.group(0)[len(found["scheme"]) :].split("/", 1)[0] else ""
    query = f"?{HIDDEN}" if found["query"] else ""
    return f"{found['scheme']}{who}{found['rest']}{query}{found['end'] or ''}"


def _split(command: str) -> list[str]:
    try:
        return shlex.split(command)
    except ValueError:  # an open quotation
        return command.split()


def _quoted(word: str) -> str:
    """As a shell needs it, but for what was put in here, which is to be read."""
    return word if re.fullmatch(r"[\w@%+=:,./~\[\]-]+", word) else shlex.quote(word)
