"""What becomes of a window when it closes: evidence is merged, judged, and told of each unit since when it is so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from relu_doctor.config import Config
from relu_doctor.diagnose.diagnosis import Diagnosis, diagnose
from relu_doctor.diagnose.table import Coverage, UnitTable, tabulate
from relu_doctor.observe.sites import ActivationSite
from relu_doctor.observe.statistics.stats import UnitStats
from relu_doctor.terms import Status
from relu_doctor.training.evidence import Carrier, Evidence, Sightings
from relu_doctor.training.lives import Lives, SiteLives
from relu_doctor.training.maturity import Maturity
from relu_doctor.training.seen import Seen
from relu_doctor.training.windows import SITE_COLUMNS, UNIT_COLUMNS

_JUDGED = ("inputs", "inputs_fired", "weight_l2", "dormancy")
Columns = dict[str, NDArray[Any]]
_DORMANT = 0.025  # of the site's mean output: Sokar et al. 2023, where a profile sets no other


class Closer:
    """Judges windows one after the other, and remembers what the next one needs.

    Args:
        model: read for its parameters.
        config: thresholds.
        from_start: the run was watched from before its first update.
        maturity: tells which units are not judged yet.

    Attributes:
        mistrusted: ``site_id`` of sites whose parameters have gradients that their units do not send.
        treatments: those that no window has been judged with: the step after which, the ``site_id``, and bool (units,).
    """

    def __init__(self, model: nn.Module, config: Config, *, from_start: bool, maturity: Maturity) -> None:
        self.lives = Lives()
        self.carrier = Carrier()
        self.sightings = Sightings()
        self.mistrusted: set[str] = set()
        self.treatments: list[tuple[int, str, Tensor]] = []
        self._model = model
        self._config = config
        self._from_start = from_start
        self._maturity = maturity
        self._dormant: dict[str, Tensor] = {}

    def close(self, seen: Seen, sites: Sequence[ActivationSite]) -> tuple[Diagnosis, pd.DataFrame, pd.DataFrame]:
        """Judge a window.

        Args:
            seen: what was seen in it.
            sites: known so far.

        Returns:
            The diagnosis, and the rows per site and per unit that a :class:`~relu_doctor.training.windows.Window` has.
        """
        for digests, count in seen.told:
            self.sightings.add(digests, count, seen.index)
        self._begin_anew(seen.last_step)
        seen = replace(seen, notes=(*seen.notes, *self._mistrust(seen, sites)))
        stats = {site.site_id: self._lived(seen, site) for site in sites if site.site_id in seen.stats}
        evidence = self.carrier.take_in(seen.index, stats)
        table = self._table(seen, sites, evidence)
        diagnosis = diagnose(table, self._config)
        judged = {name: diagnosis.units[name].to_numpy() for name in _JUDGED}
        dead = diagnosis.units["status"].to_numpy(object) == Status.DEAD.value
        of_sites: list[dict[str, object]] = []
        of_units: list[Columns] = []
        stop = 0
        for site in sites:
            if not site.num_units:
                of_sites.append({"site_id": site.site_id})
                continue
            start, stop = stop, stop + site.num_units
            rows = {name: values[start:stop] for name, values in judged.items()}
            lives = self.lives.of(site.site_id, site.num_units)
            died, revived = lives.judged(torch.from_numpy(dead[start:stop].copy()))
            of_sites.append(
                {
                    "site_id": site.site_id,
                    "deaths": int(died.sum()),
                    "revivals": int(revived.sum()),
                    "update_ratio": _largest(seen.ratios.get(site.site_id)),
                    "weight_norm": _mean(rows["weight_l2"]),
                    "dormant_overlap": self._overlap(site.site_id, rows["dormancy"]),
                    "effective_rank": seen.effective_ranks.get(site.site_id, float("nan")),
                }
            )
            of_units.append(self._units(site, lives, rows, table.coverage, seen.reference.get(site.site_id)))
        per_site = pd.DataFrame(of_sites, columns=["site_id", *SITE_COLUMNS]).astype({"site_id": object})
        names = ["site_id", "unit", *UNIT_COLUMNS]
        whole = {name: np.concatenate([columns[name] for columns in of_units]) for name in names} if of_units else None
        return diagnosis, per_site, pd.DataFrame(whole, columns=names)

    def _begin_anew(self, last_step: int) -> None:
        """Forget what units were before they were treated; a window of several ranks may be judged after that."""
        for step, site_id, units in self.treatments:
            if step < last_step:
                self.lives.of(site_id, len(units)).treat(units, step)
                self.carrier.forget(site_id, units)
        self.treatments = [each for each in self.treatments if each[0] >= last_step]

    def _mistrust(self, seen: Seen, sites: Sequence[ActivationSite]) -> list[str]:
        """Do not listen to the gradients of sites where a unit had one that was silent on all inputs of its step.

        Where forwards are observed apart, some units may fire in one and not in the other: then all that were silent
        must have had one.

        Returns:
            Remarks for the report, of all such sites.
        """
        for site in sites:
            stats, checked = seen.stats.get(site.site_id), seen.checked.get(site.site_id)
            if stats is not None and checked is not None and len(checked) == stats.num_units:
                in_it = (checked >= seen.first_step) & torch.isin(checked, seen.steps)
                wrong = in_it & (checked > stats.last_fired)
                if bool(wrong.any()) and (not seen.apart or _all_silent(wrong, checked, stats.last_fired)):
                    self.mistrusted.add(site.site_id)
        return [
            f"{site.name}: its parameters have gradients that its units do not send (a penalty in the loss, noise, "
            "forwards that were not observed): only observed forwards tell which units fire"
            for site in sites
            if site.site_id in self.mistrusted
        ]

    def _lived(self, seen: Seen, site: ActivationSite) -> UnitStats:
        """A site's statistics of the window; a unit that only its gradient saw fire is counted as fired once."""
        stats, heard = seen.stats[site.site_id], seen.heard.get(site.site_id)
        heard = None if site.site_id in self.mistrusted else heard
        lives = self.lives.of(site.site_id, site.num_units)
        first, fired = stats.first_fired, stats.last_fired
        if heard is not None:
            between = (stats.inputs_fired == 0) & (heard >= seen.first_step) & ~torch.isin(heard, seen.steps)
            stats = replace(stats, inputs_fired=torch.where(between, stats.inputs.clamp_max(1), stats.inputs_fired))
            first = torch.where(heard >= seen.first_step, torch.minimum(first, heard), first)
            fired = torch.maximum(fired, heard)
        lives.update(first, fired, seen.steps)
        return stats

    def _table(self, seen: Seen, sites: Sequence[ActivationSite], evidence: Mapping[str, Evidence]) -> UnitTable:
        oldest = min((int(each.since.min()) for each in evidence.values() if len(each.since)), default=seen.index)
        most = max((int(each.stats.inputs.max()) for each in evidence.values() if len(each.since)), default=0)
        distinct = min(most, self.sightings.since(oldest))
        share = distinct / most if most else 1.0
        coverage = Coverage(
            num_inputs=most, distinct_inputs=distinct, sampling="observed", mode="train", notes=seen.notes,
            passed="the run's own batches",
        )  # fmt: skip
        judged = {site_id: self._capped(site_id, each, share, seen.last_step) for site_id, each in evidence.items()}
        return tabulate(self._model, list(sites), judged, coverage)

    def _capped(self, site_id: str, evidence: Evidence, share: float, last_step: int) -> UnitStats:
        """Let no unit be silent on more inputs than were distinct; ordinals of inputs mean nothing over windows.

        Of units that are exempt one input at most counts, which proves nothing, and their outputs are not told.
        """
        windows, place = evidence.since.unique(return_inverse=True)
        distinct = torch.tensor([self.sightings.since(int(window)) for window in windows], dtype=torch.float64)
        most = (distinct[place] / share).floor().long() if share else torch.zeros_like(evidence.since)
        stats, silent = evidence.stats, evidence.stats.inputs_fired == 0
        young = self._maturity.are_young(self.lives.of(site_id, stats.num_units).treated, last_step)
        most = torch.where(young, most.clamp_max(1), most)
        inputs = torch.where(silent, torch.minimum(stats.inputs, most), stats.inputs)
        outputs = torch.where(young, torch.nan, stats.post_abs_sum)
        empty = UnitStats.empty(stats.num_units)
        return replace(
            stats, inputs=inputs, post_abs_sum=outputs, first_fired=empty.first_fired, last_fired=empty.last_fired
        )

    def _overlap(self, site_id: str, dormancy: NDArray[Any]) -> float:
        """Which part of the units that were dormant at the last window is so still; NaN where none was."""
        tau = self._config.dormancy_tau or _DORMANT
        now = torch.from_numpy(dormancy <= tau)
        before = self._dormant.get(site_id)
        self._dormant[site_id] = now
        if before is None or not bool(before.any()):
            return float("nan")
        return int((before & now).sum()) / int(before.sum())

    def _units(
        self, site: ActivationSite, lives: SiteLives, rows: Columns, coverage: Coverage, reference: UnitStats | None
    ) -> Columns:
        kinds, steps = lives.onsets(from_start=self._from_start)
        share = coverage.distinct_inputs / max(coverage.num_inputs, 1)
        distinct = np.floor(rows["inputs"] * share + 1e-9).astype(np.int64)
        silent = np.where(rows["inputs_fired"] == 0, distinct, 0)
        rate = self._config.for_site(site.name).max_firing_rate
        referred = reference or UnitStats.empty(site.num_units)
        told = kinds != ""
        return {
            "site_id": np.full(site.num_units, site.site_id, dtype=object),
            "unit": np.arange(site.num_units),
            "onset": kinds,
            "onset_step": steps,
            "onset_confidence": np.where(told & (silent > 0), 1 - (1 - rate) ** silent, np.where(told, 1.0, np.nan)),
            "silent_since": lives.silent_from.numpy(),
            "silent_inputs": silent,
            "reference_inputs": referred.inputs.cpu().numpy(),
            "reference_fired": referred.inputs_fired.cpu().numpy(),
        }


def _all_silent(wrong: Tensor, checked: Tensor, last_fired: Tensor) -> bool:
    """Whether all units that were silent at the last step that was checked had a gradient in it."""
    latest = checked.max()
    return torch.equal(wrong & (checked == latest), last_fired < latest)


def _mean(values: NDArray[Any]) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def _largest(values: Tensor | None) -> float:
    finite = None if values is None else values[values.isfinite()]
    return float(finite.max()) if finite is not None and len(finite) else float("nan")
