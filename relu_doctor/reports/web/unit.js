// One unit: its numbers beside the pointer, and its history when it was picked.

import { fill, h, named, printable, s, setText } from "./dom.js";
import { colourOf } from "./palette.js";
import { decimal, percent, plainMechanism, plainOnset, plainStatus, statusOf, whole } from "./words.js";

/** What there is to say of a unit: [label, text] each. Of `numbers` (may be null) some columns may be missing. */
export function facts(timeline, window, unit, numbers, word = "inputs") {
  const known = (name) => {
    const value = numbers?.[name]?.[unit];
    return value === undefined || Number.isNaN(value) ? null : value;
  };
  const found = [];
  const rate = known("firing_rate");
  const inputs = known("inputs");
  if (rate !== null) found.push(["fires on", inputs === null ? percent(rate) : `${percent(rate)} of ${whole(inputs)} ${word}`]);
  if (known("firing_rate_upper") !== null) found.push(["at most", `${percent(known("firing_rate_upper"))} to come`]);
  for (const [name, label] of [["pre_max", "largest pre-activation"], ["margin", "margin"], ["bias", "bias"]]) {
    if (known(name) !== null) found.push([label, decimal(known(name))]);
  }
  const mechanism = timeline.mechanisms[known("mechanism") ?? 0];
  if (mechanism) found.push(["held by", plainMechanism(mechanism)]);
  const onset = timeline.onsets[known("onset") ?? 0];
  if (onset) found.push([plainOnset(onset), known("onset_step") >= 0 ? `step ${whole(known("onset_step"))}` : "step not known"]);
  return found;
}

/** The card beside the pointer, which is also what a screen reader is told of the unit under the keys. */
export class Tooltip {
  constructor() {
    this.element = h("div", { class: "tooltip", hidden: true, "aria-hidden": "true" });
    this.spoken = h("div", { class: "unseen", role: "status", "aria-live": "polite" });
  }

  show(point, site, unit, status, pairs, dark, speak) {
    const sign = h("i", { class: "sign" });
    sign.style.background = colourOf(status, dark);
    fill(
      this.element,
      h("div", { class: "head" }, named(site.name, 32), h("b", {}, `unit ${whole(unit)}`)),
      h("div", { class: "status" }, sign, plainStatus(status)),
      h("dl", {}, pairs.flatMap(([label, text]) => [h("dt", {}, label), h("dd", {}, text)])),
    );
    this.element.hidden = false;
    const box = this.element.getBoundingClientRect();
    const x = point.x + 16 + box.width > innerWidth ? point.x - box.width - 12 : point.x + 16;
    const y = Math.min(point.y + 16, innerHeight - box.height - 8);
    this.element.style.transform = `translate(${Math.max(4, x)}px, ${Math.max(4, y)}px)`;
    if (!speak) return;
    const told = pairs.map(([label, text]) => `${label} ${text}`).join(", ");
    setText(this.spoken, `${printable(site.name).slice(0, 80)}, unit ${unit} of ${site.num_units}: ${plainStatus(status)}${told ? `, ${told}` : ""}`);
  }

  hide() {
    this.element.hidden = true;
  }
}

const CURVES = [
  ["firing_rate", "fires on", true],
  ["pre_max", "largest pre-activation", false],
  ["margin", "margin", false],
  ["bias", "bias", false],
];
const SIZE = { width: 296, height: 46 };

/** The history of the unit that was picked. */
export class UnitCard {
  constructor(closed) {
    this.heading = h("h2", {});
    this.body = h("div", {});
    const close = h("button", { type: "button", class: "square close", "aria-label": "Close", onclick: closed }, "×");
    this.element = h("section", { class: "card unit", "aria-label": "Unit", hidden: true }, close, this.heading, this.body);
  }

  wait(site, unit) {
    this.element.hidden = false;
    fill(this.heading, named(site.name, 30), ` unit ${whole(unit)}`);
    fill(this.body, h("p", { class: "quiet" }, "Reading its history …"));
  }

  fail(error) {
    fill(this.body, h("p", { class: "quiet" }, printable(error.message)));
  }

  show(timeline, history, window, pairs, dark) {
    const at = history.windows.indexOf(window);
    const status = at < 0 ? "absent" : statusOf(timeline, history.status[at]);
    const sign = h("i", { class: "sign" });
    sign.style.background = colourOf(status, dark);
    const steps = history.windows.map((each) => timeline.windows[each].last_step);
    const onset = timeline.onsets[history.onset];
    fill(
      this.body,
      h("div", { class: "status" }, sign, plainStatus(status)),
      h("dl", {}, pairs.flatMap(([label, text]) => [h("dt", {}, label), h("dd", {}, text)])),
      steps.length > 1 ? this.#curves(timeline, history, steps, window, dark) : null,
      onset && history.onset_step >= 0 && steps.length > 1
        ? h("p", { class: "quiet" }, `At the end of the run: ${plainOnset(onset)}, step ${whole(history.onset_step)}.`)
        : null,
    );
  }

  #curves(timeline, history, steps, window, dark) {
    const first = steps[0];
    const span = Math.max(1, steps.at(-1) - first);
    const x = (step) => ((step - first) / span) * SIZE.width;
    const now = x(timeline.windows[window]?.last_step ?? first);
    const bars = [];
    for (let start = 0, place = 1; place <= steps.length; place++) {
      if (place < steps.length && history.status[place] === history.status[start]) continue;
      const left = x(steps[Math.max(start - 1, 0)]);
      const bar = s("rect", { x: left.toFixed(1), width: (x(steps[place - 1]) - left).toFixed(1), height: 10 });
      bar.style.fill = colourOf(timeline.statuses[history.status[start]] ?? "unobserved", dark);
      bars.push(bar);
      start = place;
    }
    const picture = (height, label, value, ...inside) =>
      h(
        "div",
        { class: "curve" },
        h("div", { class: "of" }, label, h("span", {}, value)),
        s("svg", { viewBox: `0 0 ${SIZE.width} ${height}`, preserveAspectRatio: "none", height, "aria-hidden": "true" }, ...inside, s("line", { class: "now", x1: now, x2: now, y1: 0, y2: height })),
      );
    const found = [picture(10, "status", "", ...bars)];
    for (const [name, label, share] of CURVES) {
      const values = (history[name] ?? []).map((value) => (value === null ? NaN : Number(value)));
      const finite = values.filter(Number.isFinite);
      if (finite.length < 2) continue;
      const low = Math.min(...finite, 0);
      const high = Math.max(...finite, 0);
      const y = (value) => SIZE.height - 3 - ((value - low) / (high - low || 1)) * (SIZE.height - 6);
      let path = "";
      values.forEach((value, place) => {
        if (!Number.isFinite(value)) return;
        const joins = Number.isFinite(values[place - 1]);
        path += `${joins ? "L" : "M"}${x(steps[place]).toFixed(1)} ${y(value).toFixed(1)}`;
      });
      if (finite.every((value) => value === finite[0])) continue; // there is nothing to see
      const text = share ? `up to ${percent(high)}` : `${decimal(Math.min(...finite))} to ${decimal(Math.max(...finite))}`;
      const zero = s("line", { class: "grid", x1: 0, x2: SIZE.width, y1: y(0), y2: y(0) });
      found.push(picture(SIZE.height, label, text, zero, s("path", { class: "line", d: path })));
    }
    return h("div", { class: "curves" }, found);
  }

  hide() {
    this.element.hidden = true;
  }
}
