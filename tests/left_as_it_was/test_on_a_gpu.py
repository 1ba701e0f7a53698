"""A scan on another device than the model's: memory, random states and default devices are left as they were."""

from __future__ import annotations

import pytest
import torch

import relu_doctor
from tests.left_as_it_was.fingerprint import assert_same, fingerprint
from tests.left_as_it_was.scenes import inputs, mlp, unsettle
from tests.planting import clone
from tests.zoo import CASES

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("name", ["resnet", "pruned", "weight_tied_layers", "recurrent_over_steps"])
def test_a_model_that_was_moved_for_a_scan_lies_where_it_lay(name):
    """The same tensors in the same memory, gradients as well, and the random state of the device."""
    model, batches = CASES[name].build()
    unsettle(model)
    torch.cuda.init()
    before = fingerprint(model)
    relu_doctor.scan(model, clone(batches), device="cuda", mode="both")
    assert_same(before, fingerprint(model))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_default_device_changes_nothing(device):
    """Neither that of the model, nor the other one."""
    model, x = mlp().to(device), inputs().to(device)
    plain = relu_doctor.scan(model, x).units
    for default in ("cpu", "cuda"):
        with torch.device(default):
            assert relu_doctor.scan(model, x).units.equals(plain)


def test_deterministic_algorithms_do():
    """No operation of ours is one that torch refuses then."""
    model, batches = CASES["resnet"].build()
    torch.use_deterministic_algorithms(True)
    try:
        relu_doctor.scan(model.cuda(), batches, device="cuda")
    finally:
        torch.use_deterministic_algorithms(False)
