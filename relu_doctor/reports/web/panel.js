// One run: its head, the wave of deaths, and the map; several stand side by side.

import { fill, h, named, printable, setText } from "./dom.js";
import { severity } from "./findings.js";
import { ofRun } from "./fractions.js";
import { SiteMap } from "./map.js";
import { windowAt } from "./state.js";
import { Statuses } from "./statuses.js";
import { Wave } from "./wave.js";
import { fraction, whole } from "./words.js";

const MOST_COLUMNS = 24; // of single windows that are kept
const MOST_NUMBERS = 400; // of sites in single windows that are kept

export class Panel {
  /** `hooks`: those of SiteMap, with the panel before them; activate(panel), seek(step), failed(error), arrived(panel). */
  constructor(source, timeline, range, hooks) {
    this.source = source;
    this.timeline = timeline;
    this.name = timeline.run;
    this.numbersKept = new Map();
    this.columnsKept = new Map();
    this.statuses = new Statuses(source, this.name, timeline.num_units, timeline.windows.length, () => hooks.arrived(this), hooks.failed);
    this.map = new SiteMap(timeline, {
      hover: (...point) => hooks.hover(this, ...point),
      focus: (...point) => hooks.focus(this, ...point),
      pick: (...point) => hooks.pick(this, ...point),
      leave: () => hooks.leave(),
    });
    this.wave = timeline.windows.length > 1 ? new Wave(timeline, range, hooks.seek) : null;
    this.verdict = h("div", { class: "verdict" });
    this.title = h("button", { type: "button", class: "title", onclick: () => hooks.activate(this) }, named(this.name, 60));
    this.note = h("p", { class: "note", hidden: true });
    this.element = h(
      "article",
      { class: "panel", "aria-label": `Run ${printable(this.name).slice(0, 200)}` },
      h("header", {}, this.title, this.verdict),
      this.note,
      this.wave?.element,
      this.map.element,
    );
    this.window = -1;
    this.said = "";
    if (timeline.unreadable?.length) this.warn(`Some windows could not be read: ${timeline.unreadable[0]}`);
  }

  warn(text) {
    setText(this.note, printable(text));
    this.note.hidden = !text;
  }

  /** Shows the run as it stood at a step. */
  show(step) {
    const found = windowAt(this.timeline, step);
    this.window = Math.max(found, 0);
    this.element.classList.toggle("ahead", found < 0);
    const status = this.statuses.get(this.window);
    this.element.classList.toggle("waiting", !status);
    this.map.show(this.window, status);
    this.wave?.place(step);
    const window = this.timeline.windows[this.window];
    const said = `${window.severity} ${window.label} ${window.last_step}`;
    if (said === this.said) return;
    this.said = said;
    const { share, nonFinite } = ofRun(this.timeline, this.window);
    const broken = nonFinite ? h("span", {}, `${whole(nonFinite)} not finite`) : null;
    const where = found < 0 ? `begins with step ${whole(window.first_step)}` : `step ${whole(window.last_step)}`;
    fill(this.verdict, severity(window.severity, window.label), h("span", {}, `${fraction(share)} dead`), broken, h("span", { class: "quiet" }, where));
  }

  /** What in it has the keyboard; null for nothing. */
  held() {
    return document.activeElement === this.title ? {} : this.map.held();
  }

  /** Gives the keyboard to what had it in a panel before. */
  hold(held) {
    if (held.site) this.map.hold(held);
    else this.title.focus({ preventScroll: true });
  }

  /** The numbers of one site in one window, asked for once. */
  numbers(window, site) {
    return kept(this.numbersKept, MOST_NUMBERS, `${window} ${site}`, () => this.source.numbers(this.name, window, site));
  }

  /** One column of all units in one window, asked for once; null where it was not kept. */
  column(window, column) {
    return kept(this.columnsKept, MOST_COLUMNS, `${window} ${column}`, () => this.source.column(this.name, window, column));
  }

  close() {
    this.statuses.close();
    this.map.close();
    this.wave?.close();
    this.element.remove();
  }
}

/** What is in a cache, or comes into it; what failed does not stay. */
function kept(cache, most, key, ask) {
  if (!cache.has(key)) {
    const asked = ask();
    cache.set(key, asked);
    asked.catch(() => cache.delete(key));
    if (cache.size > most) cache.delete(cache.keys().next().value);
  }
  return cache.get(key);
}
