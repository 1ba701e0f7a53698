// The wave of deaths: dead and unproven fractions over steps, deaths per window, alerts, and the learning rate over it.

import { h, printable, s } from "./dom.js";
import { ofRun, stretches } from "./fractions.js";
import { decimal, fraction, percent, plural, whole } from "./words.js";

const HEIGHT = 148;
const MARGIN = { left: 46, right: 58, top: 14, bottom: 24 };

export class Wave {
  /** `seek(step)` is called where the reader points; `range` is [first, last] step of all runs shown. */
  constructor(timeline, range, seek) {
    this.timeline = timeline;
    this.range = range;
    this.seek = seek;
    this.svg = s("svg", { class: "wave", height: HEIGHT, role: "img" });
    this.element = h("figure", { class: "chart" }, this.svg, legend(timeline));
    this.totals = timeline.windows.map((_, window) => {
      const sum = (name) => timeline.counts[name][window].reduce((all, value) => all + value, 0);
      return { ...ofRun(timeline, window), deaths: sum("deaths") };
    });
    this.resizer = new ResizeObserver(() => this.render());
    this.resizer.observe(this.element);
    this.svg.addEventListener("pointerdown", (event) => {
      this.svg.setPointerCapture(event.pointerId);
      this.#point(event);
    });
    this.svg.addEventListener("pointermove", (event) => event.buttons & 1 && this.#point(event));
  }

  #point(event) {
    const box = this.svg.getBoundingClientRect();
    const share = (event.clientX - box.left - MARGIN.left) / Math.max(1, box.width - MARGIN.left - MARGIN.right);
    const [first, last] = this.range;
    this.seek(first + Math.min(Math.max(share, 0), 1) * (last - first));
  }

  #x(step) {
    const [first, last] = this.range;
    const share = last > first ? (step - first) / (last - first) : 1;
    return MARGIN.left + share * (this.width - MARGIN.left - MARGIN.right);
  }

  render() {
    const width = Math.round(this.element.clientWidth);
    if (width < 80 || width === this.width) return;
    this.width = width;
    const { windows } = this.timeline;
    const bottom = HEIGHT - MARGIN.bottom;
    const top = ceiling(Math.max(0.01, ...this.totals.map(({ silent }) => silent ?? 0)));
    const y = (share) => bottom - (share / top) * (bottom - MARGIN.top);
    const steps = windows.map((window) => this.#x(window.last_step));
    const begin = (place) => Math.max(this.#x(Math.max(windows[place].first_step - 1, this.range[0])), steps[place - 1] ?? 0);
    const known = stretches(windows.keys(), (place) => this.totals[place].share !== null);
    // Each stretch begins where its first window does, so that one of a single window is seen too.
    const curve = (places, value) =>
      [[begin(places[0]), places[0]], ...places.map((place) => [steps[place], place])].map(
        ([x, place]) => `${x.toFixed(1)} ${y(value(this.totals[place])).toFixed(1)}`,
      );
    const band = (above, below) =>
      known.map((places) => `M${curve(places, above).join("L")}L${curve(places, below).reverse().join("L")}Z`).join("");
    const [dead, silent] = [(total) => total.share, (total) => total.silent];
    this.now = s("line", { class: "now", y1: MARGIN.top - 6, y2: bottom });
    this.svg.setAttribute("width", width);
    this.svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    this.svg.setAttribute("aria-label", this.#said());
    this.svg.replaceChildren(
      hatching(),
      ...[0, 0.5, 1].flatMap((share) => [
        s("line", { class: "grid", x1: MARGIN.left, x2: width - MARGIN.right, y1: y(share * top), y2: y(share * top) }),
        s("text", { class: "tick end", x: MARGIN.left - 8, y: y(share * top) + 4 }, percent(share * top).replace(".0 ", " ")),
      ]),
      s("path", { class: "dead", d: band(dead, () => 0) }),
      s("path", { class: "unproven", d: band(silent, dead) }),
      s("path", { class: "dead-line", d: known.map((places) => `M${curve(places, dead).join("L")}`).join("") }),
      ...this.#deaths(steps, bottom),
      ...this.#rate(steps, bottom),
      ...this.#alerts(),
      ...ticks(this.range, width < 520 ? 3 : 5).map((step) =>
        s("text", { class: "tick middle", x: this.#x(step), y: HEIGHT - 7 }, whole(step)),
      ),
      this.now,
    );
    this.place(this.step ?? this.range[1]);
  }

  /** Deaths of each window, as bars that hang from the top: when the wave struck. */
  #deaths(steps, bottom) {
    const most = Math.max(...this.totals.map(({ deaths }) => deaths));
    if (!most) return [];
    const wide = Math.max(1, Math.min(10, (steps.at(-1) - steps[0]) / Math.max(1, steps.length - 1) - 1));
    return this.totals.flatMap(({ deaths }, place) => {
      if (!deaths) return [];
      const high = Math.max(2, (deaths / most) * 0.3 * (bottom - MARGIN.top));
      return [s("rect", { class: "deaths", x: (steps[place] - wide).toFixed(1), y: MARGIN.top, width: wide, height: high })];
    });
  }

  #rate(steps, bottom) {
    const rates = this.timeline.windows.map((window) => window.numbers.lr ?? null);
    const known = rates.filter((rate) => rate !== null);
    if (!known.length) return [];
    const low = Math.min(...known);
    const high = Math.max(...known);
    const room = bottom - MARGIN.top - 8;
    const y = (rate) => (high > 0 ? bottom - (Math.max(rate, 0) / high) * room : bottom);
    const points = rates.flatMap((rate, place) => (rate === null ? [] : [`${steps[place].toFixed(1)} ${y(rate).toFixed(1)}`]));
    const x = this.width - MARGIN.right + 8;
    return [
      s("path", { class: "rate", d: `M${points.join("L")}` }),
      s("text", { class: "tick rate-tick", x, y: y(high) + 4 }, decimal(high)),
      ...(low < high * 0.8 ? [s("text", { class: "tick rate-tick", x, y: Math.max(y(low), y(high) + 14) + 4 }, decimal(low))] : []),
    ];
  }

  #alerts() {
    return this.timeline.windows.flatMap((window) =>
      (window.alerts ?? []).slice(0, 3).map((alert) => {
        const x = this.#x(alert.step);
        const mark = s("path", { class: "alert", d: `M${x} ${MARGIN.top - 2}l-5 -9h10z` });
        mark.append(s("title", {}, printable(`${alert.code}, step ${alert.step}: ${alert.message}`).slice(0, 600)));
        return mark;
      }),
    );
  }

  #said() {
    const deaths = this.totals.reduce((sum, { deaths: each }) => sum + each, 0);
    return `Dead fraction over steps: ${fraction(this.totals[0].share)} at first, ${fraction(this.totals.at(-1).share)} at last, ${plural(deaths, "death")}.`;
  }

  /** Moves the line that says where we are. */
  place(step) {
    this.step = step;
    this.now?.setAttribute("transform", `translate(${this.#x(Math.max(step, this.range[0]))} 0)`);
  }

  close() {
    this.resizer.disconnect();
  }
}

function legend(timeline) {
  const has = (name) => timeline.windows.some((window) => window.numbers[name] !== undefined);
  const alerts = timeline.windows.some((window) => window.alerts?.length);
  const key = (kind, text) => h("span", { class: "key" }, h("i", { class: `mark ${kind}` }), text);
  return h(
    "figcaption",
    {},
    key("dead", "dead"),
    key("unproven", "unproven"),
    key("deaths", "deaths per window"),
    has("lr") ? key("rate", "learning rate") : null,
    alerts ? key("alert", "alert") : null,
  );
}

function hatching() {
  const attributes = { id: "rd-hatch", width: 6, height: 6, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" };
  return s("defs", {}, s("pattern", attributes, s("rect", { width: 3, height: 6, class: "hatch" })));
}

/** The next round share above. */
function ceiling(share) {
  return [0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1].find((step) => share <= step * 0.98) ?? 1;
}

/** Round steps across a range. */
function ticks([first, last], about) {
  const raw = Math.max(1, (last - first) / about);
  const unit = 10 ** Math.floor(Math.log10(raw));
  const every = [1, 2, 5, 10].map((factor) => factor * unit).find((step) => step >= raw) ?? raw;
  const found = [];
  for (let step = Math.ceil(first / every) * every; step <= last; step += every) found.push(step);
  return found;
}
