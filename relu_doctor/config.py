"""Every threshold of a diagnosis, with its unit and its source, and the profiles that set them.

A profile is a TOML file. Those that come with the package (`default`, `strict`, `reinforcement-learning`,
`language-model`) load by name, any other by path. Letters at a source: [V] read in the source named, [D] derived,
[H] heuristic. Nothing here needs torch.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from relu_doctor.errors import ConfigError
from relu_doctor.thresholds import Threshold, threshold

Overrides = tuple[tuple[str, Any], ...]


@dataclass(frozen=True, slots=True)
class SiteConfig:
    """The thresholds that hold at one site, after the per-site overrides.

    Attributes:
        max_firing_rate: as in :class:`Config`.
        rare_firing_rate: as in :class:`Config`.
        dormancy_tau: as in :class:`Config`.
        ignore: leave the site out of the diagnosis.
        unit_axis: the axis of the pre-activation that numbers the units, where it cannot be found; ``None``: find it.
    """

    max_firing_rate: float
    rare_firing_rate: float
    dormancy_tau: float | None
    ignore: bool = False
    unit_axis: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The thresholds of a diagnosis.

    What each means, its unit, its source and its range stand beside the field and are had as data from
    :func:`thresholds`; ``configs/default.toml`` says the same to a person.

    Attributes:
        ignore_sites: glob patterns of site names to leave out of the diagnosis.
        sites: per-site overrides as ``((pattern, ((key, value), …)), …)``, most easily written as tables and read with
            :func:`load_config`. Keys are those of :class:`SiteConfig`. Where several patterns name a site, the longest
            wins, key by key.

    Raises:
        ConfigError: a value is of the wrong type, out of its range, or at odds with another.

    >>> load_config({"sites": {"head.*": {"max_firing_rate": 0.05}}}).for_site("head.relu").max_firing_rate
    0.05
    """

    confidence: float = threshold(
        0.95,
        meaning="how sure a verdict `dead` is, over all units of a scan together",
        unit="probability",
        source="convention; the bound is Clopper and Pearson's (1934), shared among m units after Bonferroni",
        low=0.5,
        high=1.0,
        high_open=True,
    )
    max_firing_rate: float = threshold(
        0.01,
        meaning="a silent unit is dead once the upper bound on its firing rate is at most this, else unproven",
        unit="fraction of inputs",
        source="[H]; 299 silent inputs settle it for one unit, 986 for a thousand units together [D]",
        low=0.0,
        high=1.0,
        low_open=True,
        high_open=True,
    )
    rare_firing_rate: float = threshold(
        0.01,
        meaning="a unit that fired, at a rate below this, is rare; 0: none is",
        unit="fraction of inputs",
        source="[H]; the line of max_firing_rate seen from above, so that 3 % is nothing to remark on",
        low=0.0,
        high=1.0,
        high_open=True,
    )
    dormancy_tau: float | None = threshold(
        None,
        meaning="a unit that fires is dormant when its mean absolute output is at most this share of its site's mean",
        unit="multiple of the mean over the site's units",
        source="Sokar et al. 2023, 'The dormant neuron phenomenon' [V]: 0.025 or 0.1; off, being a matter of its field",
        low=0.0,
        high=1.0,
        high_open=True,
        can_be_off=True,
    )
    constant_tolerance: float = threshold(
        1e-5,
        meaning="a unit's inputs do not vary when pre_max - pre_min is at most this share of max|z| (dead upstream)",
        unit="fraction of max|z|",
        source="[H]; some hundred roundings of float32",
        low=0.0,
        high=1.0,
        high_open=True,
    )
    normalization_z: float = threshold(
        3.2,
        meaning="behind a BatchNorm, beta/|gamma| below minus this holds a unit silent",
        unit="standard deviations of the normalised value",
        source="[D] half of such units are silent on 1,000 Gaussian values (3.8 on 10,000, 4.3 on 100,000)",
        low=0.0,
        low_open=True,
    )
    update_ratio_healthy: float = threshold(
        1e-3,
        meaning="the update-to-weight ratio that a sound training shows",
        unit="norm of an update / norm of the weight",
        source="CS231n course notes [H]: about 1e-3",
        low=0.0,
        low_open=True,
    )
    update_ratio_high: float = threshold(
        1e-2,
        meaning="an update-to-weight ratio over this is consistent with a learning rate that is too high",
        unit="norm of an update / norm of the weight",
        source="[H] ten times CS231n's; deaths of 30-44 % came with 0.05-0.07 (SGD) and 0.17 and more (Adam)",
        low=0.0,
        low_open=True,
    )
    mild_fraction: float = threshold(
        0.05,
        meaning="a model is healthy below this silent fraction, and mildly ill from it on",
        unit="fraction of units",
        source="[H] under about 5 % and not growing there is nothing to do",
        low=0.0,
        high=1.0,
        low_open=True,
    )
    serious_fraction: float = threshold(
        0.20,
        meaning="a model is seriously ill from this silent fraction on",
        unit="fraction of units",
        source="[H] the lower end of the often cited 20-50 %, for which no primary source was found",
        low=0.0,
        high=1.0,
        low_open=True,
    )
    critical_fraction: float = threshold(
        0.50,
        meaning="a model is critically ill from this silent fraction on",
        unit="fraction of units",
        source="[H] the upper end of the often cited 20-50 %",
        low=0.0,
        high=1.0,
        low_open=True,
    )
    settle_fraction: float = threshold(
        0.1,
        meaning="the last part of the inputs, in which few units should fire for the first time",
        unit="fraction of inputs",
        source="[H]",
        low=0.0,
        high=1.0,
        low_open=True,
        high_open=True,
    )
    settle_share: float = threshold(
        0.01,
        meaning="the sample had not settled when more than this share of the units fired first in that last part",
        unit="fraction of units",
        source="[H]; over 0.039 inputs in random order cannot explain it, whatever the units' firing rates [D]",
        low=0.0,
        high=1.0,
    )
    ignore_sites: tuple[str, ...] = ()
    sites: tuple[tuple[str, Overrides], ...] = ()

    def __post_init__(self) -> None:
        found = {item.name: getattr(self, item.name) for item in fields(self)}
        for name, value in _checked(found).items():
            object.__setattr__(self, name, value)
        self._check_order("update_ratio_healthy", "update_ratio_high")
        self._check_order("mild_fraction", "serious_fraction", "critical_fraction")

    def _check_order(self, *names: str) -> None:
        """Raises :class:`ConfigError` unless the values of `names` ascend."""
        values = [getattr(self, name) for name in names]
        if values != sorted(values):
            found = ", ".join(f"{value:g}" for value in values)
            raise ConfigError(f"{' <= '.join(names)} must hold, and they are {found}.")

    def for_site(self, name: str) -> SiteConfig:
        """The thresholds that hold at the site called `name`.

        Args:
            name: a site's readable name, such as ``layer1.0.relu#1``.
        """
        found = SiteConfig(
            max_firing_rate=self.max_firing_rate,
            rare_firing_rate=self.rare_firing_rate,
            dormancy_tau=self.dormancy_tau,
            ignore=any(fnmatchcase(name, pattern) for pattern in self.ignore_sites),
        )
        for pattern, overrides in self.sites:  # short to long: the longest comes last and wins
            if fnmatchcase(name, pattern):
                found = replace(found, **dict(overrides))
        return found

    def unmatched_patterns(self, names: Iterable[str]) -> tuple[str, ...]:
        """The patterns of `ignore_sites` and `sites` that match none of the site `names`: most likely misspelled."""
        names = tuple(names)
        patterns = dict.fromkeys((*self.ignore_sites, *(pattern for pattern, _ in self.sites)))
        return tuple(pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in names))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; :func:`load_config` takes them back to an equal configuration."""
        values: dict[str, Any] = {name: getattr(self, name) for name in thresholds()}
        values["ignore_sites"] = list(self.ignore_sites)
        values["sites"] = {pattern: dict(overrides) for pattern, overrides in self.sites}
        return values


def thresholds() -> dict[str, Threshold]:
    """What there is to know about each threshold of :class:`Config`, in order."""
    return {item.name: item.metadata["threshold"] for item in fields(Config) if "threshold" in item.metadata}


def profile_names() -> tuple[str, ...]:
    """The names of the profiles that come with the package."""
    files = (item.name for item in _profiles().iterdir())
    return tuple(sorted(name.removesuffix(".toml") for name in files if name.endswith(".toml")))


def load_config(source: Config | Mapping[str, Any] | str | os.PathLike[str] | None = None) -> Config:
    """Reads a configuration.

    Args:
        source: ``None`` for the defaults, a :class:`Config` as it is, a mapping with the keys of a profile, the name of
            a profile that comes with the package, or the path of a TOML file. Text that ends in ``.toml`` or holds a
            path separator is a path.

    Raises:
        ConfigError: the profile or file is missing or no TOML, a key is unknown, or a value is of the wrong type or
            out of its range. The message names the key and, for an unknown one, the nearest that is known.

    >>> load_config("strict").max_firing_rate < load_config().max_firing_rate
    True
    """
    if source is None:
        return Config()
    if isinstance(source, Config):
        return source
    if isinstance(source, Mapping):
        label, values = "config", _resolve(source, "config", Path(), ())
    elif isinstance(source, str | os.PathLike):
        path, label = _find(os.fspath(source), Path())
        values = _resolve(_read(path, label), label, _folder(path), (label,))
    else:
        raise ConfigError(
            f"a configuration must be a profile's name, a path, a mapping or a Config, and is {type(source).__name__}."
        )
    try:
        return Config(**values)
    except ConfigError as error:
        raise ConfigError(f"{label}: {error}") from error


def _profiles() -> Traversable:
    """The folder of the packed profiles: inside the package once installed, beside it in a checkout."""
    packed = resources.files("relu_doctor") / "configs"
    return packed if packed.is_dir() else Path(__file__).resolve().parent.parent / "configs"


def _find(source: str, folder: Path) -> tuple[Traversable, str]:
    """The file that `source`, a name or a path as seen from `folder`, stands for, and how messages call it."""
    names = profile_names()
    if source in names:
        return _profiles() / f"{source}.toml", f"profile {source!r}"
    path = folder / Path(source).expanduser()
    looks_like_path = source.endswith(".toml") or os.sep in source or "/" in source
    if looks_like_path or path.is_file():
        return path, repr(str(path))
    hint = _did_you_mean(source, names) or f"; the profiles are {', '.join(names)}"
    raise ConfigError(
        f"there is no profile {source!r}{hint} (a file of your own is given by a path that ends in .toml)."
    )


def _folder(path: Traversable) -> Path:
    """The folder that a relative `extends` starts from."""
    return path.parent if isinstance(path, Path) else Path()


def _read(path: Traversable, label: str) -> dict[str, Any]:
    """Parses one TOML file."""
    if isinstance(path, Path) and path.exists() and not path.is_file():
        raise ConfigError(
            f"the config file {label} cannot be read: it is no regular file; give a TOML file or a profile's name."
        )
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"the config file {label} does not exist; give a TOML file or a profile's name.") from error
    except OSError as error:
        raise ConfigError(f"the config file {label} cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"the config file {label} must be TOML in UTF-8, and is not text.") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"the config file {label} must be TOML, and is not: {error}.") from error


def _resolve(found: Mapping[str, Any], label: str, folder: Path, seen: tuple[str, ...]) -> dict[str, Any]:
    """Checks the values of one file and lays them over those of the profile that it extends."""
    values = dict(found)
    base = values.pop("extends", None)
    try:
        values = _checked(values)
    except ConfigError as error:
        raise ConfigError(f"{label}: {error}") from error
    if base is None:
        return values
    if not isinstance(base, str):
        raise ConfigError(f"{label}: extends must be a profile's name or a path, and is {base!r}.")
    path, base_label = _find(base, folder)
    if base_label in seen:
        raise ConfigError(f"{label}: extends leads in a circle, {' -> '.join((*seen, base_label))}.")
    below = _resolve(_read(path, base_label), base_label, _folder(path), (*seen, base_label))
    sites = {pattern: dict(overrides) for pattern, overrides in below.get("sites", ())}
    for pattern, overrides in values.get("sites", ()):
        sites[pattern] = {**sites.get(pattern, {}), **dict(overrides)}
    return {**below, **values, "sites": sites}


def _checked(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a :class:`Config` that `values` holds, in their canonical form.

    Raises:
        ConfigError: a key is unknown, or a value is of the wrong type or out of its range.
    """
    about = thresholds()
    _check_keys(values, (*about, "ignore_sites", "sites", "extends"))
    checked: dict[str, Any] = {key: about[key].check(key, value) for key, value in values.items() if key in about}
    if "ignore_sites" in values:
        checked["ignore_sites"] = _checked_patterns(values["ignore_sites"])
    if "sites" in values:
        checked["sites"] = _checked_sites(values["sites"])
    return checked


def _checked_patterns(patterns: object) -> tuple[str, ...]:
    """`ignore_sites` as a tuple of strings."""
    if not isinstance(patterns, list | tuple) or not all(isinstance(pattern, str) for pattern in patterns):
        raise ConfigError(f"ignore_sites must be a list of glob patterns, and is {patterns!r}.")
    return tuple(patterns)


def _checked_sites(sites: Any) -> tuple[tuple[str, Overrides], ...]:
    """The per-site overrides in their canonical order, short patterns first."""
    try:
        tables = {str(pattern): dict(overrides) for pattern, overrides in dict(sites).items()}
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f'sites must hold one table per pattern, such as [sites."layer1.*"], and is {sites!r}.'
        ) from error
    return tuple(
        (pattern, tuple(sorted(_checked_overrides(pattern, tables[pattern]).items())))
        for pattern in sorted(tables, key=lambda pattern: (len(pattern), pattern))
    )


def _checked_overrides(pattern: str, overrides: dict[str, Any]) -> dict[str, Any]:
    """The values that one pattern sets."""
    about = thresholds()
    checked: dict[str, Any] = {}
    try:
        _check_keys(overrides, tuple(item.name for item in fields(SiteConfig)))
        for key, value in overrides.items():
            if key == "ignore" and not isinstance(value, bool):
                raise ConfigError(f"ignore must be true or false, and is {value!r}.")
            if key == "unit_axis" and (isinstance(value, bool) or not isinstance(value, int)):
                raise ConfigError(f"unit_axis must be a whole number, and is {value!r}.")
            checked[key] = about[key].check(key, value) if key in about else value
    except ConfigError as error:
        raise ConfigError(f"[sites.{pattern!r}]: {error}") from error
    return checked


def _check_keys(values: Mapping[str, Any], known: tuple[str, ...]) -> None:
    """Raises :class:`ConfigError` at the first key that is not known."""
    for key in values:
        if key not in known:
            hint = _did_you_mean(str(key), known) or f"; the keys are {', '.join(sorted(known))}"
            raise ConfigError(f"unknown key {key!r}{hint}.")


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    """A suggestion to end a sentence with, or nothing where no known word is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; the nearest is {near[0]!r}" if near else ""
