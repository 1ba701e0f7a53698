"""relu_doctor: find the ReLU units of a PyTorch model that have died, and say how sure that is, why, and what to do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from relu_doctor import plot as plot
    from relu_doctor.config import Config as Config
    from relu_doctor.config import load_config as load_config
    from relu_doctor.diagnose.diagnosis import Diagnosis as Diagnosis
    from relu_doctor.diagnose.diagnosis import diagnose as diagnose
    from relu_doctor.diagnose.findings import Finding as Finding
    from relu_doctor.scanning import scan as scan
    from relu_doctor.training.history import History as History
    from relu_doctor.training.monitor import Monitor as Monitor

_HOMES = {
    "Config": "relu_doctor.config",
    "Diagnosis": "relu_doctor.diagnose.diagnosis",
    "Finding": "relu_doctor.diagnose.findings",
    "History": "relu_doctor.training.history",
    "Monitor": "relu_doctor.training.monitor",
    "Rectifier": "relu_doctor.observe.rectifiers.kinds",
    "diagnose": "relu_doctor.diagnose.diagnosis",
    "load_config": "relu_doctor.config",
    "scan": "relu_doctor.scanning",
    "tap": "relu_doctor.observe.rectifiers.tapping",
}

__all__ = [
    "Config",
    "Diagnosis",
    "Finding",
    "History",
    "Monitor",
    "Rectifier",
    "__version__",
    "diagnose",
    "load_config",
    "plot",
    "scan",
    "tap",
]


def __getattr__(name: str) -> Any:
    """Import public names when they are first asked for, so that ``import relu_doctor`` stays cheap."""
    import random
    from importlib import import_module, metadata

    if name == "__version__":
        return metadata.version("relu-doctor")
    numbers = random.getstate()  # some libraries draw from it when they are imported
    try:
        if name == "plot":
            return import_module("relu_doctor.plot")
        if name in _HOMES:
            globals()[name] = getattr(import_module(_HOMES[name]), name)
            return globals()[name]
    finally:
        random.setstate(numbers)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Public names, for completion."""
    return sorted(__all__)
