// What it adds up to: the verdict of a window, how sure that is, what was not seen, and the findings.

import { fill, h, named, printable, shorten } from "./dom.js";
import { plural, whole } from "./words.js";

/** A verdict's severity as a small sign; its place in the scale is told by shape and word too. */
export function severity(name, label) {
  return h("span", { class: `severity ${name}` }, h("i", { "aria-hidden": "true" }), printable(label).slice(0, 120));
}

export class Findings {
  /** `chosen(finding | null)` is told which one is pressed. */
  constructor(chosen) {
    this.chosen = chosen;
    this.pressed = null;
    this.about = h("div", { class: "about" });
    this.heading = h("h2", {}, "Findings");
    this.list = h("ul", { class: "findings" });
    this.element = h("section", { class: "card", "aria-label": "Findings" }, this.about, this.heading, this.list);
  }

  /** Shows one window. `run` is empty where there is but one; `told` is what a source's window() gave. */
  show(run, step, told) {
    const { verdict, findings } = told;
    const more = [...(verdict.details ?? []), verdict.coverage].filter(Boolean).map((text) => h("p", {}, printable(text)));
    const unseen = (verdict.remarks ?? []).map((text) => h("li", {}, printable(text)));
    const open = this.about.querySelector("details")?.open ?? false;
    fill(
      this.about,
      h("p", { class: "of" }, run ? named(run, 30) : null, run ? ", " : null, `${run ? "" : "At "}step ${whole(step)}`),
      h("p", { class: "sentence" }, printable(verdict.sentence)),
      h("details", { open }, h("summary", {}, "How sure, and what was not seen"), more, unseen.length ? h("ul", {}, unseen) : null),
    );
    this.heading.textContent = findings.length ? plural(findings.length, "finding") : "No findings";
    fill(this.list, findings.map((finding) => this.#item(finding)));
  }

  #item(finding) {
    const key = keyOf(finding);
    const units = finding.units.reduce((sum, [first, last]) => sum + last - first + 1, 0);
    const pressed = this.pressed === key;
    const body = h(
      "div",
      { class: "more", hidden: !pressed },
      h("p", {}, printable(finding.evidence)),
      finding.advice ? h("p", { class: "advice" }, printable(finding.advice)) : null,
    );
    const button = h(
      "button",
      { type: "button", "aria-pressed": String(pressed), "aria-expanded": String(pressed), onclick: () => this.#press(finding) },
      h("span", { class: "row" }, h("code", {}, printable(finding.code)), finding.site ? named(finding.site, 26) : null, units ? h("span", { class: "units" }, plural(units, "unit")) : null),
      h("span", { class: "title" }, shorten(printable(finding.title), 240)),
    );
    return h("li", { class: pressed ? "pressed" : null, "data-key": key.slice(0, 300) }, button, body);
  }

  #press(finding) {
    const key = keyOf(finding);
    this.pressed = this.pressed === key ? null : key;
    for (const item of this.list.children) {
      const on = this.pressed !== null && item.dataset.key === this.pressed.slice(0, 300);
      item.classList.toggle("pressed", on);
      item.firstChild.setAttribute("aria-pressed", String(on));
      item.firstChild.setAttribute("aria-expanded", String(on));
      item.lastChild.hidden = !on;
    }
    this.chosen(this.pressed === null ? null : finding);
  }
}

/** What makes a finding the same one in another window. */
export function keyOf(finding) {
  return `${finding.code} ${finding.site}`;
}
