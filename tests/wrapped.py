"""What was planted, and what a scan finds of it; for models whose wrappers or own code stand in the way."""

from __future__ import annotations

from typing import Any

from torch import nn

import relu_doctor
from tests.left_as_it_was.fingerprint import assert_same, fingerprint
from tests.planting import Case, clone


def found_in(diagnosis: relu_doctor.Diagnosis) -> dict[str, tuple[int, set[int], set[int]]]:
    """Of each site its units, the dead, and those that fired on one input."""
    found = {}
    for name, rows in diagnosis.units.groupby("site", sort=False):
        dead, once = rows[rows["status"] == "dead"], rows[rows["inputs_fired"] == 1]
        found[name] = len(rows), set(dead["unit"]), set(once["unit"])
    return found


def planted_in(case: Case) -> dict[str, tuple[int, set[int], set[int]]]:
    return {site.name: (site.num_units, set(site.dead), set(site.once)) for site in case.sites}


def scan(model: nn.Module, batches: Any, **arguments: Any) -> relu_doctor.Diagnosis:
    """A scan that must leave the model as it was."""
    before = fingerprint(model)
    diagnosis = relu_doctor.scan(model, clone(batches), exhaustive=True, **arguments)
    assert_same(before, fingerprint(model))
    return diagnosis


def assert_found(case: Case, diagnosis: relu_doctor.Diagnosis, prefix: str = "") -> None:
    """The planted units of a case, no other sites, on all inputs, with nothing to remark."""
    assert found_in(diagnosis) == {prefix + name: told for name, told in planted_in(case).items()}
    assert set(diagnosis.units["inputs"]) == {sum(len(batch) for batch in case.batches())}
    assert diagnosis.summary["unobserved_sites"] == []
    assert diagnosis.table.coverage.notes == ()
