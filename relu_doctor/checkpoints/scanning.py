"""Scan a checkpoint file: read, build, load, observe, diagnose."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from relu_doctor.checkpoints.data import DataSource
from relu_doctor.checkpoints.formats import Checkpoint, load_checkpoint
from relu_doctor.checkpoints.models import load_into
from relu_doctor.checkpoints.updates import earlier_of_run, learning_rate_evidence, tie_optimizer
from relu_doctor.diagnose.diagnosis import Diagnosis, diagnose
from relu_doctor.diagnose.table import UnitTable
from relu_doctor.scanning import ScanRequest, observe
from relu_doctor.text import clean_text


@dataclass(frozen=True, slots=True, eq=False)
class ScannedCheckpoint:
    """One file and what was found in it.

    Attributes:
        checkpoint: as read.
        table: the evidence.
        diagnosis: the verdict.
    """

    checkpoint: Checkpoint
    table: UnitTable
    diagnosis: Diagnosis


def scan_checkpoint(
    path: str | Path,
    make_model: Callable[[], nn.Module],
    open_source: Callable[[], DataSource],
    request: ScanRequest,
    *,
    trust: bool = False,
    before: Sequence[ScannedCheckpoint] = (),
) -> ScannedCheckpoint:
    """Scan one file.

    Args:
        path: a checkpoint.
        make_model: builds the network.
        open_source: opens the data.
        request: how to scan.
        trust: run the code that a pickle asks for.
        before: files scanned earlier; the latest of the same run is what the learning-rate finding compares with.

    Raises:
        ReLUDoctorError: the file cannot be scanned.
    """
    checkpoint = load_checkpoint(path, trust=trust)
    model = make_model()
    notes = load_into(model, checkpoint)
    checkpoint = tie_optimizer(checkpoint, model)
    data = open_source()
    told = replace(request, random_inputs=data.random, source=_source(checkpoint, model, data, notes))
    observation = observe(model, data.batches, told)
    earlier = earlier_of_run(checkpoint, [each.checkpoint for each in before])
    reference = next(((each.checkpoint, each.table) for each in before if each.checkpoint is earlier), None)
    history = learning_rate_evidence(checkpoint, observation.sites, observation.table, reference)
    diagnosis = diagnose(observation.table, request.config, history=history)
    return ScannedCheckpoint(checkpoint, observation.table, diagnosis)


def _source(checkpoint: Checkpoint, model: nn.Module, data: DataSource, notes: tuple[str, ...]) -> dict[str, Any]:
    return {
        "checkpoint": clean_text(checkpoint.path),
        "format": checkpoint.format,
        "key": checkpoint.key,
        "step": checkpoint.step,
        "epoch": checkpoint.epoch,
        "model": type(model).__name__,
        "data": data.description,
        "placeholders": list(checkpoint.placeholders),
        "notes": [*checkpoint.notes, *notes],
    }
