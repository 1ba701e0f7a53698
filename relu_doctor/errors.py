"""Every exception and warning of relu_doctor.

Each message says what was expected, what was found and what to do. Each class also inherits from the matching
built-in, so that ``except ValueError`` works for people who do not know this library. The command prints the message
of a :class:`ReLUDoctorError` as one sentence and exits with code 2.
"""

from __future__ import annotations


class ReLUDoctorError(Exception):
    """Base of every error that relu_doctor raises on purpose."""


class NoActivationSitesError(ReLUDoctorError, ValueError):
    """The model applied no rectifier in any forward pass."""


class NothingObservedError(ReLUDoctorError, ValueError):
    """Rectifiers exist, but filters or the data left none of them observed."""


class UnsupportedModelError(ReLUDoctorError, TypeError):
    """The model is of a kind that cannot be observed (meta tensors, lazy parameters, no module at all)."""


class ForwardError(ReLUDoctorError, RuntimeError):
    """The model's own forward raised; the original exception is the cause."""


class DataError(ReLUDoctorError, ValueError):
    """The data are missing, empty, of the wrong shape or dtype, or hold NaN."""


class CheckpointError(ReLUDoctorError, ValueError):
    """A checkpoint is missing, truncated, of no known format, or holds no state dict."""


class UnsafeCheckpointError(CheckpointError):
    """A needed tensor depends on code that the file would have to run."""


class StateDictMismatchError(CheckpointError):
    """The checkpoint's tensors are those of another model."""


class ModelSpecError(ReLUDoctorError, ValueError):
    """``--model``, ``--forward`` or a ``--data`` callable cannot be found, imported or called."""


class ConfigError(ReLUDoctorError, ValueError):
    """A profile has an unknown key, a wrong type or a value out of range."""


class OutputError(ReLUDoctorError, OSError):
    """A result cannot be written where it was asked for."""


class DiagnosisFormatError(ReLUDoctorError, ValueError):
    """A saved diagnosis cannot be read: not one of ours, damaged, or of a newer schema."""


class HistoryError(ReLUDoctorError, OSError):
    """A run's history cannot be opened, read or written: foreign, damaged, newer, in use, or its disk is full."""


class ReLUDoctorWarning(UserWarning):
    """Base of every warning that relu_doctor issues."""


class FilterWarning(ReLUDoctorWarning):
    """A site pattern matched nothing."""


class DyingUnitsWarning(ReLUDoctorWarning):
    """A monitored run loses units: what a :class:`~relu_doctor.Monitor` says while something can still be done."""


class MonitorWarning(ReLUDoctorWarning):
    """A monitor sees less than it should, and says why; the training goes on."""


class MonitorError(ReLUDoctorError, RuntimeError):
    """A monitor is used in a way that cannot work."""
