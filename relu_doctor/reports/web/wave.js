// The wave of deaths: dead and unproven fractions over steps, deaths per window, alerts, and the learning rate over it.

import { h, printable, s } from "./dom.js";
import { decimal, percent, plural, whole } from "./words.js";

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
      return { dead: sum("dead"), unproven: sum("unproven"), deaths: sum("deaths"), revivals: sum("revivals") };
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
    const { windows, num_units: units } = this.timeline;
    const bottom = HEIGHT - MARGIN.bottom;
    const shares = this.totals.map(({ dead, unproven }) => [dead / Math.max(1, units), (dead + unproven) / Math.max(1, units)]);
    const top = ceiling(Math.max(0.01, ...shares.map(([, silent]) => silent)));
    const y = (share) => bottom - (share / top) * (bottom - MARGIN.top);
    const steps = windows.map((window) => this.#x(window.last_step));
    const left = this.#x(Math.max(windows[0].first_step - 1, this.range[0]));
    const area = (values) => {
      const line = steps.map((x, place) => `${x.toFixed(1)} ${y(values(place)).toFixed(1)}`).join("L");
      return `M${left} ${bottom}L${left} ${y(values(0)).toFixed(1)}L${line}L${steps.at(-1)} ${bottom}Z`;
    };
    const band = (above, below) => {
      const points = (values) => steps.map((x, place) => `${x.toFixed(1)} ${y(values(place)).toFixed(1)}`);
      return `M${points(above).join("L")}L${points(below).reverse().join("L")}Z`;
    };
    const line = (values) => `M${steps.map((x, place) => `${x.toFixed(1)} ${y(values(place)).toFixed(1)}`).join("L")}`;
    this.now = s("line", { class: "now", y1: MARGIN.top - 6, y2: bottom });
    this.svg.setAttribute("width", width);
    this.svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    this.svg.setAttribute("aria-label", this.#said(shares));
    this.svg.replaceChildren(
      hatching(),
      ...[0, 0.5, 1].flatMap((share) => [
        s("line", { class: "grid", x1: MARGIN.left, x2: width - MARGIN.right, y1: y(share * top), y2: y(share * top) }),
        s("text", { class: "tick end", x: MARGIN.left - 8, y: y(share * top) + 4 }, percent(share * top).replace(".0 ", " ")),
      ]),
      s("path", { class: "dead", d: area((place) => shares[place][0]) }),
      s("path", { class: "unproven", d: band((place) => shares[place][1], (place) => shares[place][0]) }),
      s("path", { class: "dead-line", d: line((place) => shares[place][0]) }),
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

  #said(shares) {
    const last = shares.at(-1)[0];
    const deaths = this.totals.reduce((sum, { deaths: each }) => sum + each, 0);
    return `Dead fraction over steps: ${percent(shares[0][0])} at first, ${percent(last)} at last, ${plural(deaths, "death")}.`;
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
