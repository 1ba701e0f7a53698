// What is looked at: which runs, and which sites, statuses and causes; also the legend.

import { fill, h, named, setText } from "./dom.js";
import { LISTED, drawSwatch } from "./palette.js";
import { STATUS_WORDS, plainMechanism, plainStatus, whole } from "./words.js";

const ALWAYS = new Set(["dead", "unproven", "rare", "active"]); // in the legend, even where no unit is so
const MOST_CHIPS = 4; // more runs go into a list that opens

export class Controls {
  constructor(state) {
    this.state = state;
    this.runs = h("div", { class: "runs", role: "group", "aria-label": "Runs" });
    this.legend = h("div", { class: "legend", role: "group", "aria-label": "Statuses, press to hide" });
    this.site = h("input", {
      type: "search",
      placeholder: "Filter sites",
      "aria-label": "Filter sites by name",
      maxlength: 200,
      oninput: () => state.set({ site: this.site.value }),
    });
    this.cause = h("select", { "aria-label": "Cause", onchange: () => state.set({ mechanism: this.cause.value }) });
    this.colour = h(
      "select",
      { "aria-label": "Colour by", onchange: () => state.set({ colour: this.colour.value }) },
      h("option", { value: "status" }, "Colour: status"),
      h("option", { value: "rate" }, "Colour: firing rate"),
    );
    const zoom = (change, label, text) =>
      h("button", { type: "button", class: "square", "aria-label": label, title: label, onclick: () => state.set({ zoom: state.zoom + change }) }, text);
    this.tools = h("div", { class: "tools" }, this.site, this.cause, this.colour, zoom(-1, "Smaller units", "−"), zoom(1, "Larger units", "+"));
    this.element = h("div", { class: "controls" }, this.legend, this.tools);
    this.chips = new Map();
    this.boxes = new Map(); // of the runs, by name
    this.summary = h("summary", {});
    this.built = new Map();
    state.on(["runs", "chosen", "active"], () => this.#showRuns());
    state.on(["dark"], () => this.#swatches());
    state.on(["hidden"], () => this.#pressed());
  }

  /** `timelines`: of the chosen runs. */
  describe(timelines) {
    const comes = (timeline, status) => timeline.counts[status]?.some((window) => window.some((count) => count > 0));
    const statuses = new Set(timelines.flatMap((timeline) => timeline.statuses.filter((status) => ALWAYS.has(status) || comes(timeline, status))));
    const causes = [...new Set(timelines.flatMap((timeline) => timeline.mechanisms))].filter(Boolean);
    const listed = LISTED.filter((each) => statuses.has(each));
    if (!this.#changed("described", [listed, causes])) return;
    const options = causes.map((cause) => h("option", { value: cause }, `Cause: ${plainMechanism(cause)}`));
    fill(this.cause, h("option", { value: "" }, "Any cause"), options);
    this.cause.value = this.state.mechanism;
    this.chips.clear();
    for (const status of listed) {
      const count = h("span", { class: "count" });
      const swatch = h("canvas", { class: "swatch", "aria-hidden": "true" });
      const chip = h(
        "button",
        { type: "button", class: "chip", "data-status": status, title: STATUS_WORDS[status], onclick: () => this.#toggle(status) },
        swatch,
        plainStatus(status),
        count,
      );
      this.chips.set(status, { chip, count, swatch });
    }
    fill(this.legend, [...this.chips.values()].map(({ chip }) => chip));
    this.#swatches();
    this.#pressed();
  }

  /** How many units have each status now, in all runs shown. */
  count(counts) {
    for (const [status, { chip, count }] of this.chips) {
      const number = counts.get(status) ?? 0;
      setText(count, whole(number));
      chip.classList.toggle("none", number === 0);
    }
  }

  #toggle(status) {
    const hidden = new Set(this.state.hidden);
    if (!hidden.delete(status)) hidden.add(status);
    this.state.set({ hidden });
  }

  #pressed() {
    for (const [status, { chip }] of this.chips) chip.setAttribute("aria-pressed", String(!this.state.hidden.has(status)));
  }

  #swatches() {
    for (const [status, { swatch }] of this.chips) drawSwatch(swatch, status, this.state.dark);
  }

  #showRuns() {
    const names = this.state.runs.map((run) => run.run);
    if (this.#changed("listed", names)) this.#listRuns(names);
    for (const [name, box] of this.boxes) box.checked = this.state.chosen.includes(name);
    setText(this.summary, `${whole(this.state.chosen.length)} of ${whole(names.length)} runs`);
  }

  #listRuns(names) {
    const held = [...this.boxes].find(([, box]) => box === document.activeElement)?.[0];
    const open = this.runs.querySelector("details")?.open ?? false;
    this.boxes = new Map(
      names.map((name) => [name, h("input", { type: "checkbox", onchange: (event) => this.#choose(name, event.target.checked) })]),
    );
    const choices = [...this.boxes].map(([name, box]) => h("label", { class: "run" }, box, named(name, 36)));
    this.runs.hidden = names.length < 2;
    if (names.length <= MOST_CHIPS) fill(this.runs, choices);
    else fill(this.runs, h("details", { class: "menu", open }, this.summary, h("div", { class: "list" }, choices)));
    this.boxes.get(held)?.focus({ preventScroll: true });
  }

  /** Whether a list is another than when it was last built: what is built anew loses the keyboard. */
  #changed(name, list) {
    const before = this.built.get(name);
    this.built.set(name, JSON.stringify(list));
    return before !== this.built.get(name);
  }

  #choose(run, on) {
    const chosen = this.state.runs.map((each) => each.run).filter((each) => (each === run ? on : this.state.chosen.includes(each)));
    this.state.set({ chosen });
  }
}
