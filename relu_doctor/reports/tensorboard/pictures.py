"""Pictures at the close of a run: the units of all sites by status, and those of the worst sites over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from relu_doctor.numerals import plural
from relu_doctor.reports.colours import STATUS_COLOURS
from relu_doctor.reports.frames import STATUSES, Frame
from relu_doctor.reports.tensorboard.past import UNKNOWN, Past
from relu_doctor.reports.tensorboard.tags import worst_of
from relu_doctor.reports.words import shorten
from relu_doctor.terms import Status

if TYPE_CHECKING:
    from PIL.Image import Image

_NAMES, _STRIP, _COUNTS = 250, 720, 200  # columns of a picture, in pixels
_EDGE, _GAP = 20, 12
_WIDTH = _EDGE + _NAMES + _STRIP + _COUNTS + _EDGE
_CELLS = (10, 8, 6, 5, 4, 3, 2, 1)  # pixels of a unit, as large as there is room
_HEIGHT = 1600  # of all strips together, about
_LINE = 18  # of a site at least
_MOST_SITES = 60
_MOST_UNITS = 40_000  # of a site that are drawn
_MOST_PANELS = 6
_TOP = 96  # of the first site
_INK, _FAINT = 27, 100  # shades of text
_SHORTEST, _TALLEST = 48, 160  # of a panel
_SILENT = [STATUSES.index(Status.DEAD.value), STATUSES.index(Status.UNPROVEN.value)]

_GREYS = 32  # shades of text and its edges

Pixels = NDArray[np.uint8]


def picture_of_units(frame: Frame) -> Image:
    """Sites in forward order, each a strip of its units in the colour of their status."""
    places = sorted(worst_of(frame, _MOST_SITES)) if len(frame.sites) > _MOST_SITES else range(len(frame.sites))
    stops = np.cumsum([0, *(site["num_units"] for site in frame.sites)], dtype=int).tolist()
    drawn = [(frame.sites[place], _thinned(frame.status[stops[place] : stops[place + 1]])) for place in places]
    cell = next((size for size in _CELLS if sum(_height(len(units), size) for _, units in drawn) <= _HEIGHT), 1)
    heights = [max(_height(len(units), cell), _LINE) for _, units in drawn]
    few = f"{len(drawn)} of {len(frame.sites)} sites: those that have lost most"
    sheet = _Sheet(_TOP + sum(heights) + _GAP * len(heights) + _EDGE)
    told = few if len(drawn) < len(frame.sites) else "one cell a unit, in order"
    sheet.head(f"Units by status after step {frame.span['last_step']:,}", told, frame, frame.status)
    top = _TOP
    for (site, units), height in zip(drawn, heights, strict=True):
        sheet.label(top, height, site)
        strip = _strip(units, cell)
        sheet.fill(_EDGE + _NAMES, top + max(0, (height - strip.shape[0]) // 2), strip)
        top += height + _GAP
    return sheet.image()


def picture_over_time(frame: Frame, past: Past) -> Image | None:
    """The worst sites, each a panel: its units over the windows of the run; ``None`` where there is one window.

    Those are the sites that had lost most in any window: a network that diverges in the end shows what it had lost.
    """
    steps = past.steps
    mortal = [site for site in frame.sites if site["can_die"] and site["num_units"]]
    losses = past.losses(mortal)
    order = sorted(range(len(mortal)), key=losses.__getitem__, reverse=True)[:_MOST_PANELS]
    sites = [mortal[place] for place in order if any(losses[place])]
    if len(steps) < 2 or not sites:
        return None
    panels = [(site, _sorted(history)) for site, history in zip(sites, past.of(sites), strict=True)]
    heights = [min(max(len(units) * 2, _SHORTEST), _TALLEST) for _, units in panels]
    sheet = _Sheet(_TOP + sum(heights) + 3 * _GAP * len(heights) + _EDGE)
    told = f"{plural(len(steps), 'window')}; units sorted by when they fell silent for good"
    sheet.head("The worst sites over time", told, frame, _known(np.concatenate([units[:, -1] for _, units in panels])))
    top = _TOP
    for (site, units), height in zip(panels, heights, strict=True):
        sheet.label(top, height, site)
        rows = np.arange(height) * len(units) // height
        columns = np.arange(_STRIP) * len(steps) // _STRIP
        sheet.fill(_EDGE + _NAMES, top, units[rows][:, columns])
        sheet.axis(top + height + 3, steps)
        top += height + 3 * _GAP
    return sheet.image()


class _Sheet:
    """A picture that is being drawn: grey text, and pixels that have the colour of a status."""

    def __init__(self, height: int) -> None:
        from PIL import Image, ImageDraw

        self._text = Image.new("L", (_WIDTH, height), 255)
        self._draw = ImageDraw.Draw(self._text)
        self._status = np.full((height, _WIDTH), UNKNOWN, np.uint8)

    def image(self) -> Image:
        """With a palette: the colours of the statuses as they are, and greys."""
        from PIL import Image

        greys = len(STATUSES) + np.asarray(self._text) // (256 // _GREYS)
        image = Image.fromarray(np.where(self._status == UNKNOWN, greys, self._status).astype(np.uint8), "P")
        colours = {status.value: list(bytes.fromhex(colour[1:])) for status, colour in STATUS_COLOURS.items()}
        shades = [[round(255 * shade / (_GREYS - 1))] * 3 for shade in range(_GREYS)]
        image.putpalette([part for colour in [*(colours[name] for name in STATUSES), *shades] for part in colour])
        return image

    def fill(self, left: int, top: int, status: Pixels) -> None:
        """Give pixels (rows, columns) the colours of statuses; ``UNKNOWN`` stays white."""
        rows, columns = status.shape
        self._status[top : top + rows, left : left + columns] = status

    def head(self, title: str, told: str, frame: Frame, shown: Pixels) -> None:
        """Title, verdict's label, and a legend of the statuses with the number of units that have them at the end."""
        self._write(_EDGE, 14, title, size=20)
        self._write(_EDGE, 42, f"ReLU Doctor: {frame.verdict['label']}. {told[:1].upper()}{told[1:]}.", shade=_FAINT)
        numbers = np.bincount(shown, minlength=len(STATUSES))
        left = _EDGE
        for status in STATUS_COLOURS:
            place = STATUSES.index(status.value)
            if number := int(numbers[place]):
                self._draw.rectangle((left, 67, left + 12, 79), outline=_FAINT)
                self.fill(left + 1, 68, np.full((11, 11), place, np.uint8))
                left += 18 + self._write(left + 18, 65, f"{status.value.replace('_', '-')} {number:,}") + 18

    def label(self, top: int, height: int, site: Mapping[str, Any]) -> None:
        """The name of a site at the left, what it has lost at the right."""
        middle = top + height // 2 - 8
        name = _drawable(str(site["name"]))
        width = 40
        while width > 8 and self._draw.textlength(shorten(name, width), font=_font(13)) > _NAMES - 12:
            width -= 1
        self._write(_EDGE, middle, shorten(name, width))
        self._write(_EDGE + _NAMES + _STRIP + 12, middle, told_of(site))

    def axis(self, top: int, steps: Sequence[int]) -> None:
        """First, middle and last step under a panel."""
        for share in (0.0, 0.5, 1.0):
            text = f"{'step ' if share == 0 else ''}{steps[round(share * (len(steps) - 1))]:,}"
            left = _EDGE + _NAMES + share * (_STRIP - self._draw.textlength(text, font=_font(11)))
            self._write(round(left), top, text, size=11, shade=_FAINT)

    def _write(self, left: int, top: int, text: str, *, size: int = 13, shade: int = _INK) -> int:
        """Write a line and return its width."""
        text = _drawable(text)
        self._draw.text((left, top), text, fill=shade, font=_font(size))
        return round(self._draw.textlength(text, font=_font(size)))


def told_of(site: Mapping[str, Any]) -> str:
    """What a site has lost, and of how many units that is not known; there is room for two numbers.

    >>> told_of({"num_units": 8, "dead": 0, "unproven": 0, "unobserved": 0, "non_finite": 8, "can_die": True})
    '8 not finite'
    """
    units = site["num_units"]
    told = f"{site['dead']:,} of {units:,} dead" if site["can_die"] else f"{units:,} units, cannot die"
    words = {"non_finite": "not finite", "unobserved": "not observed", "unproven": "unproven"}
    more = [f"{site[status]:,} {word}" for status, word in words.items() if site[status]]
    if units and site["non_finite"] + site["unobserved"] == units:
        return ", ".join(more)
    return ", ".join([told, *more[:1]])


@cache
def _font(size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _drawable(text: str) -> str:
    """Escapes for what the font that comes with Pillow has no glyph for."""
    return "".join(
        character if character.isascii() or character == "…" else character.encode("ascii", "backslashreplace").decode()
        for character in text
    )


def _thinned(status: Pixels) -> Pixels:
    """Of very many units some, evenly."""
    step = -(-len(status) // _MOST_UNITS) or 1
    return status[::step]


def _height(num_units: int, cell: int) -> int:
    return -(-num_units // (_STRIP // cell)) * cell


def _strip(status: Pixels, cell: int) -> Pixels:
    """A site's units, row by row; a single row is as high as a line."""
    columns = _STRIP // cell
    rows = -(-len(status) // columns)
    filled = np.full(rows * columns, UNKNOWN, np.uint8)
    filled[: len(status)] = status
    tall = _LINE if rows == 1 else cell
    return filled.reshape(rows, columns).repeat(tall, axis=0).repeat(cell, axis=1)


def _known(status: Pixels) -> Pixels:
    known: Pixels = status[status != UNKNOWN]
    return known


def _sorted(history: Pixels) -> Pixels:
    """Units (units, windows) sorted by the first window of the silence in which they end."""
    silent = np.isin(history, _SILENT)
    back = (~silent)[:, ::-1].argmax(axis=1)
    length = np.where(silent.all(axis=1), history.shape[1], back)
    return history[np.argsort(-length, kind="stable")]
