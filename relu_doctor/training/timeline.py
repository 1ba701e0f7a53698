"""Timeline: one row per window and site, put together when somebody looks at it."""

from __future__ import annotations

import pandas as pd

from relu_doctor.training.windows import Window


class Timeline:
    """Of the windows that have closed; nothing of a unit is kept."""

    def __init__(self) -> None:
        self._rows: list[dict[str, object]] = []
        self._untold: list[tuple[dict[str, object], pd.DataFrame, pd.DataFrame]] = []

    def append(self, window: Window) -> None:
        """Take in a window."""
        span = {"window": window.index, "first_step": window.first_step, "last_step": window.last_step}
        self._untold.append((span | dict(window.numbers), window.diagnosis.sites, window.sites))

    def frame(self) -> pd.DataFrame:
        """All rows: the window and its steps, what is known of the site, and the numbers of the run."""
        for numbers, sites, others in self._untold:
            rows = sites.merge(others, on="site_id", how="left").to_dict("records")
            places = ("window", "first_step", "last_step")
            first = {name: numbers[name] for name in places}
            last = {name: value for name, value in numbers.items() if name not in places}
            self._rows += [{**first, **{str(key): value for key, value in row.items()}, **last} for row in rows]
        self._untold = []
        return pd.DataFrame(self._rows)
