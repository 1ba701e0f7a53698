"""Thresholds, profiles, and what a person is told who misspells one."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from relu_doctor.config import Config, load_config, profile_names, thresholds
from relu_doctor.errors import ConfigError

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
DEFAULT = (CONFIGS / "default.toml").read_text(encoding="utf-8")


def write(directory: Path, text: str, name: str = "mine.toml") -> Path:
    path = directory / name
    path.write_text(text, encoding="utf-8")
    return path


def test_the_default_profile_and_the_dataclass_hold_the_same_values():
    assert load_config("default") == Config() == load_config()
    assert set(tomllib.loads(DEFAULT)) == set(Config().to_dict())


@pytest.mark.parametrize("name", [*thresholds(), "ignore_sites"])
def test_the_default_profile_documents_each_key_with_unit_and_source(name):
    above = re.search(rf"((?:^#.*\n)+){name} = ", DEFAULT, re.MULTILINE)
    assert above is not None
    assert "# Unit: " in above[1]
    assert "# Source: " in above[1]


@pytest.mark.parametrize(("name", "threshold"), thresholds().items())
def test_each_threshold_says_what_it_decides_in_which_unit_and_whence(name, threshold):
    assert threshold.meaning
    assert threshold.unit
    assert threshold.source
    assert threshold.check(name, getattr(Config(), name)) == getattr(Config(), name)


def test_the_packed_profiles_are_the_files_of_the_configs_folder():
    assert profile_names() == ("default", "language-model", "reinforcement-learning", "strict")
    assert set(profile_names()) == {path.stem for path in CONFIGS.glob("*.toml")}


@pytest.mark.parametrize("name", ["default", "strict", "reinforcement-learning", "language-model"])
def test_a_configuration_survives_json_with_sorted_keys(name):
    config = load_config({"extends": name, "sites": {"b*": {"unit_axis": -1}, "a": {"dormancy_tau": 0.1}}})
    assert load_config(json.loads(json.dumps(config.to_dict(), sort_keys=True))) == config


def test_the_profiles_differ_from_the_default_where_they_say():
    assert load_config("reinforcement-learning").dormancy_tau == 0.025
    assert load_config("strict").max_firing_rate == 0.001
    assert load_config("strict").confidence == 0.99
    assert load_config("language-model").rare_firing_rate == 0.001


def test_a_configuration_passes_through_unchanged():
    config = Config(confidence=0.9)
    assert load_config(config) is config


def test_whole_numbers_are_taken_for_fractions():
    assert Config(rare_firing_rate=0).rare_firing_rate == 0.0
    assert isinstance(Config(rare_firing_rate=0).rare_firing_rate, float)


def test_a_path_works_and_lays_its_keys_over_the_profile_that_it_extends(tmp_path):
    path = write(tmp_path, 'extends = "strict"\nmax_firing_rate = 0.02\n')
    assert load_config(path) == replace(load_config("strict"), max_firing_rate=0.02)
    assert load_config(str(path)) == load_config(path)


def test_a_relative_extends_starts_from_the_file_that_says_it(tmp_path):
    write(tmp_path, 'confidence = 0.9\n[sites."a*"]\nignore = true\nunit_axis = 1\n', "base.toml")
    path = write(tmp_path, 'extends = "base.toml"\n[sites."a*"]\nignore = false\n')
    site = load_config(path).for_site("a1")
    assert load_config(path).confidence == 0.9
    assert (site.ignore, site.unit_axis) == (False, 1)


def test_a_file_switches_dormancy_off_again(tmp_path):
    path = write(tmp_path, 'extends = "reinforcement-learning"\ndormancy_tau = "off"\n')
    assert load_config(path).dormancy_tau is None


def test_a_site_has_the_thresholds_of_the_longest_pattern_that_names_it():
    config = load_config(
        {
            "max_firing_rate": 0.02,
            "ignore_sites": ["head.*"],
            "sites": {"*": {"rare_firing_rate": 0.5, "unit_axis": 2}, "layer1.*": {"rare_firing_rate": 0.1}},
        }
    )
    assert config.for_site("layer1.0.relu#1").rare_firing_rate == 0.1
    assert config.for_site("layer1.0.relu#1").unit_axis == 2
    assert config.for_site("layer2.relu").rare_firing_rate == 0.5
    assert config.for_site("layer2.relu").max_firing_rate == 0.02
    assert config.for_site("head.relu").ignore
    assert not config.for_site("layer2.relu").ignore


def test_an_override_keeps_a_site_that_a_wider_pattern_leaves_out():
    config = load_config({"ignore_sites": ["head.*"], "sites": {"head.relu2": {"ignore": False}}})
    assert [config.for_site(f"head.relu{number}").ignore for number in (1, 2)] == [True, False]


def test_patterns_that_name_no_site_are_told():
    config = load_config({"ignore_sites": ["haed.*", "head.*"], "sites": {"layer9.*": {"ignore": True}}})
    assert config.unmatched_patterns(["head.relu", "layer1.relu"]) == ("haed.*", "layer9.*")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_fireing_rate = 0.1", "unknown key 'max_fireing_rate'; the nearest is 'max_firing_rate'."),
        ("qwertz = 1", "unknown key 'qwertz'; the keys are confidence, "),
        ('[sites."a"]\ndormancy = 1', "[sites.'a']: unknown key 'dormancy'; the nearest is 'dormancy_tau'."),
        ('[sites."a"]\nconfidence = 0.9', "[sites.'a']: unknown key 'confidence'; the keys are "),
        ('[sites."a"]\nignore = 1', "[sites.'a']: ignore must be true or false, and is 1."),
        ('[sites."a"]\nunit_axis = true', "[sites.'a']: unit_axis must be a whole number, and is True."),
        (
            '[sites."a"]\nmax_firing_rate = 7',
            "max_firing_rate must be above 0 and below 1 (fraction of inputs), and is 7.",
        ),
        ("sites = 3", "sites must hold one table per pattern"),
        ("confidence = 1", "confidence must be at least 0.5 and below 1 (probability), and is 1."),
        ("confidence = nan", "and is nan."),
        ("normalization_z = inf", "normalization_z must be above 0 (standard deviations of the normalised value)"),
        ("confidence = true", "confidence must be a number, at least 0.5 and below 1, and is True."),
        ('confidence = "high"', "confidence must be a number, at least 0.5 and below 1, and is 'high'."),
        ('dormancy_tau = "on"', "dormancy_tau must be a number, at least 0 and below 1, or \"off\", and is 'on'."),
        ('ignore_sites = "head"', "ignore_sites must be a list of glob patterns, and is 'head'."),
        (
            "mild_fraction = 0.3",
            "mild_fraction <= serious_fraction <= critical_fraction must hold, and they are 0.3, 0.2",
        ),
        ("update_ratio_high = 1e-5", "update_ratio_healthy <= update_ratio_high must hold"),
        ("extends = 3", "extends must be a profile's name or a path, and is 3."),
        ('extends = "strikt"', "there is no profile 'strikt'; the nearest is 'strict'"),
        ('extends = "mine.toml"', "extends leads in a circle"),
        ("confidence 0.9", "must be TOML, and is not: "),
        ('"a\\u001b[2Jb" = 1', r"unknown key 'a\x1b[2Jb'"),
    ],
)
def test_a_wrong_file_is_refused_with_the_key_and_the_way_on(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)


def test_a_message_names_the_file(tmp_path):
    path = write(tmp_path, "confidence = 2")
    with pytest.raises(ConfigError, match=re.escape(repr(str(path)))):
        load_config(path)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("strikt", "there is no profile 'strikt'; the nearest is 'strict'"),
        ("zzz", "there is no profile 'zzz'; the profiles are default, language-model, "),
        ("nowhere.toml", "the config file 'nowhere.toml' does not exist"),
        (3, "must be a profile's name, a path, a mapping or a Config, and is int."),
        ({"confidence": 2}, "config: confidence must be at least 0.5"),
    ],
)
def test_a_source_that_is_none_is_refused(tmp_path, monkeypatch, source, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        load_config(source)
    assert message in str(caught.value)


def test_a_folder_and_a_file_that_is_no_text_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path)
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is not text"):
        load_config(tmp_path / "binary.toml")


def test_a_configuration_made_by_hand_is_checked_too():
    with pytest.raises(ConfigError, match="max_firing_rate must be above 0"):
        Config(max_firing_rate=0)


def test_a_unit_that_fires_on_three_percent_of_the_inputs_is_not_rare():
    assert Config().rare_firing_rate < 0.03


def test_reading_a_profile_does_not_import_torch():
    program = (
        "import sys; from relu_doctor.config import load_config; load_config('strict'); print('torch' in sys.modules)"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "False"
