// The network as a column of sites in forward order, each a strip of its units coloured by status.

import { fill, h, named, printable, s, setText } from "./dom.js";
import { ofSite, stretches } from "./fractions.js";
import { BASE, SHADES, spritesFor, steady } from "./palette.js";
import { Strip } from "./strip.js";
import { percent, plural, whole } from "./words.js";

const CELLS = [2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16, 20];
const LARGEST_FIT = 14; // larger ones only when asked for
const SMALLEST_FIT = 9; // smaller ones only where a site has very many units, or when asked for
const VERY_MANY = 2000;
const ROW = { least: 36, beside: 14 }; // height of a site's label and tally, and the space around them
const SPARK = { width: 88, height: 22 };
const MOST_POINTS = 120; // of a small curve

export class SiteMap {
  /** `hooks`: hover(site, unit, event), leave(), focus(site, unit), pick(site, unit). Sites are places in the timeline. */
  constructor(timeline, hooks) {
    this.timeline = timeline;
    this.hooks = hooks;
    this.tileOf = new WeakMap();
    this.picture = {
      status: null,
      shades: null,
      mask: null,
      dims: new Uint8Array(BASE),
      steady: steady(timeline.statuses),
      sprites: [],
    };
    this.window = 0;
    this.zoom = 0;
    this.dark = false;
    this.observer = new IntersectionObserver((entries) => this.#seen(entries), { rootMargin: "300px 0px" });
    this.list = h("ol", { class: "sites", "aria-label": "Sites in forward order" });
    this.rows = timeline.sites.map((site, place) => this.#row(site, place));
    this.nothing = h("p", { class: "nothing", hidden: true }, "No site has that in its name.");
    this.element = h("div", { class: "map" }, fill(this.list, this.rows.map((row) => row.element)), this.nothing);
    this.resizer = new ResizeObserver(() => this.layOut());
    this.resizer.observe(this.list);
  }

  #row(site, place) {
    const strip = new Strip(site, place, this.observer, this.tileOf);
    const dead = h("span", { class: "figure" });
    const share = h("span", { class: "share" });
    const spark = h("div", { class: "spark", "aria-hidden": "true" }, this.#curve(place), h("i", { class: "now" }));
    const element = h(
      "li",
      { class: "site", "data-site": String(place) },
      h("div", { class: "label" }, named(site.name, 40), h("span", { class: "sub" }, subtitle(site))),
      strip.element,
      spark,
      h("div", { class: "tally" }, dead, share),
    );
    strip.element.tabIndex = 0;
    strip.element.setAttribute("role", "application"); // arrow keys are its own
    strip.element.setAttribute("aria-roledescription", "map of units");
    strip.element.setAttribute("aria-label", `${printable(site.name).slice(0, 200)}, ${plural(site.num_units, "unit")}`);
    const row = { site, place, strip, dead, share, element, now: spark.lastChild, focused: 0 };
    this.#listen(row);
    return row;
  }

  /** Dead fraction over the run, as a curve as small as a word. */
  #curve(place) {
    const { windows } = this.timeline;
    const every = Math.max(1, Math.ceil(windows.length / MOST_POINTS));
    const points = [];
    for (let window = 0; window < windows.length; window += every) points.push(window);
    if (points.at(-1) !== windows.length - 1) points.push(windows.length - 1);
    const last = windows.length - 1;
    const x = (window) => (window < 0 ? 0 : last > 0 ? (window / last) * SPARK.width : SPARK.width);
    const silent = new Map(points.map((window) => [window, ofSite(this.timeline, window, place).silent]));
    const y = (window) => SPARK.height - 1 - silent.get(window) * (SPARK.height - 2);
    const lines = stretches(points, (window) => silent.get(window) !== null).map((known) => {
      const left = x(known[0] - every).toFixed(1); // so that a window alone is seen too
      const curve = known.map((window) => `${x(window).toFixed(1)} ${y(window).toFixed(1)}`);
      return { left, right: x(known.at(-1)).toFixed(1), path: [`${left} ${y(known[0]).toFixed(1)}`, ...curve].join("L") };
    });
    const box = { viewBox: `0 0 ${SPARK.width} ${SPARK.height}`, preserveAspectRatio: "none" };
    return s(
      "svg",
      box,
      s("path", { class: "area", d: lines.map(({ path, left, right }) => `M${left} ${SPARK.height}L${path}L${right} ${SPARK.height}Z`).join("") }),
      s("path", { class: "line", d: lines.map(({ path }) => `M${path}`).join("") }),
    );
  }

  #listen(row) {
    const strip = row.strip;
    const at = (event) => {
      const box = strip.element.getBoundingClientRect();
      return strip.unitAt(event.clientX - box.left, event.clientY - box.top);
    };
    strip.element.addEventListener("pointermove", (event) => {
      const unit = at(event);
      strip.frame(strip.cursor, unit);
      if (unit === null) this.hooks.leave();
      else this.hooks.hover(row.place, unit, { x: event.clientX, y: event.clientY });
    });
    strip.element.addEventListener("pointerleave", () => {
      strip.frame(strip.cursor, null);
      this.hooks.leave();
    });
    strip.element.addEventListener("click", (event) => {
      const unit = at(event);
      if (unit === null) return;
      row.focused = unit;
      this.hooks.pick(row.place, unit);
    });
    strip.element.addEventListener("focus", () => {
      if (strip.element.matches(":focus-visible")) this.#move(row, row.focused);
    });
    strip.element.addEventListener("blur", () => {
      strip.frame(strip.cursor, null);
      this.hooks.leave();
    });
    strip.element.addEventListener("keydown", (event) => this.#key(row, event));
  }

  #key(row, event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const { strip, site, focused } = row;
    const last = site.num_units - 1;
    const moves = {
      ArrowLeft: focused - 1,
      ArrowRight: focused + 1,
      ArrowUp: focused - strip.columns,
      ArrowDown: focused + strip.columns,
      Home: 0,
      End: last,
    };
    if (event.key in moves) this.#move(row, Math.min(Math.max(moves[event.key], 0), last));
    else if (event.key === "n" || event.key === "N") this.#move(row, this.#nextSilent(row, event.key === "n" ? 1 : -1));
    else if (event.key === "PageDown" || event.key === "PageUp") this.#step(row, event.key === "PageDown" ? 1 : -1);
    else if (event.key === "Enter" || event.key === " ") this.hooks.pick(row.place, focused);
    else if (event.key === "Escape") this.hooks.leave();
    else return;
    event.preventDefault();
    event.stopPropagation();
  }

  #move(row, unit) {
    row.focused = unit;
    const { strip } = row;
    strip.frame(strip.cursor, unit);
    strip.cursor.scrollIntoView({ block: "nearest" });
    const box = strip.cursor.getBoundingClientRect();
    this.hooks.focus(row.place, unit, { x: box.right, y: box.bottom });
  }

  /** The next silent unit of a site, round its end. */
  #nextSilent(row, direction) {
    const { status } = this.picture;
    const units = row.site.num_units;
    const silent = ["dead", "unproven"].map((word) => this.timeline.statuses.indexOf(word));
    for (let distance = 1; status && distance <= units; distance++) {
      const unit = (row.focused + direction * distance + units * distance) % units;
      if (silent.includes(status[row.site.start + unit])) return unit;
    }
    return row.focused;
  }

  #step(row, direction) {
    for (let place = row.place + direction; this.rows[place]; place += direction) {
      if (!this.rows[place].element.hidden) {
        this.rows[place].strip.element.focus();
        return;
      }
    }
  }

  #seen(entries) {
    for (const entry of entries) {
      const tile = this.tileOf.get(entry.target);
      if (!tile) continue;
      tile.strip.setVisible(tile, entry.isIntersecting);
      if (!entry.isIntersecting) continue;
      tile.strip.drawTile(tile, this.picture);
      this.#tell(this.rows[tile.strip.place], this.window);
    }
  }

  /** Chooses the size of a square so that the network fits, and lays the strips out. */
  layOut(force = false) {
    const probe = this.rows.find((row) => !row.element.hidden);
    if (!probe) return;
    const style = getComputedStyle(this.list);
    const width = this.list.clientWidth - Number.parseFloat(style.getPropertyValue("--beside") || "0");
    const scale = Math.max(1, globalThis.devicePixelRatio || 1);
    if (width < 20 || (!force && width === this.width && scale === this.scale)) return;
    this.width = width;
    this.scale = scale;
    const cell = this.#cell(width);
    this.#paint(cell, scale);
    for (const row of this.rows) {
      row.strip.layOut(width, cell, scale);
      row.strip.frame(row.strip.pin, this.pinned?.site === row.place ? this.pinned.unit : null);
    }
  }

  #cell(width) {
    const { sites } = this.timeline;
    const height = (cell) =>
      sites.reduce((sum, site) => sum + Math.max(ROW.least, Strip.rows(site.num_units, width, cell) * cell) + ROW.beside, 0);
    // Many sites have to be scrolled through whatever the size: smaller squares would not make their labels smaller.
    const room = Math.max(560, innerHeight * 1.1, 1.25 * sites.length * (ROW.least + ROW.beside));
    const least = sites.some((site) => site.num_units >= VERY_MANY) ? 1 : CELLS.indexOf(SMALLEST_FIT);
    let place = CELLS.indexOf(LARGEST_FIT);
    while (place > least && height(CELLS[place]) > room) place--;
    return CELLS[Math.min(Math.max(place + this.zoom, 0), CELLS.length - 1)];
  }

  #paint(cell, scale) {
    this.cell = cell;
    const gap = cell >= 8 ? 2 : cell >= 4 ? 1 : 0;
    const size = Math.round(cell * scale);
    this.picture.sprites = spritesFor(this.timeline.statuses, size, Math.round(gap * scale), this.dark);
  }

  setZoom(zoom) {
    this.zoom = zoom;
    this.layOut(true);
  }

  setTheme(dark) {
    this.dark = dark;
    if (!this.cell) return;
    this.#paint(this.cell, this.scale);
    this.draw();
  }

  /** Another window: its statuses, null while they are on their way. */
  show(window, status) {
    this.window = window;
    if (status) this.picture.status = status;
    this.draw();
    const share = this.timeline.windows.length > 1 ? window / (this.timeline.windows.length - 1) : 1;
    this.now = `translateX(${(share * SPARK.width).toFixed(1)}px)`;
    for (const row of this.rows) this.#tell(row, window);
  }

  /** What changes with the window, of a site that can be seen. */
  #tell(row, window) {
    if (!row.strip.tiles.some((tile) => tile.visible)) return;
    row.now.style.transform = this.now;
    const told = ofSite(this.timeline, window, row.place);
    const mortal = row.site.can_die !== false;
    setText(row.dead, mortal && told.known ? whole(told.dead) : "–");
    setText(row.share, inWords(told, mortal));
    row.element.classList.toggle("struck", told.dead > 0);
  }

  draw() {
    for (const row of this.rows) if (!row.element.hidden) row.strip.draw(this.picture);
  }

  /** Which statuses are dimmed, and which units (1 = dimmed); null for none. */
  dim(hidden, mask) {
    this.timeline.statuses.forEach((status, code) => (this.picture.dims[code] = hidden.has(status) ? 1 : 0));
    this.picture.mask = mask;
    this.draw();
  }

  /** Firing rates in place of "active"; null for statuses alone. */
  shade(rates) {
    this.picture.shades = rates ? shadesOf(rates) : null;
    this.draw();
  }

  /** Shows only sites with some text in their names. */
  filter(text) {
    const wanted = text.trim().toLowerCase();
    let any = false;
    for (const row of this.rows) {
      const shown = !wanted || printable(row.site.name).toLowerCase().includes(wanted);
      row.element.hidden = !shown;
      any ||= shown;
    }
    this.nothing.hidden = any;
    this.layOut(true);
  }

  /** Frames the unit whose history is shown; null for none. */
  pin(selected) {
    this.pinned = selected;
    for (const row of this.rows) row.strip.frame(row.strip.pin, selected?.site === row.place ? selected.unit : null);
  }

  /** The site and unit that have the keyboard; null for none. */
  held() {
    const row = this.rows.find(({ strip }) => strip.element === document.activeElement);
    return row ? { site: row.site.site_id, unit: row.focused } : null;
  }

  hold({ site, unit }) {
    const row = this.rows.find((each) => each.site.site_id === site);
    if (!row || row.strip.element === document.activeElement) return;
    this.layOut(); // the unit has its place before it is shown
    row.focused = Math.min(unit, row.site.num_units - 1);
    row.strip.element.focus({ preventScroll: true });
  }

  /** Scrolls to a site; `marked` leaves a mark beside it. */
  reveal(place, marked = false) {
    if (marked) for (const row of this.rows) row.element.classList.toggle("asked", row.place === place);
    this.rows[place]?.element.scrollIntoView({ block: "nearest", behavior: "smooth" });
  }

  close() {
    this.observer.disconnect();
    this.resizer.disconnect();
    for (const row of this.rows) row.strip.release();
  }
}

function subtitle(site) {
  const rectifier = printable(site.rectifier).slice(0, 24);
  return `${rectifier ? `${rectifier} · ` : ""}${plural(site.num_units, "unit")}`;
}

function inWords({ units, dead, unproven, nonFinite, known, share }, mortal) {
  if (!units) return "not there";
  if (nonFinite) return `${whole(nonFinite)} not finite`;
  if (!known) return "not observed";
  if (!mortal) return "cannot die";
  if (dead) return percent(share);
  return unproven ? `+ ${whole(unproven)} unproven` : "dead";
}

/** Firing rates as places of the ramp, on a logarithmic scale from 1 in 10,000 to always. */
function shadesOf(rates) {
  const found = new Uint8Array(rates.length);
  for (let unit = 0; unit < rates.length; unit++) {
    const rate = rates[unit];
    found[unit] = rate > 0 ? Math.min(SHADES - 1, Math.max(0, Math.round((1 + Math.log10(rate) / 4) * (SHADES - 1)))) : 0;
  }
  return found;
}
