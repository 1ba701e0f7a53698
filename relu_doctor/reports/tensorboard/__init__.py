"""Diagnoses and windows for TensorBoard: its own tabs, and the records of the tab *ReLU Doctor*."""

from relu_doctor.reports.tensorboard.markdown import findings_markdown, verdict_markdown
from relu_doctor.reports.tensorboard.sink import TensorBoardSink

__all__ = ["TensorBoardSink", "findings_markdown", "verdict_markdown"]
