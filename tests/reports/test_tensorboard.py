"""Diagnoses for TensorBoard, read back with its own reader."""

from __future__ import annotations

import math
import warnings
from html import unescape

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from relu_doctor.errors import OutputError
from relu_doctor.reports.tensorboard import TensorBoardSink, findings_markdown, verdict_markdown
from tests.builders import make_diagnosis, site

NAME = "<img src=x>[a](http://b) *c* `d` a_b #1 | \\x"


def read(path):
    accumulator = EventAccumulator(str(path), size_guidance={"scalars": 0, "histograms": 0, "tensors": 0})
    accumulator.Reload()
    return accumulator


def test_what_is_written_reads_back(tmp_path):
    """Fractions per site and in all, histograms of rates, verdict and findings, each at its step."""
    sick = make_diagnosis(site("relu1", active=60, negative_bias=4), site("block.relu()#1", active=10))
    with TensorBoardSink(tmp_path) as sink:
        sink.write(make_diagnosis(site("relu1", active=64), site("block.relu()#1", active=10)), 100)
        sink.write(sick, step=200)
    events = read(tmp_path)
    for tag, dead in {
        "relu_doctor": 4 / 74,
        "relu_doctor_sites/relu1": 4 / 64,
        "relu_doctor_sites/block.relu()#1": 0,
    }.items():
        for name in ("dead_fraction", "silent_fraction"):
            points = [(point.step, point.value) for point in events.Scalars(f"{tag}/{name}")]
            assert points == [(100, 0), (200, pytest.approx(dead))]
    rates = events.Histograms("relu_doctor/firing_rate")[1].histogram_value
    assert (rates.num, rates.min) == (74, 0)
    assert events.Histograms("relu_doctor_sites/relu1/firing_rate")[0].histogram_value.num == 64
    verdicts = events.Tensors("relu_doctor/verdict/text_summary")
    assert [event.step for event in verdicts] == [100, 200]
    assert "4 of 74 units" in verdicts[1].tensor_proto.string_val[0].decode()
    findings = events.Tensors("relu_doctor/findings/text_summary")
    assert findings[0].tensor_proto.string_val[0].decode() == "No findings."
    assert "RD205" in findings[1].tensor_proto.string_val[0].decode()


def test_a_diverged_network_shows_a_gap_not_nought(tmp_path):
    """NaN units have no dead fraction; their own fraction is there."""
    with TensorBoardSink(tmp_path) as sink:
        sink.write(make_diagnosis(site("relu", non_finite=8), site("gelu", low=None, active=8)), 1)
        sink.write(make_diagnosis(site("gelu", low=None, non_finite=8)), 2)
    events = read(tmp_path)
    assert all(math.isnan(point.value) for point in events.Scalars("relu_doctor/dead_fraction"))
    assert [point.value for point in events.Scalars("relu_doctor/non_finite_fraction")] == [0.5, 1]
    tags = events.Tags()
    assert "relu_doctor_sites/relu/firing_rate" not in tags["histograms"]
    assert "relu_doctor_sites/gelu/dead_fraction" not in tags["scalars"]


def test_sites_never_share_a_tag(tmp_path):
    """Names that differ only in what a tag cannot hold stay apart."""
    names = ("a/b", "a b", "a:b", NAME)
    with TensorBoardSink(tmp_path) as sink:
        sink.write(make_diagnosis(*(site(name, active=i + 1) for i, name in enumerate(names))), 1)
    tags = [tag for tag in read(tmp_path).Tags()["histograms"] if tag.startswith("relu_doctor_sites/")]
    assert len(tags) == len(names)
    assert all(tag.count("/") == 2 for tag in tags)


def test_names_are_no_markdown():
    """TensorBoard's own renderer shows a hostile name letter by letter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the sanitizer that comes with TensorBoard says of itself that it is old
        from tensorboard.plugin_util import markdown_to_safe_html
    diagnosis = make_diagnosis(site(NAME, active=6, negative_bias=4), site("b", active=4), notes=(NAME,))
    for text in (verdict_markdown(diagnosis), findings_markdown(diagnosis)):
        html = markdown_to_safe_html(text)
        assert NAME in unescape(html)
        assert "<a" not in html
        assert "<img" not in html
        assert "<code>" not in html
        assert "<strong>" in html


def test_a_directory_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OutputError, match=r"^cannot write TensorBoard events to '.*'; give|: .*; give") as caught:
            TensorBoardSink(path)
        assert str(caught.value).count("\n") == 0


def test_closing_twice_is_fine_and_writing_then_is_an_error(tmp_path):
    sink = TensorBoardSink(tmp_path / "new" / "folder")
    sink.close()
    sink.close()
    with pytest.raises(ValueError, match="closed"):
        sink.write(make_diagnosis(site("relu", active=1)), 0)
