"""What a report that is shared may show of where it was made: no passwords, no tokens, nobody's home."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HIDDEN = "[redacted]"
_SPECS = frozenset({"--model", "--forward", "--rectifier", "--data"})  # named code: a file or module, and a name in it
_NAMES = frozenset({"site", "name", "site_id"})  # of sites: they are what the parts of a report find each other by
_SECRET = re.compile(
    r"passw|passphrase|pwd|secret|token|credential|cookie|bearer|signature|authorization|"
    r"(^|[-_.])(auth|sig|key|pass|pat|pin|salt|session)$|(api|access|private|account|ssh|encryption|sas)[-_.]?key",
    re.IGNORECASE,
)
_HARMLESS = re.compile(
    r"(max|min|num|n|per|pad|eos|bos|cls|mask|class|register|special|vocab)[-_.]?tokens?|tokeniz|"
    r"tokens?[-_.]?(per|size|count|dims?|embed|len|ids?|type|mix|pos|drop)",
    re.IGNORECASE,
)
_NO_SECRET = re.compile(r"\d{1,2}(\.\d*)?|true|false|none|null", re.IGNORECASE)  # whatever it is the value of
_PAIR = re.compile(r"""(?P<name>[\w.-]+)["']?\s*[=:]\s*""")
_NEXT = re.compile(r"""[;,&\s]+[{"']*[\w.-]+["']?\s*[=:]""")  # where the value before it ends
_SCHEME = re.compile(r"(?:bearer|basic)(?=\s|$)", re.IGNORECASE)
_BEARER = re.compile(r"\b(bearer|basic)\s+[\w.\-/+=]{6,}", re.IGNORECASE)
_HOMES = re.compile(
    r"(?<![\w.~-])(?:(?:/(?:mnt|export|var|usr|net|nfs))?/(?:home|Users)/[^/\s:=,'\"]+|"
    r"[A-Za-z]:[\\/]+Users[\\/]+[^\\/\s:=,'\"]+)"
)
_ROOT = re.compile(r"(?<![\w.~-])/root(?=[/\s]|$)")
_OF_SOMEBODY = re.compile(r"(?<![\w./~-])~[A-Za-z_][\w.-]*(?=/)")
_PREFIXES = re.compile(
    r"\b(?:(?:hf_|gh[pousr]_|github_pat_|glpat-|dckr_pat_|pk_live_|sk_live_|rk_live_|xox[abprs]-|AKIA|ASIA|AIza|ya29\.|eyJ)"
    r"[\w.\-/+=]{8,}|sk-(?:proj|ant|or|svcacct|admin)-[\w-]{12,}|sk-(?=[A-Za-z]*\d)[A-Za-z0-9]{16,}|"
    r"SG\.[\w-]{6,}\.[\w-]{6,})"
)
_HOOKS = re.compile(r"(?P<where>hooks\.slack\.com/\w+/|discord(?:app)?\.com/api/webhooks/)[^\s?#]+", re.IGNORECASE)
_LONG = re.compile(r"(?<![\w/.\-])(?=[\w+-]*\d)(?=[\w+-]*[A-Za-z])[A-Za-z0-9_+-]{32,}={0,2}(?![\w/.\-])")
_WITH_SLASHES = re.compile(  # as long as Amazon's secret keys
    r"(?<![\w/+.~-])(?=[a-zA-Z/+]*\d)(?=[a-z0-9/+]*[A-Z])(?=[A-Z0-9/+]*[a-z])[A-Za-z0-9/+]{40}(?![\w/+.-])"
)
_IN_URL = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*://)(?P<rest>[^\s\"'<>]*)", re.IGNORECASE)
_USER = re.compile(r"(?<![\w/@\]])[^\s/:@=;,&\[\]]+:[^\s/][^\s]*@(?=[\w.-])")


def redacted(command: str | Sequence[str]) -> str:
    """A command as a shell would read it, fit to be shared.

    The values of arguments whose names speak of secrets, what looks like a token, user and password and the query of an
    address are replaced; a home directory becomes ``~``.

    >>> redacted("relu-doctor scan /home/ann/net.pt --model-arg api_key=123 --token abc")
    'relu-doctor scan ~/net.pt --model-arg api_key=[redacted] --token [redacted]'
    """
    words = _split(command) if isinstance(command, str) else list(command)
    found: list[str] = []
    hide, option = False, ""
    for word in words:
        if hide and not word.startswith("--"):
            found.append(HIDDEN)
            hide = bool(_SCHEME.fullmatch(word))  # the secret itself comes behind it
            continue
        name, sign, value = word.partition("=")
        if option in _SPECS and not sign:
            found.append(redacted_text(word))
        elif name in _SPECS and sign and "=" not in value:
            found.append(f"{name}={redacted_text(value)}")
        else:
            found.append(_plain(word))
        option = word
        hide = bool(_SCHEME.fullmatch(word)) or (
            ((word.startswith("-") and not sign) or word.endswith(("=", ":"))) and _is_secret(word.rstrip("=:"))
        )
    return " ".join(_quoted(word) for word in found)


def redacted_text(text: str) -> str:
    """A text without what looks like a token, without user, password and query of addresses, homes being ``~``."""
    text = _USER.sub(f"{HIDDEN}@", _IN_URL.sub(_address, text))
    text = _PREFIXES.sub(HIDDEN, _HOOKS.sub(rf"\g<where>{HIDDEN}", text))
    return without_home(_BEARER.sub(rf"\1 {HIDDEN}", text))


def redacted_texts(value: Any) -> Any:
    """Plain values, as JSON has them, in which each text but the names of sites is fit to be shared."""
    if isinstance(value, str):
        return redacted_text(value)
    if isinstance(value, dict):
        return {name: each if name in _NAMES else redacted_texts(each) for name, each in value.items()}
    return [redacted_texts(each) for each in value] if isinstance(value, list | tuple) else value


def without_home(text: str) -> str:
    """A text in which home directories are ``~``."""
    return _OF_SOMEBODY.sub("~", _HOMES.sub("~", _ROOT.sub("~", _without_own(text))))


def _without_own(text: str) -> str:
    """Without the home directory of who runs this, wherever it lies."""
    try:
        home = Path.home()
    except RuntimeError:  # there is none
        return text
    if len(home.parts) < 2:
        return text
    return re.sub(rf"(?<![\w.~-]){re.escape(str(home))}(?![\w.-])", "~", text)


def _is_secret(name: str) -> bool:
    return bool(_SECRET.search(name)) and not _HARMLESS.search(name)


def _plain(word: str) -> str:
    """A word of a command; the names in it may be nested, as in ``--model-arg=options=user:ann,password:abc``."""
    word = _WITH_SLASHES.sub(HIDDEN, _LONG.sub(HIDDEN, redacted_text(word)))
    shown, place = "", 0
    while pair := _PAIR.search(word, place):
        shown += word[place : pair.end()]
        place = pair.end()
        if _is_secret(pair["name"]) and place < len(word):
            end = _NEXT.search(word, place)
            value = word[place : end.start() if end else len(word)]
            shown += value if _NO_SECRET.fullmatch(value) else HIDDEN
            place += len(value)
    return shown + word[place:]


def _address(found: re.Match[str]) -> str:
    """All before the last ``@`` is user and password where there are any: a password may have any character in it."""
    rest: str = found["rest"]
    who = ""
    if re.match(r"[^/?#]*[:@]", rest) and "@" in rest:
        who, rest = f"{HIDDEN}@", rest.rpartition("@")[2]
    rest = re.sub(r"\?[^#]*", f"?{HIDDEN}", rest)
    rest = re.sub(r"#.*=.*", f"#{HIDDEN}", rest)
    return f"{found['scheme']}{who}{rest}"


def _split(command: str) -> list[str]:
    try:
        return shlex.split(command)
    except ValueError:  # an open quotation
        return command.split()


def _quoted(word: str) -> str:
    """As a shell needs it, but for what was put in here, which is to be read."""
    return word if re.fullmatch(r"[\w@%+=:,./~\[\]-]+", word) else shlex.quote(word)
