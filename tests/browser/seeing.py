"""What a reader sees on the canvas: which units have the colour of a status."""

from __future__ import annotations

from typing import Any

# The colour at the centre of each unit of a site, scrolled into view.
_COLOURS = """async (strip) => {
  strip.scrollIntoView({ block: "center" });
  await new Promise((resume) => setTimeout(resume, 250));
  const found = [];
  for (const canvas of strip.querySelectorAll("canvas")) {
    const context = canvas.getContext("2d");
    const { data, width, height } = context.getImageData(0, 0, canvas.width, canvas.height);
    const cell = canvas.width / Math.round(canvas.clientWidth / CELL);
    for (let y = 0; y + cell <= height + 1; y += cell) {
      for (let x = 0; x + cell <= width + 1; x += cell) {
        const at = 4 * (Math.floor(y + cell / 2 - 1) * width + Math.floor(x + cell / 2 - 1));
        found.push(`#${[0, 1, 2].map((part) => data[at + part].toString(16).padStart(2, "0")).join("")}`);
      }
    }
  }
  return found;
}"""
DEAD = {"#c2370c", "#ff6b3d"}  # light, dark


def colours(view: Any, site: int, run: int = 0) -> list[str]:
    """A colour per unit of a site, and of the empty places behind the last unit."""
    strip = view.locator(".panel").nth(run).locator(".strip").nth(site)
    cell = strip.evaluate("strip => Number(strip.dataset.cell)")
    return list(strip.evaluate(_COLOURS.replace("CELL", str(cell))))


def dead_units(view: Any, site: int, run: int = 0) -> set[int]:
    """Which units of a site are drawn as dead."""
    return {unit for unit, colour in enumerate(colours(view, site, run)) if colour in DEAD}
