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
from relu_doctor.checkpoints.updates import Snapshot, earlier_of_run, learning_rate_evidence, tie_optimizer
from relu_doctor.diagnose.diagnosis import Diagnosis, diagnose
from relu_doctor.observe.graph.names import strip_wrappers
from relu_doctor.scanner import ScanRequest
from relu_doctor.scanning import observe
from relu_doctor.text import clean_text


@dataclass(frozen=True, slots=True, eq=False)
class ScannedCheckpoint:
    """One file and what was found in it.

    Attributes:
        snapshot: the checkpoint, the evidence, and the weights that were scanned.
        diagnosis: the verdict.
    """

    snapshot: Snapshot
    diagnosis: Diagnosis

    @property
    def checkpoint(self) -> Checkpoint:
        """As read."""
        return self.snapshot.checkpoint


def scan_checkpoint(
    path: str | Path,
    make_model: Callable[[], nn.Module],
    open_source: Callable[[], DataSource],
    request: ScanRequest,
    *,
    trust: bool = False,
) -> ScannedCheckpoint:
    """Scan one file.

    Args:
        path: a checkpoint.
        make_model: builds the network.
        open_source: opens the data.
        request: how to scan.
        trust: run the code that a pickle asks for.

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
    weights = {strip_wrappers(name): parameter.detach() for name, parameter in model.named_parameters()}
    snapshot = Snapshot(checkpoint, observation, weights)
    diagnosis = diagnose(observation.table, request.config, history=learning_rate_evidence(snapshot))
    return ScannedCheckpoint(snapshot, diagnosis)


def compare_within_runs(scanned: Sequence[ScannedCheckpoint]) -> list[ScannedCheckpoint]:
    """The same checkpoints, each judged also by what changed since those before it in its run, where there are any."""
    snapshots = [each.snapshot for each in scanned]
    compared: list[ScannedCheckpoint] = []
    for one in scanned:
        earlier = earlier_of_run(one.snapshot, snapshots)
        if earlier:
            history = learning_rate_evidence(one.snapshot, earlier)
            table, config = one.snapshot.observation.table, one.diagnosis.config
            one = replace(one, diagnosis=diagnose(table, config, history=history))
        compared.append(one)
    return compared


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
