"""What the TensorBoard sink writes, read back with TensorBoard's own reader and compared with the tables."""

from __future__ import annotations

import math
import re
import struct
import warnings
from html import unescape

import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter

from relu_doctor.errors import ConfigError, OutputError, ReLUDoctorWarning
from relu_doctor.reports.frames import Frame, read_header
from relu_doctor.reports.plugin.names import UNITS_TAG, WINDOWS_TAG
from relu_doctor.reports.tensorboard import TensorBoardSink, findings_markdown, verdict_markdown
from relu_doctor.reports.tensorboard.numbers import LAYOUT
from relu_doctor.reports.tensorboard.values import blobs_of
from relu_doctor.training.windows import SITE_COLUMNS
from tests.builders import make_diagnosis, site
from tests.reports.events import events_of, points, texts
from tests.training.made import PERIOD, window_of

NAME = "<img src=x>[a](http://b) *c* `d` a_b #1 | \\x"


def wide(dead, sites=300):
    """A diagnosis of many sites of ten units, some of which have dead ones: their places to the number."""
    return make_diagnosis(
        *(site(f"l{i}", active=10 - dead.get(i, 0), negative_bias=dead.get(i, 0)) for i in range(sites))
    )


def test_a_scan_reads_back(tmp_path):
    """Fractions in all and per site, histograms, verdict and findings, each at its step."""
    sick = make_diagnosis(site("relu1", active=60, negative_bias=4), site("block.relu()#1", active=9, rare=1))
    with TensorBoardSink(tmp_path) as sink:
        sink.write(make_diagnosis(site("relu1", active=64), site("block.relu()#1", active=10)), 100)
        sink.write(sick, step=200)
    events = events_of(tmp_path)
    for tag, dead in {
        "relu_doctor": 4 / 74,
        "relu_doctor_sites/relu1": 4 / 64,
        "relu_doctor_sites/block.relu()#1": 0,
    }.items():
        assert points(events, f"{tag}/dead_fraction") == [(100, 0), (200, pytest.approx(dead))]
    assert points(events, "relu_doctor/rare_fraction") == [(100, 0), (200, pytest.approx(1 / 74))]
    assert list(texts(events, "verdict")) == list(texts(events, "findings")) == [100, 200]
    assert "4 of 74 units" in texts(events, "verdict")[200]
    assert texts(events, "findings")[100] == "No findings."
    assert "RD205" in texts(events, "findings")[200]


def test_a_window_reads_back(tmp_path):
    """The numbers of the run, its deaths and updates stand at the last step, with the time at which it closed."""
    windows = [
        window_of(make_diagnosis(site("a", active=8, negative_bias=i)), i, numbers={"lr/1": 0.5}) for i in (0, 1)
    ]
    with TensorBoardSink(tmp_path) as sink:
        for window in windows:
            sink(window)
    events = events_of(tmp_path)
    for name, value in {
        "dead_fraction": lambda window: window.diagnosis.summary["dead_fraction"],
        "deaths": lambda window: window.sites["deaths"].sum(),
        "revivals": lambda window: window.sites["revivals"].sum(),
        "update_ratio": lambda window: window.sites["update_ratio"].max(),
        "loss": lambda window: window.numbers["loss"],
        "lr": lambda window: window.numbers["lr"],
        "lr/1": lambda window: window.numbers["lr/1"],
    }.items():
        told = [(window.last_step, pytest.approx(value(window))) for window in windows]
        assert points(events, f"relu_doctor/{name}") == told
    assert [point.wall_time for point in events.Scalars("relu_doctor/lr")] == [window.closed for window in windows]


def test_histograms_are_those_of_the_units(tmp_path):
    """Units that never fired stand at -8; no bucket of the pre-activations mixes signs; NaN and unseen are left out."""
    diagnosis = make_diagnosis(site("a", active=60, negative_bias=4), site("b", non_finite=5, unobserved=2, rare=1))
    with TensorBoardSink(tmp_path) as sink:
        sink.write(diagnosis, 1)
    events = events_of(tmp_path)
    whole = events.Histograms("relu_doctor/log10_firing_rate")[0].histogram_value
    assert (whole.num, whole.min, whole.bucket[0]) == (65, -8, 4)
    rates = diagnosis.units.query("site == 'a' and firing_rate > 0")["firing_rate"]
    of_site = events.Histograms("relu_doctor_sites/a/log10_firing_rate")[0].histogram_value
    assert of_site.max == pytest.approx(np.log10(rates.max()))
    assert sum(of_site.bucket) == of_site.num == 64
    highest = events.Histograms("relu_doctor_sites/a/pre_max")[0].histogram_value
    below = sum(number for limit, number in zip(highest.bucket_limit, highest.bucket, strict=True) if limit <= 0)
    assert below == (diagnosis.units.query("site == 'a'")["pre_max"] <= 0).sum() == 4


def test_the_tabs_records_are_the_packed_frame(tmp_path):
    """Header and status in one tensor, the numbers of each site in a blob of its own, byte for byte."""
    window = window_of(make_diagnosis(site("a", active=8, negative_bias=3), site("b", active=5)))
    with TensorBoardSink(tmp_path) as sink:
        sink(window)
    events = events_of(tmp_path)
    header, status, sites = Frame.of_window(window).pack()
    assert events.Tensors(WINDOWS_TAG)[0].tensor_proto.string_val[:] == [header, status]
    assert read_header(header)["last_step"] == events.Tensors(WINDOWS_TAG)[0].step == PERIOD - 1
    blobs = events.Tensors(UNITS_TAG)[0].tensor_proto
    assert blobs.string_val[:] == [struct.pack("<II", 1, len(each)) + each for each in sites]
    assert [dim.size for dim in blobs.tensor_shape.dim] == [2]
    assert events.SummaryMetadata(UNITS_TAG).plugin_data.plugin_name == "relu_doctor"


@pytest.mark.parametrize("number", [0, 1, 64, 65, 128, 300])
def test_many_sites_share_blobs(number):
    """At most 64 blobs, neighbours together, nothing lost."""
    sites = [bytes([place % 256]) * (place % 5) for place in range(number)]
    blobs, found = blobs_of(sites), []
    assert len(blobs) <= 64
    for blob in blobs:
        count = struct.unpack_from("<I", blob)[0]
        lengths = struct.unpack_from(f"<{count}I", blob, 4)
        start = 4 + 4 * count
        for length in lengths:
            found.append(blob[start : start + length])
            start += length
        assert start == len(blob)
    assert found == sites


def test_a_diverged_network_shows_a_gap_not_nought(tmp_path):
    """Where of no unit is known whether it fired, fractions are NaN; those of NaN units are there."""
    with TensorBoardSink(tmp_path) as sink:
        sink.write(make_diagnosis(site("relu", non_finite=8), site("gelu", low=None, active=8)), 1)
        sink.write(make_diagnosis(site("gelu", low=None, non_finite=8)), 2)
        sink.write(make_diagnosis(site("relu", unobserved=8)), 3)
    events = events_of(tmp_path)
    for tag in ("relu_doctor/dead_fraction", "relu_doctor/rare_fraction", "relu_doctor_sites/relu/dead_fraction"):
        assert all(math.isnan(point.value) for point in events.Scalars(tag))
    assert points(events, "relu_doctor/non_finite_fraction") == [(1, 0.5), (2, 1), (3, 0)]
    assert "relu_doctor_sites/relu/log10_firing_rate" not in events.Tags()["histograms"]
    assert "relu_doctor_sites/gelu/dead_fraction" not in events.Tags()["scalars"]


def test_a_number_that_was_not_had_is_a_gap(tmp_path):
    """No loss, no updates, no deaths: no point, rather than 0."""
    whole = window_of(make_diagnosis(site("a", active=8)), 0, numbers={"loss": math.nan})
    whole.sites[list(SITE_COLUMNS)] = np.nan
    with TensorBoardSink(tmp_path) as sink:
        sink(whole)
    tags = events_of(tmp_path).Tags()["scalars"]
    assert {"relu_doctor/loss", "relu_doctor/deaths", "relu_doctor/update_ratio"}.isdisjoint(tags)


def test_at_most_forty_tags_whatever_becomes_worst(tmp_path):
    """Of 300 sites, others are worst in every window; a site that is shown is shown in every window after."""
    with TensorBoardSink(tmp_path) as sink:
        for index in range(12):
            dead = {(7 * index + i) % 290: 1 + i % 2 for i in range(15)} | ({295: 9} if index > 8 else {})
            numbers = {"grad_norm": 1.0, **{f"lr/{group}": 0.1 for group in range(1, 30)}}
            sink(window_of(wide(dead), index, numbers=numbers))
    events = events_of(tmp_path)
    tags = events.Tags()["scalars"]
    shown = [tag for tag in tags if tag.startswith("relu_doctor_sites/")]
    assert len(tags) <= 40
    assert len([tag for tag in tags if re.match("relu_doctor/lr", tag)]) == 8
    assert len(shown) >= 12
    for tag in shown:
        steps = [step for step, _ in points(events, tag)]
        assert steps == list(range(steps[0], 12 * PERIOD, PERIOD)), "a tag that came in is in every window after"


def test_a_site_that_goes_bad_late_is_shown_and_one_with_little_dead_is_not(tmp_path):
    """Once twelve are shown, a further one needs ``mild_fraction`` dead units."""
    first = dict.fromkeys(range(12), 10)

    def diagnosis(dead, late):
        return make_diagnosis(
            *(site(f"l{i}", active=10 - dead.get(i, 0), negative_bias=dead.get(i, 0)) for i in range(20)),
            site("wide", active=100 - late, negative_bias=late),
        )

    with TensorBoardSink(tmp_path) as sink:
        sink(window_of(diagnosis(first, 0), 0))
        sink(window_of(diagnosis({0: 1}, 1), 1))
        assert "relu_doctor_sites/wide/dead_fraction" not in events_of(tmp_path).Tags()["scalars"]
        sink(window_of(diagnosis({0: 1}, 50), 2))
    assert points(events_of(tmp_path), "relu_doctor_sites/wide/dead_fraction") == [(3 * PERIOD - 1, 0.5)]


def test_every_site_where_that_is_asked_for(tmp_path):
    """A group of tags per number, in it all sites in forward order; what others see is there as well."""
    window = window_of(wide({7: 3, 299: 2}))
    with TensorBoardSink(tmp_path, detail="all") as sink:
        sink(window)
    events = events_of(tmp_path)
    group = sorted(tag for tag in events.Tags()["scalars"] if tag.startswith("relu_doctor_sites_dead_fraction/"))
    assert [tag.partition("/")[2] for tag in group] == [f"{i:03d}_l{i}" for i in range(300)]
    assert [points(events, tag)[0][1] for tag in group] == pytest.approx(window.diagnosis.sites["dead_fraction"])
    norms = [tag for tag in events.Tags()["scalars"] if tag.startswith("relu_doctor_sites_weight_norm/")]
    assert len(norms) == 300
    assert not any("effective_rank" in tag for tag in events.Tags()["scalars"]), "it was not measured"
    assert points(events, "relu_doctor_sites/l7/dead_fraction")[0][1] == pytest.approx(0.3)


def test_sites_never_share_a_tag(tmp_path):
    """Names that differ only in what a tag cannot hold stay apart, also when one is met later."""
    names = ("a/b", "a b", "a:b", "a\u202eb", NAME)
    made = [site(name, active=i + 1) for i, name in enumerate(names)]
    with TensorBoardSink(tmp_path) as sink:
        sink.write(make_diagnosis(*made[2:]), 1)
        sink.write(make_diagnosis(*made), 2)
    tags = [tag for tag in events_of(tmp_path).Tags()["scalars"] if tag.startswith("relu_doctor_sites/")]
    assert len(tags) == len(names)
    assert all(tag.count("/") == 2 and tag.isprintable() for tag in tags)


def test_names_are_no_markdown():
    """TensorBoard's own renderer shows a hostile name letter by letter, and links lead to our tab only."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the sanitizer that comes with TensorBoard says of itself that it is old
        from tensorboard.plugin_util import markdown_to_safe_html
    diagnosis = make_diagnosis(site(NAME, active=6, negative_bias=4), site("b", active=4), notes=(NAME,))
    for text in (verdict_markdown(diagnosis), findings_markdown(diagnosis)):
        html = markdown_to_safe_html(text)
        assert NAME in unescape(html)
        assert all(link.startswith("#relu_doctor&") for link in re.findall('<a href="([^"]*)"', unescape(html)))
        assert "<img" not in html
        assert "<code>" not in html
        assert "<strong>" in html


def test_a_finding_leads_to_its_site():
    """The link is the address of the tab with the site's id, whatever is in it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tensorboard.plugin_util import markdown_to_safe_html
    html = markdown_to_safe_html(findings_markdown(make_diagnosis(site("a_(b)*", active=6, negative_bias=4))))
    assert '<a href="#relu_doctor&amp;p.relu_doctor.site=id-a_%28b%29%2A">' in html
    assert "a_(b)*</a>:" in unescape(html)


def test_findings_are_written_when_they_change_and_at_the_close(tmp_path):
    """Not in every window."""
    with TensorBoardSink(tmp_path) as sink:
        for index, dead in enumerate((0, 0, 2, 2, 3)):
            sink(window_of(make_diagnosis(site("a", active=20 - dead, negative_bias=dead)), index))
    told = texts(events_of(tmp_path), "findings")
    assert [step // PERIOD for step in told] == [0, 2, 4]
    assert "3 of 20" in list(told.values())[-1]


def test_a_writer_of_the_users_is_written_to_and_stays_open(tmp_path):
    """Its own events and ours are one run; there is no other file."""
    with SummaryWriter(tmp_path) as writer:
        with TensorBoardSink(writer) as sink:
            sink(window_of(make_diagnosis(site("a", active=8))))
        writer.add_scalar("own", 1.0, 7)
    events = events_of(tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    assert points(events, "own") == [(7, 1)]
    assert points(events, "relu_doctor/dead_fraction") == [(PERIOD - 1, 0)]
    assert events.Tensors(WINDOWS_TAG)


def test_numbers_may_be_left_to_others(tmp_path):
    """Without scalars: records, histograms, texts and pictures, neither layout nor settings."""
    with TensorBoardSink(tmp_path, scalars=False) as sink:
        sink(window_of(make_diagnosis(site("a", active=8))))
    tags = events_of(tmp_path).Tags()
    assert tags["scalars"] == []
    assert set(tags["tensors"]) == {
        WINDOWS_TAG,
        UNITS_TAG,
        *(f"relu_doctor/{name}/text_summary" for name in ("verdict", "findings")),
    }
    assert tags["images"]


def test_a_resumed_run_takes_the_place_of_what_was_there(tmp_path):
    """From its first step on, in a directory that is ours alone; another's events are not touched."""
    for own, folder in ((True, tmp_path / "own"), (False, tmp_path / "shared")):
        if not own:
            with SummaryWriter(folder) as writer:
                writer.add_scalar("loss", 1.0, 39)
        for rate, indices in ((0.1, range(4)), (0.2, range(2, 4))):
            with TensorBoardSink(folder) as sink:
                for index in indices:
                    sink(window_of(make_diagnosis(site("a", active=8)), index, numbers={"lr": rate}))
        events = events_of(folder)
        told = [round(value, 1) for _, value in points(events, "relu_doctor/lr")]
        assert told == ([0.1, 0.1, 0.2, 0.2] if own else [0.1, 0.1, 0.1, 0.1, 0.2, 0.2])
        assert own or points(events, "loss") == [(39, 1)]


def test_two_open_sinks_in_one_directory_are_warned_of_and_lose_nothing(tmp_path):
    """What the first one wrote is still there, and the directory is free again once both are closed."""
    with TensorBoardSink(tmp_path) as first:
        first(window_of(make_diagnosis(site("a", active=8)), 0, numbers={"lr": 0.1}))
        with pytest.warns(ReLUDoctorWarning, match="another TensorBoardSink that is still open") as caught:
            second = TensorBoardSink(tmp_path / ".." / tmp_path.name)
        assert caught[0].filename == __file__
        with second:
            second(window_of(make_diagnosis(site("a", active=8)), 0, numbers={"lr": 0.2}))
    told = sorted(round(value, 1) for _, value in points(events_of(tmp_path), "relu_doctor/lr"))
    assert told == [0.1, 0.2]
    TensorBoardSink(tmp_path).close()


def test_scans_that_are_written_again_take_the_place_of_the_first(tmp_path):
    """They do not pile up."""
    for _ in range(2):
        with TensorBoardSink(tmp_path) as sink:
            for step in (100, 200):
                sink.write(make_diagnosis(site("a", active=8)), step)
    assert [step for step, _ in points(events_of(tmp_path), "relu_doctor/dead_fraction")] == [100, 200]


def test_a_step_is_a_whole_number(tmp_path):
    """Also one of numpy's; of anything else it is said in a sentence."""
    with TensorBoardSink(tmp_path) as sink:
        sink.write(make_diagnosis(site("a", active=8)), np.int64(3))
        for step in ("7", 1.5, None):
            with pytest.raises(ConfigError, match="step= expects a whole number, found"):
                sink.write(make_diagnosis(site("a", active=8)), step)
    assert [step for step, _ in points(events_of(tmp_path), "relu_doctor/dead_fraction")] == [3]


def test_the_layout_names_tags_that_are_written(tmp_path):
    """Each chart of the layout finds at least one."""
    with TensorBoardSink(tmp_path) as sink:
        sink(window_of(make_diagnosis(site("a", active=8))))
    tags = events_of(tmp_path).Tags()["scalars"]
    for _, wanted in LAYOUT["ReLU Doctor"].values():
        for each in wanted:
            assert any(re.match(each, tag) for tag in tags), each


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"target": 7}, "expects a directory or a SummaryWriter of torch.utils.tensorboard, found int"),
        ({"target": "s3://bucket/run"}, "writes to directories of this machine, found 's3://bucket/run'"),
        ({"detail": "most"}, "detail= expects 'worst' or 'all', found 'most'"),
        ({"hparams": {"sizes": [1, 2]}}, "expects text, numbers and truth values, found list for 'sizes'"),
    ],
)
def test_misuse_is_one_sentence(arguments, sentence, tmp_path):
    """It says what was expected and what was found."""
    with pytest.raises(ConfigError, match=re.escape(sentence)) as caught:
        TensorBoardSink(**{"target": tmp_path, **arguments})
    assert str(caught.value).count("\n") == 0


def test_a_directory_that_cannot_be_written_is_one_sentence(tmp_path):
    """It names the directory and says what to do."""
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OutputError, match=r"^cannot write TensorBoard events to '.*'; give|: .*; give") as caught:
            TensorBoardSink(path)
        assert str(caught.value).count("\n") == 0


def test_closing_twice_is_fine_and_writing_then_is_an_error(tmp_path):
    """Nothing is written to a sink that is closed."""
    sink = TensorBoardSink(tmp_path / "new" / "folder")
    sink.close()
    sink.close()
    with pytest.raises(ValueError, match="closed"):
        sink.write(make_diagnosis(site("relu", active=1)), 0)
    with pytest.raises(ValueError, match="closed"):
        sink(window_of(make_diagnosis(site("relu", active=1))))
