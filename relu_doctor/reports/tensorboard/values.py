"""Values of an event: a scalar, a histogram, a picture, a text, and the records of the tab *ReLU Doctor*."""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from relu_doctor.reports.frames import Frame
from relu_doctor.reports.plugin.names import MOST_BLOBS, PLUGIN, UNITS_TAG, WINDOWS_TAG
from relu_doctor.reports.tensorboard.hparams import Value

if TYPE_CHECKING:
    from PIL.Image import Image
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata


def scalar(tag: str, value: float, told: str = "") -> Summary.Value:
    """A number; what it means may be told, which TensorBoard shows beside its chart."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    return Summary.Value(tag=tag, simple_value=value, metadata=_metadata("scalars", told) if told else None)


def histogram(tag: str, values: NDArray[np.float64], edges: NDArray[np.float64], told: str = "") -> Summary.Value:
    """How many values lie between neighbouring edges; only the edges around those that do are kept."""
    from tensorboard.compat.proto.summary_pb2 import HistogramProto, Summary

    counts, _ = np.histogram(values, edges)
    filled = np.flatnonzero(counts)
    first, last = (int(filled[0]), int(filled[-1])) if len(filled) else (0, 0)
    told_of = HistogramProto(
        min=float(values.min()),
        max=float(values.max()),
        num=len(values),
        sum=float(values.sum()),
        sum_squares=float(values @ values),
        bucket_limit=edges[first + 1 : last + 2].tolist(),
        bucket=counts[first : last + 1].tolist(),
    )
    return Summary.Value(tag=tag, histo=told_of, metadata=_metadata("histograms", told) if told else None)


def picture(tag: str, image: Image, told: str) -> Summary.Value:
    """A picture, as PNG."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    width, height = image.size
    kept = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=file.getvalue())
    return Summary.Value(tag=tag, image=kept, metadata=_metadata("images", told))


def text(tag: str, markdown: str) -> Summary.Value:
    """Markdown."""
    from torch.utils.tensorboard.summary import text as text_summary

    return text_summary(tag, markdown).value[0]


def layout(categories: Any) -> Summary.Value:
    """The layout of the tab Custom Scalars, as ``SummaryWriter.add_custom_scalars`` takes it."""
    from torch.utils.tensorboard.summary import custom_scalars

    return custom_scalars(categories).value[0]


def session(hparams: dict[str, Value], metrics: Sequence[str]) -> list[Summary.Value]:
    """What the tab HParams knows of a run: its settings, and which tags are its results."""
    from torch.utils.tensorboard.summary import hparams as summaries

    return [summary.value[0] for summary in summaries(hparams, dict.fromkeys(metrics, 0.0))]


def records(frame: Frame) -> list[Summary.Value]:
    """A frame, for the tab *ReLU Doctor*."""
    from tensorboard.compat.proto.summary_pb2 import DATA_CLASS_BLOB_SEQUENCE, DATA_CLASS_TENSOR

    header, status, sites = frame.pack()
    return [
        _strings(WINDOWS_TAG, [header, status], DATA_CLASS_TENSOR),
        _strings(UNITS_TAG, blobs_of(sites), DATA_CLASS_BLOB_SEQUENCE),
    ]


def blobs_of(sites: Sequence[bytes]) -> list[bytes]:
    """The packed numbers of the sites in at most 64 blobs, neighbours together.

    A blob is the number of its sites, the length of each, and then each; whole numbers of four bytes, little-endian.
    """
    each = max(1, -(-len(sites) // MOST_BLOBS))
    groups = [sites[start : start + each] for start in range(0, len(sites), each)]
    return [struct.pack(f"<{1 + len(group)}I", len(group), *map(len, group)) + b"".join(group) for group in groups]


def _strings(tag: str, strings: Sequence[bytes], data_class: int) -> Summary.Value:
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto

    shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=len(strings))])
    tensor = TensorProto(dtype="DT_STRING", tensor_shape=shape, string_val=strings)
    metadata = _metadata(PLUGIN, "")
    metadata.data_class = data_class
    return Summary.Value(tag=tag, tensor=tensor, metadata=metadata)


def _metadata(plugin: str, told: str) -> SummaryMetadata:
    from tensorboard.compat.proto.summary_pb2 import SummaryMetadata

    data = SummaryMetadata.PluginData(plugin_name=plugin)
    return SummaryMetadata(plugin_data=data, summary_description=told)
