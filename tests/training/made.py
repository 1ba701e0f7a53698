"""Windows made by hand from real scans of a small trained model: what a monitor hands to a history."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from torch import nn

import relu_doctor
from relu_doctor.diagnose.diagnosis import Diagnosis
from relu_doctor.training.windows import Alert, Window

PERIOD = 10  # steps of a window


def scanned(bias: float = -50.0) -> Diagnosis:
    """A real scan: the first of 8 units has the bias given, and so is dead by default."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 2)).eval()
    with torch.no_grad():
        model[0].bias[0] = bias
    return relu_doctor.scan(model, torch.randn(1200, 4))


def window_of(
    diagnosis: Diagnosis,
    index: int = 0,
    *,
    start: int = 0,
    numbers: Mapping[str, float] | None = None,
    alerts: Sequence[Alert] = (),
) -> Window:
    """The window of ten steps that begins ``index`` windows after a step, with numbers that tell it from others."""
    first = start + index * PERIOD
    sites, units = diagnosis.sites, diagnosis.units
    died = np.where(units["status"] == "dead", "died", "")
    return Window(
        index=index,
        first_step=first,
        last_step=first + PERIOD - 1,
        closed=time.time(),
        diagnosis=diagnosis,
        sites=pd.DataFrame(
            {
                "site_id": sites["site_id"],
                "deaths": sites["dead"],
                "revivals": 0,
                "update_ratio": 0.001 * (1 + index),
                "weight_norm": 2.5,
                "dormant_overlap": np.nan,
                "effective_rank": np.nan,
            }
        ),
        units=pd.DataFrame(
            {
                "site_id": units["site_id"],
                "unit": units["unit"],
                "onset": died,
                "onset_step": np.where(died == "died", first + 3, -1),
                "onset_confidence": np.where(died == "died", 0.75, np.nan),
                "silent_since": np.where(died == "died", first + 2, -1),
                "silent_inputs": np.where(died == "died", 96, 0),
                "reference_inputs": 64,
                "reference_fired": np.where(died == "died", 0, 3),
            }
        ),
        numbers={"loss": 1 / (1 + first), "lr": 0.1, "observed_inputs": 96, **(numbers or {})},
        alerts=tuple(alerts),
    )
