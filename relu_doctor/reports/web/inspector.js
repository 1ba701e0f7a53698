// The unit that is looked at: under the pointer or the keys, and the one that was picked.

import { Tooltip, UnitCard, facts } from "./unit.js";
import { statusOf } from "./words.js";

const ASKED_AFTER = 45; // milliseconds that the pointer must rest

export class Inspector {
  constructor(state) {
    this.state = state;
    this.tooltip = new Tooltip();
    this.card = new UnitCard(() => state.set({ selected: null }));
    this.word = "inputs";
    this.hovered = null;
  }

  /** Shows the numbers of a unit beside the pointer; `speak` tells them to screen readers too. */
  point(panel, place, unit, point, speak) {
    this.hovered = [panel, place, unit, point, speak];
    const { timeline, window } = panel;
    const site = timeline.sites[place];
    const status = statusOf(timeline, panel.map.picture.status?.[site.start + unit]);
    const show = (pairs) => this.tooltip.show(point, site, unit, status, pairs, this.state.dark, speak);
    const key = `${panel.name} ${place} ${window}`;
    const known = this.near?.key === key;
    const numbers = known ? this.near.numbers : null;
    show(known && !numbers ? [["its numbers", "not kept"]] : facts(timeline, window, unit, numbers, this.word));
    if (known) return;
    clearTimeout(this.asking);
    this.asking = setTimeout(async () => {
      this.near = { key, numbers: await panel.numbers(window, place).catch(() => null) };
      const [same, samePlace] = this.hovered ?? [];
      if (same === panel && samePlace === place && window === panel.window) this.point(...this.hovered);
    }, ASKED_AFTER);
  }

  leave() {
    this.hovered = null;
    this.tooltip.hide();
  }

  /** Shows the history of the unit that was picked, of `panels` by name. */
  async showPicked(panels) {
    const { selected } = this.state;
    for (const each of panels.values()) each.map.pin(selected?.run === each.name ? selected : null);
    const panel = panels.get(selected?.run);
    if (!panel) {
      this.card.hide();
      this.shownUnit = null;
      return;
    }
    const { site: place, unit } = selected;
    const { timeline, window } = panel;
    const site = timeline.sites[place];
    try {
      if (this.shownUnit?.selected !== selected || this.shownUnit.timeline !== timeline) {
        this.card.wait(site, unit);
        const history = await panel.source.history(panel.name, place, unit);
        if (this.state.selected !== selected) return;
        this.shownUnit = { selected, timeline, history };
      }
      const numbers = await panel.numbers(window, place).catch(() => null);
      if (this.state.selected !== selected || window !== panel.window || !this.shownUnit) return;
      this.card.show(timeline, this.shownUnit.history, window, facts(timeline, window, unit, numbers, this.word), this.state.dark);
    } catch (error) {
      if (this.state.selected === selected) this.card.fail(error);
    }
  }

  /** The window has changed: what is shown beside the pointer is told anew. */
  refresh() {
    if (this.hovered) this.point(...this.hovered);
  }
}
