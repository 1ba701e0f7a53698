"""scan over the zoo: exactly the planted units, at exactly the sites that there are, with the oracle's numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import relu_doctor
from relu_doctor.errors import FilterWarning, NothingObservedError
from tests.planting import Case, Site, clone, normal
from tests.reference import assert_columns_equal
from tests.zoo import CASES

EVERY_CASE = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def scan_case(case: Case, **arguments):
    model, batches = case.build()
    return relu_doctor.scan(model, batches, exhaustive=True, **{**case.scan, **arguments})


def dead_units(diagnosis) -> dict[str, set[int]]:
    return {name: set(mask.nonzero().flatten().tolist()) for name, mask in diagnosis.mask("dead").items()}


def scanned_sites(case: Case) -> tuple[Site, ...]:
    left_out = {pattern.removeprefix("!") for pattern in case.scan.get("sites", ())}
    return tuple(site for site in case.sites if site.name not in left_out)


def assert_as_planted(case: Case, diagnosis: relu_doctor.Diagnosis) -> None:
    sites = scanned_sites(case)
    assert {row.site: row.num_units for row in diagnosis.sites.itertuples()} == {s.name: s.num_units for s in sites}
    assert dead_units(diagnosis) == {site.name: set(site.dead) for site in sites}
    assert diagnosis.sites["unobserved"].sum() == 0
    assert diagnosis.summary["unobserved_sites"] == []
    for site in sites:
        rows = diagnosis.units[diagnosis.units["site"] == site.name].set_index("unit")
        assert rows.loc[sorted(site.once), "inputs_fired"].tolist() == [1] * len(site.once)


@EVERY_CASE
def test_exactly_the_planted_units_are_dead_and_the_numbers_are_the_oracles(case):
    """Sites, their sizes and dead units are the planted ones; every column is the one that an oracle computes.

    The oracle stores all pre-activations at the dispatcher; by it alone dead units fire on no input, once-units on one.
    A unit that fired once is never dead.
    """
    model, batches = case.build()
    seen = case.seen(model, batches)
    diagnosis = relu_doctor.scan(model, batches, exhaustive=True, **case.scan)
    assert_as_planted(case, diagnosis)
    units = diagnosis.units
    masks = [case.mask(batch).numpy() for batch in batches] if case.mask else None
    for site in scanned_sites(case):
        expected = seen[site.name].columns(site.fires, site.post, masks)
        if not site.immortal:
            fired = expected["inputs_fired"]
            assert {unit for unit, count in enumerate(fired) if count == 0} == set(site.dead)
            assert {unit for unit, count in enumerate(fired) if count == 1} == set(site.once)
        found = units[units["site"] == site.name]
        found = found.assign(**{name: found[name].fillna(-1).astype(int) for name in ("first_fired", "last_fired")})
        assert_columns_equal(found, expected)


@pytest.mark.parametrize(
    "name", ["mlp", "resnet", "functions", "relu6", "crelu", "padded_mappings", "recurrent_over_steps", "brain_float"]
)
def test_the_minimal_statistics_suffice_for_the_verdict(name):
    """statistics="minimal" finds the same units."""
    assert_as_planted(CASES[name], scan_case(CASES[name], statistics="minimal"))


@pytest.mark.parametrize("name", ["mlp", "resnet", "sequences", "recurrent_over_steps", "relu6"])
def test_readable_names_and_ids_last(name):
    """Names and ids are the same in a second scan, of a copy, and in other batches."""
    first, second = scan_case(CASES[name]), scan_case(CASES[name])
    model, batches = CASES[name].build()
    third = relu_doctor.scan(nn.Sequential(model)[0], list(reversed(batches)), exhaustive=True)
    for other in (second, third):
        assert other.sites[["site", "site_id"]].equals(first.sites[["site", "site_id"]])


def test_a_skipped_branch_does_not_renumber_the_others():
    """A site keeps its number when another branch was not taken, as long as it stands in the model; ids always."""
    model, batches = CASES["skipped_layers"].build()
    both = relu_doctor.scan(model, batches, exhaustive=True)
    late = relu_doctor.scan(model, batches[1:], exhaustive=True)  # begins with the branch left out
    assert dict(zip(late.sites["site"], late.sites["site_id"], strict=True)) == dict(
        zip(both.sites["site"], both.sites["site_id"], strict=True)
    )


def test_the_wrapped_model_is_the_model():
    """DataParallel and compile wrappers change neither names nor ids."""
    model, batches = CASES["mlp"].build()
    plain = relu_doctor.scan(model, batches, exhaustive=True).sites
    for wrapped in (nn.DataParallel(model), torch.compile(model, backend="eager")):
        assert relu_doctor.scan(wrapped, batches, exhaustive=True).sites.equals(plain)


def test_a_site_sees_only_the_inputs_of_its_branch():
    """Of a branch chosen by data the inputs are those that took it."""
    diagnosis = scan_case(CASES["branches_by_data"])
    assert diagnosis.units.groupby("site")["inputs"].first().to_dict() == {"relu()#1": 24, "relu()#2": 16}


# --- what is read, and how it is passed -------------------------------------------------------------------------------


def small(dead: int | None = 1, width: int = 4) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, width), nn.ReLU())
    if dead is not None:
        with torch.no_grad():
            model[0].bias[dead] = -100
    return model


class Marking(nn.Module):
    """A model whose unit k fires on inputs whose first feature is k."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(classes))
        self.bias = nn.Parameter(torch.full((classes,), -0.5))

    def forward(self, x):
        return torch.relu(nn.functional.one_hot(x[:, 0].long(), len(self.bias)).float() @ self.weight + self.bias)


def sorted_by_class(per_class: int = 50, classes: int = 10) -> Tensor:
    """Distinct inputs, sorted by class as validation sets come."""
    labels = torch.arange(classes).repeat_interleave(per_class).float()
    return torch.stack([labels, torch.arange(len(labels)).float()], 1)


SOURCES = {
    "list": lambda x: list(x.split(64)),
    "tuple": lambda x: tuple(x.split(64)),
    "tensor": lambda x: x,
    "numpy": lambda x: x.numpy(),
    "loader": lambda x: DataLoader(TensorDataset(x), batch_size=64),
    "shuffled": lambda x: DataLoader(TensorDataset(x), batch_size=64, shuffle=True),
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("limit", [20, 100])
def test_a_limited_read_is_spread_evenly(source, limit):
    """Of a source with a length a part is read from all of it: every class of a sorted set is met."""
    diagnosis = relu_doctor.scan(Marking(), SOURCES[source](sorted_by_class()), max_inputs=limit)
    assert diagnosis.table.coverage.num_inputs == limit
    assert diagnosis.table.coverage.available_inputs == 500
    assert diagnosis.table.coverage.sampling == "spread"
    assert not diagnosis.table.coverage.read_to_end
    assert (diagnosis.units["inputs_fired"] > 0).all()


def test_of_a_generator_the_head_is_read():
    """A stream is read from its start, cut in the middle of a batch, and no further."""
    given: list[int] = []

    def stream():
        for index, batch in enumerate(sorted_by_class().split(64)):
            given.append(index)
            yield batch

    coverage = relu_doctor.scan(Marking(), stream(), max_inputs=100).table.coverage
    assert (coverage.num_inputs, coverage.sampling, coverage.available_inputs) == (100, "head", None)
    assert given == [0, 1]


@pytest.mark.parametrize("source", [*SOURCES, "generator"])
def test_auto_reads_no_more_than_the_bound_needs(source):
    """Auto stops at the first batch that settles every silent unit."""
    inputs = torch.randn(5000, 3, generator=torch.Generator().manual_seed(0))
    data = (batch for batch in inputs.split(64)) if source == "generator" else SOURCES[source](inputs)
    diagnosis = relu_doctor.scan(small(), data, max_inputs="auto")
    needed = diagnosis.summary["inputs_needed"]
    assert needed <= diagnosis.table.coverage.num_inputs < needed + 64
    assert diagnosis.summary["dead"] == 1
    assert not diagnosis.table.coverage.read_to_end


def test_a_short_source_is_read_to_its_end_whatever_the_limit():
    """A limit beyond the source's length changes nothing."""
    for limit in (20, 1000, "auto"):
        coverage = relu_doctor.scan(small(), torch.randn(20, 3), max_inputs=limit).table.coverage
        assert (coverage.num_inputs, coverage.sampling, coverage.read_to_end) == (20, "all", True)


def test_an_iterable_is_iterated_once_and_never_held():
    """A generator is consumed lazily, one batch at a time, and each batch let go."""
    alive: list[int] = []

    class Tracked(Tensor):
        pass

    count = 0

    def stream():
        nonlocal count
        for _ in range(5):
            count += 1
            yield torch.randn(4, 3)
            alive.append(count)

    diagnosis = relu_doctor.scan(small(), stream())
    assert diagnosis.table.coverage.num_inputs == 20
    assert alive == [1, 2, 3, 4, 5]


def test_the_coverage_says_what_was_passed():
    """Of a tuple the leading elements that the forward requires, of a mapping the keys that it takes."""
    model, batches = CASES["two_inputs"].build()
    assert "the first 2 of 3 elements" in relu_doctor.scan(model, batches).table.coverage.passed
    model, batches = CASES["padded_mappings"].build()
    coverage = relu_doctor.scan(model, batches).table.coverage
    assert "input_ids int64[Nx6]" in coverage.passed
    assert "extra" not in coverage.passed
    assert coverage.masked


def test_a_mask_of_ones_changes_nothing_and_padding_counts_for_nothing():
    """Masked positions leave no trace in any column; an input that is all padding is no input."""
    model, _ = CASES["sequences"].build()
    x = torch.randn(12, 5, 6)
    plain = relu_doctor.scan(model, x).units
    ones = relu_doctor.scan(model, x, mask=lambda batch: torch.ones(12, 5, dtype=torch.bool)).units
    mask = torch.ones(14, 5, dtype=torch.bool)
    mask[12:] = False
    padded = torch.cat([x, torch.full((2, 5, 6), 1e6)])
    found = relu_doctor.scan(model, padded, mask=lambda batch: mask).units
    same = ["inputs", "inputs_fired", "positions", "positions_fired", "pre_max", "pre_min", "first_fired", "last_fired"]
    assert found[same].equals(plain[same])
    assert ones[same].equals(plain[same])
    for name in ("pre_mean", "pre_std", "dormancy", "position_firing_rate"):
        np.testing.assert_allclose(ones[name], plain[name], rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(found[name], plain[name], rtol=1e-5, atol=1e-7)


def test_inputs_that_repeat_count_for_nothing_in_the_bound():
    """Passing over a set twice proves nothing more: the bound is that of the distinct inputs."""
    x = torch.randn(400, 3)
    once, twice = relu_doctor.scan(small(), [x]), relu_doctor.scan(small(), [x, x])
    assert twice.table.coverage.distinct_inputs == 400
    assert twice.units["firing_rate_upper"].equals(once.units["firing_rate_upper"])
    assert "RD404" in {finding.code for finding in twice.findings}
    assert "RD404" not in {finding.code for finding in once.findings}
    assert relu_doctor.scan(small(), x[:1].repeat(1000, 1)).summary["dead"] == 0


# --- choices ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patterns", "kept"),
    [
        (None, ["relu", "layer1.0.relu#1", "layer1.0.relu#2", "layer2.0.relu#1", "layer2.0.relu#2"]),
        ("relu", ["relu"]),
        (["layer1.*"], ["layer1.0.relu#1", "layer1.0.relu#2"]),
        (["layer1.0.relu"], ["layer1.0.relu#1", "layer1.0.relu#2"]),
        (["layer*", "!*#2"], ["layer1.0.relu#1", "layer2.0.relu#1"]),
        (["!layer*"], ["relu"]),
    ],
)
def test_patterns_choose_sites(patterns, kept):
    """Globs include, with ! exclude; a name without its number means all of a module."""
    assert scan_case(CASES["resnet"], sites=patterns).sites["site"].tolist() == kept


def test_a_pattern_that_matches_nothing_is_a_warning():
    """A misspelled pattern is told, in sites= and in the configuration."""
    for arguments in ({"sites": ["!nowhere"]}, {"config": {"ignore_sites": ["nowhere"]}}):
        with pytest.warns(FilterWarning, match="'!?nowhere' matches no site"):
            relu_doctor.scan(small(), torch.randn(9, 3), **arguments)
    with pytest.warns(FilterWarning), pytest.raises(NothingObservedError, match="left none of 1 sites"):
        relu_doctor.scan(small(), torch.randn(9, 3), sites="nowhere")


def test_ignored_sites_are_left_out_and_counted():
    """The configuration leaves sites out; the coverage says how many."""
    diagnosis = scan_case(CASES["resnet"], config={"ignore_sites": ["layer1.*"]})
    assert diagnosis.sites["site"].tolist() == ["relu", "layer2.0.relu#1", "layer2.0.relu#2"]
    assert diagnosis.table.coverage.excluded == 2


def test_overrides_of_a_site_hold_at_that_site():
    """Thresholds of single sites decide there and nowhere else."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU())
    with torch.no_grad():
        model[0].bias[1] = model[2].bias[2] = -100
    diagnosis = relu_doctor.scan(
        model,
        normal(6, sizes=(600,))(),
        config={"sites": {"1": {"max_firing_rate": 0.001}, "3": {"rare_firing_rate": 0.9}}},
    )
    statuses = diagnosis.units.groupby("site")["status"].agg(set)
    assert "dead" not in statuses["1"]
    assert "unproven" in statuses["1"]
    assert {"rare", "dead"} <= statuses["3"]
    assert diagnosis.summary["inputs_needed"] == 5701


def test_a_named_unit_axis_is_taken():
    """Where the units' axis cannot be told, the configuration names it."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.PixelShuffle(2), nn.ReLU())
    diagnosis = relu_doctor.scan(model, torch.randn(6, 3, 5, 5), config={"sites": {"2": {"unit_axis": 1}}})
    assert diagnosis.sites[["site", "num_units"]].values.tolist() == [["2", 2]]


def test_both_modes_tell_stale_statistics():
    """A channel that only BatchNorm's running mean silences is a finding of its own."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU())
    model[1].running_mean[2] = 50
    diagnosis = relu_doctor.scan(model, normal(6, sizes=(400, 400))(), mode="both")
    stale = [finding for finding in diagnosis.findings if finding.code == "RD601"]
    assert [finding.unit_indices for finding in stale] == [(2,)]
    assert dead_units(diagnosis) == {"2": {2}}
    assert relu_doctor.scan(model, normal(6, sizes=(400, 400))(), mode="train").summary["dead"] == 0


@pytest.mark.parametrize("mode", ["eval", "train", "both"])
def test_modes_are_those_asked_for(mode):
    """In train mode BatchNorm uses the batch; in eval mode its running statistics; the flags are set for each."""
    seen = []

    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x):
            seen.append(self.training)
            return torch.relu(self.fc(x))

    relu_doctor.scan(Asks(), torch.randn(9, 3), mode=mode)
    assert set(seen) == {"eval": {False}, "train": {True}, "both": {True, False}}[mode]


def test_the_users_own_rectifier_is_seen_and_its_interval_probed():
    """rectifiers= names a class, or a class with its firing interval."""

    class Shifted(nn.Module):
        def forward(self, x):
            return torch.where(x > -1, x + 1, torch.zeros_like(x))

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), Shifted())
    with torch.no_grad():
        model[0].bias[2] = -100
    for given in ([Shifted], {Shifted: (-1.0, float("inf"))}):
        diagnosis = relu_doctor.scan(model, torch.randn(50, 3), rectifiers=given, exhaustive=True)
        assert diagnosis.sites[["site", "rectifier", "dead"]].values.tolist() == [["1", "Shifted", 1]]
        assert diagnosis.table.sites[0].low == pytest.approx(-1.0, abs=0.011)


def test_progress_is_told():
    """A progress function hears of every batch: inputs read, and inputs in all where that is known."""
    heard: list[tuple[int, int | None]] = []
    relu_doctor.scan(
        small(), list(torch.randn(20, 3).split(8)), progress=lambda done, total: heard.append((done, total))
    )
    assert heard == [(8, 20), (16, 20), (20, 20)]


def test_a_site_that_no_parameter_feeds_is_named_by_its_place():
    """A rectifier on raw input is known by its module and the order of its calls, and says so."""
    diagnosis = relu_doctor.scan(nn.Sequential(nn.ReLU(), nn.Linear(3, 2), nn.ReLU()), torch.randn(9, 3))
    assert diagnosis.table.sites[0].note.startswith("no weighted operation")
    assert diagnosis.sites["num_units"].tolist() == [3, 2]


def test_a_site_whose_axis_cannot_be_told_is_unobserved_beside_others():
    """What cannot be seen is named, and is not dead."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 4), nn.Linear(5, 6)
            self.register_buffer("mixture", torch.randn(4, 5))

        def forward(self, x):
            return torch.relu(self.second(torch.relu(self.first(x) @ self.mixture)))

    diagnosis = relu_doctor.scan(Mixed(), torch.randn(6, 3))
    assert diagnosis.summary["unobserved_sites"] == ["relu()#1"]
    assert diagnosis.sites.set_index("site").loc["relu()#1", ["num_units", "dead"]].tolist() == [0, 0]
    assert any("the axis of its units could not be told" in finding.evidence for finding in diagnosis.findings)


class Stacked(nn.Module):
    """Two layers under one rectifier, joined in one way or another; unit 1 of the first is dead."""

    def __init__(self, join) -> None:
        super().__init__()
        self.a, self.b, self.join = nn.Linear(3, 4), nn.Linear(3, 4), join
        with torch.no_grad():
            self.a.bias[1] = -100.0

    def forward(self, x):
        return torch.relu(self.join(self.a(x), self.b(x)))


@pytest.mark.parametrize(
    "join", [lambda a, b: torch.stack([a, b], 1), lambda a, b: torch.cat([a[:, None], b[:, None]], 1)]
)
def test_layers_that_are_stacked_under_one_rectifier_keep_their_units(join):
    """A dead unit does not hide behind a live one of another layer: each layer's units are units of their own."""
    diagnosis = relu_doctor.scan(Stacked(join), torch.randn(900, 3))
    assert diagnosis.sites["num_units"].tolist() == [8]
    assert dead_units(diagnosis) == {"relu()": {1}}


def test_layers_that_share_a_rectifier_side_by_side_are_not_pooled():
    """Where layers feed different places that no axis tells apart, the site is not observed, and says why."""
    model = Stacked(lambda a, b: torch.cat([a[:, None].expand(-1, 2, -1), b[:, None]], 1))
    with pytest.raises(NothingObservedError, match="several layers feed different places"):
        relu_doctor.scan(model, torch.randn(900, 3))


def test_layers_that_are_summed_or_concatenated_are_told():
    """A sum is one unit of two layers; a concatenation along the units keeps them apart."""
    assert relu_doctor.scan(Stacked(torch.add), torch.randn(900, 3)).sites["dead"].tolist() == [1]
    joined = relu_doctor.scan(Stacked(lambda a, b: torch.cat([a, b], 1)), torch.randn(900, 3))
    assert joined.sites[["num_units", "dead"]].values.tolist() == [[8, 1]]


def test_a_rectifier_that_is_never_called_is_unobserved():
    """A module that no forward reached is listed, and is not dead."""
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    model.add_module("spare", nn.Identity())
    model.spare.act = nn.ReLU()
    diagnosis = relu_doctor.scan(model, torch.randn(9, 3))
    assert diagnosis.summary["unobserved_sites"] == ["spare.act"]
    assert diagnosis.summary["num_sites"] == 2
    assert diagnosis.summary["num_observed_sites"] == 1


def test_the_users_batches_are_not_written_to():
    """A forward that writes to its input writes to a copy."""
    model, batches = CASES["writes_to_its_input"].build()
    before = clone(batches)
    relu_doctor.scan(model, batches)
    assert all(torch.equal(a, b) for a, b in zip(before, batches, strict=True))
