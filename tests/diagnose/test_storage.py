"""A saved diagnosis is the diagnosis: the same after loading, the same bytes for the same scan, and never half-read."""

from __future__ import annotations

import json
import random
from contextlib import suppress

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import relu_doctor
from relu_doctor.diagnose import storage
from relu_doctor.diagnose.origins import LearningRateEvidence
from relu_doctor.diagnose.storage import JSON_LIMIT, SCHEMA_VERSION
from relu_doctor.errors import DiagnosisFormatError, OutputError
from tests.builders import make_diagnosis, site
from tests.zoo import CASES

ALL_KINDS = {
    "active": 3, "rare": 1, "negative_bias": 2, "input_offset": 1, "zero_weights": 1, "constant": 1, "non_finite": 1,
    "unobserved": 1, "unknown": 1, "saturated": 1,
}  # fmt: skip


def sample():
    history = LearningRateEvidence(
        learning_rates=(0.1, 0.01),
        optimizer="Adam-like",
        last_update={"id-a": np.array([np.nan, 0.5] * 6 + [0.1])},
        between={"id-a": np.full(13, 0.25)},
        earlier="epoch 1",
        per_update={"id-a": np.full(13, 0.01)},
        from_start=True,
        newly_silent={"id-a": np.arange(13) % 2 == 0},
    )
    return make_diagnosis(
        site("a", rectifier="ReLU6", **ALL_KINDS), site("b", active=4, feeds=("a",)), site("é ⟨b⟩", note="odd"),
        history=history, notes=("a remark",), unused=("spare",), source={"checkpoint": "x.pt", "step": 3},
        config={"sites": {"a": {"max_firing_rate": 0.5}}, "ignore_sites": ["z*"], "dormancy_tau": 0.02},
    )  # fmt: skip


def assert_same(a, b) -> None:
    pd.testing.assert_frame_equal(a.units, b.units, check_exact=True)
    pd.testing.assert_frame_equal(a.sites, b.sites, check_exact=True)
    pd.testing.assert_frame_equal(
        a.table.units.reset_index(drop=True), b.table.units.reset_index(drop=True), check_exact=True
    )
    assert a.table.sites == b.table.sites
    assert a.table.coverage == b.table.coverage
    assert (a.summary, a.findings, a.config, a.blamed, a.needed, a.metadata) == (
        b.summary, b.findings, b.config, b.blamed, b.needed, b.metadata,
    )  # fmt: skip
    assert a.to_dict() == b.to_dict()


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_a_diagnosis_survives_saving(tmp_path, suffix):
    """Evidence, verdicts, findings, thresholds and history are the same after loading, and can be judged again."""
    diagnosis = sample()
    path = diagnosis.save(tmp_path / f"d{suffix}")
    assert path == tmp_path / f"d{suffix}"
    loaded = relu_doctor.Diagnosis.load(path)
    assert_same(loaded, diagnosis)
    assert_same(loaded.rediagnose("strict"), diagnosis.rediagnose("strict"))
    assert_same(loaded.rediagnose(loaded.config), diagnosis)
    assert [item.name for item in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("name", ["resnet", "leaky_relu", "padded_mappings"])
@pytest.mark.parametrize("mode", ["eval", "both"])
def test_scans_survive_saving(tmp_path, name, mode):
    """So do those of real models, with the train columns of mode="both"."""
    model, batches = CASES[name].build()
    diagnosis = relu_doctor.scan(model, batches, mode=mode)
    for suffix in (".json", ".safetensors"):
        assert_same(relu_doctor.Diagnosis.load(diagnosis.save(tmp_path / f"d{suffix}")), diagnosis)


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_files_are_byte_identical_but_for_the_metadata(tmp_path, suffix):
    """Two scans of the same model and data write the same bytes, once the one metadata block is set aside."""
    written = []
    for run in range(2):
        random.seed(run)
        model, batches = CASES["resnet"].build()
        diagnosis = relu_doctor.scan(model, batches)
        diagnosis.metadata["created"] = f"2025-01-0{run + 1}"
        written.append(diagnosis.save(tmp_path / f"{run}{suffix}").read_bytes())
    assert len(written[0]) == len(written[1])
    assert written[0] != written[1]
    assert written[0].replace(b"2025-01-01", b"2025-01-02") == written[1]


def test_json_is_strict_and_versioned():
    """No NaN tokens, a schema version, exactly one block of metadata."""
    text = storage.dump_json(sample().to_dict())
    data = json.loads(text, parse_constant=lambda token: pytest.fail(f"{token} is no JSON"))
    assert data["schema_version"] == SCHEMA_VERSION
    assert "created" in data["metadata"]
    assert text.count("created") == 1


def test_many_units_go_to_a_columnar_file(tmp_path):
    """Above 100,000 units the file is columnar, whatever the suffix, and loads under either name."""
    diagnosis = make_diagnosis(site("a", active=JSON_LIMIT - 5, negative_bias=6))
    path = diagnosis.save(tmp_path / "big.json")
    assert path == tmp_path / "big.safetensors"
    for name in ("big.json", "big.safetensors"):
        loaded = relu_doctor.Diagnosis.load(tmp_path / name)
        assert loaded.summary == diagnosis.summary
        pd.testing.assert_frame_equal(loaded.units, diagnosis.units, check_exact=True)


def test_a_columnar_file_loads_whatever_the_length_of_its_header(tmp_path):
    """The header's length may begin with any byte, that of a brace or a blank included."""
    diagnosis = sample()
    for padding in range(80):
        diagnosis.metadata["note"] = "x" * (padding * 8)
        path = diagnosis.save(tmp_path / "d.safetensors")
        assert relu_doctor.Diagnosis.load(path).metadata["note"] == "x" * (padding * 8)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    for wanted in (0x7B20, 0x17B20):
        grown = content[8 : 8 + length] + b" " * (wanted - length)
        path.write_bytes(wanted.to_bytes(8, "little") + grown + content[8 + length :])
        assert relu_doctor.Diagnosis.load(path).summary == diagnosis.summary


def test_the_commands_output_loads_where_it_holds_one_diagnosis(tmp_path):
    """{schema_version, diagnoses: [one]} is read as that one."""
    diagnosis = sample()
    path = tmp_path / "scan.json"
    path.write_text(json.dumps({"schema_version": SCHEMA_VERSION, "diagnoses": [diagnosis.to_dict()]}))
    assert_same(relu_doctor.Diagnosis.load(path), diagnosis)


def damaged(change):
    data = sample().to_dict()
    change(data)
    return json.dumps(data).encode()


DAMAGE = {
    "empty": lambda: b"",
    "text": lambda: b"hello",
    "binary": lambda: bytes(range(256)) * 4,
    "a list": lambda: b"[1, 2]",
    "a number": lambda: b"3",
    "another JSON": lambda: b'{"a": 1}',
    "a JSON of JSONs": lambda: b"[" * 100_000,
    "two diagnoses": lambda: json.dumps({"schema_version": 1, "diagnoses": [sample().to_dict()] * 2}).encode(),
    "truncated": lambda: damaged(lambda data: None)[:-300],
    "no units": lambda: damaged(lambda data: data.pop("units")),
    "units of no shape": lambda: damaged(lambda data: data.update(units=3)),
    "a column missing": lambda: damaged(lambda data: data["units"].pop("inputs")),
    "the status missing": lambda: damaged(lambda data: data["units"].pop("status")),
    "columns of unequal length": lambda: damaged(lambda data: data["units"]["inputs"].pop()),
    "words for numbers": lambda: damaged(lambda data: data["units"].update(inputs=["x"] * len(data["units"]["unit"]))),
    "a site missing": lambda: damaged(lambda data: data["sites"].pop(0)),
    "sites of no shape": lambda: damaged(lambda data: data.update(sites=[1, 2, 3])),
    "an unknown threshold": lambda: damaged(lambda data: data["config"].update(nonsense=1)),
    "a finding of no shape": lambda: damaged(lambda data: data.update(findings=[{"unit_indices": []}])),
    "a coverage of no shape": lambda: damaged(lambda data: data.update(coverage={"unused": [], "notes": [], "x": 1})),
    "no metadata": lambda: damaged(lambda data: data.pop("metadata")),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_files_are_refused_in_a_sentence(tmp_path, kind):
    """Whatever is wrong with a file, one error of ours says what was expected."""
    path = tmp_path / "d.json"
    path.write_bytes(DAMAGE[kind]())
    with pytest.raises(DiagnosisFormatError, match="expected"):
        relu_doctor.Diagnosis.load(path)


def test_a_newer_file_asks_for_an_update(tmp_path):
    """A newer schema is no damage."""
    path = tmp_path / "d.json"
    path.write_bytes(damaged(lambda data: data.update(schema_version=SCHEMA_VERSION + 1)))
    with pytest.raises(DiagnosisFormatError, match=f"found {SCHEMA_VERSION + 1}: update relu-doctor"):
        relu_doctor.Diagnosis.load(path)


def test_a_columnar_file_that_is_damaged_is_refused(tmp_path):
    """Cut anywhere, or with any byte of its header changed, it is refused or read as it was, never half-read."""
    diagnosis = sample()
    content = diagnosis.save(tmp_path / "d.safetensors").read_bytes()
    path = tmp_path / "broken.safetensors"
    generator = np.random.default_rng(0)
    for _ in range(60):
        path.write_bytes(content[: generator.integers(0, len(content) - 1)])
        with pytest.raises(DiagnosisFormatError, match="expected"):
            relu_doctor.Diagnosis.load(path)
    for _ in range(150):
        broken = bytearray(content)
        broken[generator.integers(0, 4000)] = generator.integers(32, 127)
        path.write_bytes(bytes(broken))
        with suppress(DiagnosisFormatError):
            relu_doctor.Diagnosis.load(path)


def test_a_missing_file_and_a_directory_are_told(tmp_path):
    """The path is in the message."""
    for path in (tmp_path / "missing.json", tmp_path):
        with pytest.raises(DiagnosisFormatError, match=f"{path.name}"):
            relu_doctor.Diagnosis.load(path)


def test_a_path_that_cannot_be_written_leaves_nothing(tmp_path):
    """The error is ours, and nothing half-written remains; a file that was there is kept."""
    with pytest.raises(OutputError, match="cannot write"):
        sample().save(tmp_path / "no" / "such" / "folder.json")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(OutputError, match="cannot write"):
        sample().save(tmp_path / "folder.json")
    assert [item.name for item in tmp_path.iterdir()] == ["folder.json"]


def test_a_diagnosis_without_observed_units_survives(tmp_path):
    """A table of sites without units saves and loads."""
    diagnosis = make_diagnosis(site("a", note="the axis of its units could not be told"))
    for suffix in (".json", ".safetensors"):
        loaded = relu_doctor.Diagnosis.load(diagnosis.save(tmp_path / f"d{suffix}"))
        assert loaded.summary == diagnosis.summary
        assert loaded.table.sites == diagnosis.table.sites


def test_a_diagnosis_pickles_and_prints():
    """It can be sent to another process, and shown."""
    import pickle

    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    diagnosis = relu_doctor.scan(model, torch.randn(20, 3))
    assert pickle.loads(pickle.dumps(diagnosis)).units.equals(diagnosis.units)
    assert "Diagnosis" in repr(diagnosis)
    assert "20 inputs" in str(diagnosis)
