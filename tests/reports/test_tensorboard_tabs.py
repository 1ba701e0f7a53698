"""What TensorBoard's own tabs show of what the sink writes: its application is asked as a browser asks it."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from relu_doctor.reports.colours import STATUS_COLOURS
from relu_doctor.reports.frames import Frame
from relu_doctor.reports.tensorboard import TensorBoardSink
from relu_doctor.reports.tensorboard.past import Past
from relu_doctor.reports.tensorboard.pictures import picture_of_units, picture_over_time, told_of
from relu_doctor.terms import Status
from tests.builders import make_diagnosis, site
from tests.reports.events import Dashboard
from tests.training.made import PERIOD, window_of

WINDOWS = 5


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """Two runs that differ in their optimizer, schedule and deaths."""
    folder = tmp_path_factory.mktemp("runs")
    for name, optimizer, dead in (("calm", "SGD", 0), ("sick", "Adam", 3)):
        with TensorBoardSink(folder / name, hparams={"optimizer": optimizer, "seed": 1}) as sink:
            for index in range(WINDOWS):
                diagnosis = make_diagnosis(site("a", active=20 - dead * index, negative_bias=dead * index))
                rates = {"lr": 0.1 * (1 + index % 3)}
                sink(window_of(diagnosis, index, numbers=rates))
    return Dashboard(folder)


def test_custom_scalars_shows_the_layout(shown):
    """Once, for all runs: dead fractions with the often-cited band, and the learning rate."""
    [category] = shown.get("custom_scalars/layout")["category"]
    assert category["title"] == "ReLU Doctor"
    charts = {chart["title"]: chart for chart in category["chart"]}
    assert [*charts][:2] == ["Dead fraction, and the often-cited 20–50 %", "Learning rate"]
    [together] = charts["Dead fraction, and the often-cited 20–50 %"]["multiline"]["tag"]
    drawn = shown.get("custom_scalars/scalars", run="sick", tag=together)["tag_to_events"]
    last = {tag.rpartition("/")[2]: points[-1][2] for tag, points in drawn.items()}
    assert last == pytest.approx({"dead_fraction": 12 / 20, "often_cited_low": 0.2, "often_cited_high": 0.5})
    for chart in charts.values():
        for tag in chart["multiline"]["tag"]:
            found = shown.get("custom_scalars/scalars", run="calm", tag=tag)
            assert found["regex_valid"]
            assert found["tag_to_events"]


def test_hparams_compares_the_runs(shown):
    """The settings, the largest learning rate of the schedule, and the dead fraction at the end."""
    body = {"startIndex": 0, "sliceSize": 10, "allowedStatuses": ["STATUS_SUCCESS"], "colParams": []}
    groups = shown.post("hparams/session_groups", body)["sessionGroups"]
    told = {group["name"]: group for group in groups}
    for name, optimizer, dead in (("calm", "SGD", 0), ("sick", "Adam", 12 / 20)):
        assert told[name]["hparams"] == {"learning rate": pytest.approx(0.3), "optimizer": optimizer, "seed": 1}
        metrics = {each["name"]["tag"]: each["value"] for each in told[name]["metricValues"]}
        assert metrics["relu_doctor/dead_fraction"] == pytest.approx(dead)
        assert set(metrics) == {
            f"relu_doctor/{each}" for each in ("dead_fraction", "unproven_fraction", "update_ratio", "loss")
        }
    experiment = shown.post("hparams/experiment", {"experimentName": "", "includeMetrics": True})
    assert {info["name"] for info in experiment["hparamInfos"]} == {"learning rate", "optimizer", "seed"}


def test_text_shows_findings_with_links(shown):
    """Rendered by TensorBoard: a list with a link to the site."""
    [*_, last] = shown.get("text/text", run="sick", tag="relu_doctor/findings/text_summary")
    assert last["step"] == WINDOWS * PERIOD - 1
    assert '<a href="#relu_doctor&amp;p.relu_doctor.site=id-a">' in json.dumps(last["text"]).replace('\\"', '"')


def test_images_shows_both_pictures(shown):
    """One each at the close; of a run without losses the map alone."""
    tags = shown.get("images/tags")
    assert set(tags["sick"]) == {"relu_doctor/map_of_units", "relu_doctor/worst_sites_over_time"}
    assert set(tags["calm"]) == {"relu_doctor/map_of_units"}


def colours_in(image):
    """How many pixels have the colour of each status."""
    pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    return {
        status: int((pixels == list(bytes.fromhex(colour[1:]))).all(axis=1).sum())
        for status, colour in STATUS_COLOURS.items()
    }


def test_the_map_has_a_cell_for_every_unit():
    """In the colour of its status, as large as that of any other; the legend adds a swatch per status that occurs."""
    diagnosis = make_diagnosis(
        site("a", active=5, rare=4, negative_bias=6), site("b", rectifier="ReLU6", active=3, saturated=2, non_finite=1)
    )
    image = picture_of_units(Frame.of_diagnosis(diagnosis, 1200))
    found = colours_in(image)
    legend = colours_in(picture_of_units(Frame.of_diagnosis(make_diagnosis(site("a", rare=1)), 1)))[Status.RARE]
    cell = found[Status.RARE] - legend  # four cells, and a swatch
    one = legend - 11 * 11  # a cell and a swatch of 11 x 11 inside its frame
    assert cell + legend == 4 * one + 11 * 11
    counts = diagnosis.units["status"].value_counts()
    for status in (Status.ACTIVE, Status.DEAD, Status.SATURATED):
        assert found[status] == counts[status.value] * one + 11 * 11
    assert found[Status.DORMANT] == found[Status.UNOBSERVED] == 0


def test_pictures_stay_small_and_readable():
    """Of 90 sites of 300 units with hostile names, each picture is of a size that a browser shows."""
    names = ["<script>\u202e" + "x" * 10_000, "漢字", "a\nb"]
    diagnosis = make_diagnosis(
        *(site(f"{names[i % 3]}{i}", active=290 - i % 5, negative_bias=10 + i % 5) for i in range(90))
    )
    frame, past = Frame.of_diagnosis(diagnosis, 2), Past()
    past.add(Frame.of_diagnosis(diagnosis, 1))
    past.add(frame)
    for image in (picture_of_units(frame), picture_over_time(frame, past)):
        file = io.BytesIO()
        image.save(file, "PNG")
        assert image.width <= 1300
        assert image.height <= 3000
        assert len(file.getvalue()) < 200_000
        assert Image.open(io.BytesIO(file.getvalue())).size == image.size


def test_what_was_lost_before_a_network_diverged_is_drawn():
    """The picture asks all windows, and says of the last one that nothing is known."""
    sick, broken = make_diagnosis(site("a", negative_bias=3, active=5)), make_diagnosis(site("a", non_finite=8))
    past = Past()
    frames = [Frame.of_diagnosis(diagnosis, step) for step, diagnosis in enumerate((sick, broken))]
    for frame in frames:
        past.add(frame)
    assert past.losses(frames[-1].sites) == [(3 / 8, 0)]
    assert colours_in(picture_over_time(frames[-1], past))[Status.DEAD]
    assert told_of(frames[0].sites[0]) == "3 of 8 dead"
    assert told_of(frames[1].sites[0]) == "8 not finite"


def test_the_past_is_thinned_and_keeps_both_ends():
    """However many windows: at most about 512 of them, evenly; sites that were not known yet are unknown."""
    past = Past()
    early = Frame.of_diagnosis(make_diagnosis(site("a", active=3)), 0)
    late = Frame.of_diagnosis(make_diagnosis(site("b", active=2), site("a", negative_bias=3)), 0)
    for step in range(3000):
        frame = replace(early if step < 1000 else late, span={"last_step": step})
        past.add(frame)
    past.end(frame)
    steps = past.steps
    assert (steps[0], steps[-1]) == (0, 2999)
    assert 256 <= len(steps) <= 514
    assert len(set(np.diff(steps[:-1]))) == 1
    b, a = past.of(frame.sites)
    first = sum(step < 1000 for step in steps)
    assert (b[:, :first] == 255).all()
    assert (b[:, first:] != 255).all()
    assert len(np.unique(a[:, :first])) == len(np.unique(a[:, first:])) == 1
    assert a[0, 0] != a[0, -1]
