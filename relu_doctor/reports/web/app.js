// The whole page: which runs are shown, what follows from the reader's choices, and what to say when there is nothing.

import { Controls } from "./controls.js";
import { fill, h, setText } from "./dom.js";
import { Findings, keyOf } from "./findings.js";
import { askedSite, watchAsked, watchTheme } from "./host.js";
import { Inspector } from "./inspector.js";
import { colourUnits, dimOthers } from "./looks.js";
import { failed, nothingRead, nothingYet, unreadWords } from "./messages.js";
import { Panel } from "./panel.js";
import { Player } from "./player.js";
import { State, continues } from "./state.js";

const LOOK_AGAIN = 10000; // milliseconds between looks for further windows
const SETTLED = 90; // milliseconds after which what is slow to come is asked for
const FIRST_CHOICE = 2; // runs shown when there are several

export class App {
  constructor(source, root) {
    this.source = source;
    this.root = root;
    this.state = new State();
    this.panels = new Map();
    this.controls = new Controls(this.state);
    this.player = new Player(this.state);
    this.inspector = new Inspector(this.state);
    this.findings = new Findings((finding) => this.#highlight(finding));
    this.stage = h("div", { class: "panels" });
    this.aside = h("aside", { "aria-label": "Findings and unit" }, this.inspector.card.element, this.findings.element);
    this.unread = h("p", { class: "note", role: "status", hidden: true });
    this.top = h("div", { class: "top" }, this.controls.runs, this.unread, this.player.element, this.controls.element);
    this.body = h("div", { class: "body" }, this.stage, this.aside);
    this.message = h("div", { class: "message", role: "status" });
    fill(root, this.top, this.body, this.message, this.inspector.tooltip.element, this.inspector.tooltip.spoken);
    root.classList.add("relu-doctor");
    this.#listen();
    new ResizeObserver(() => root.style.setProperty("--top", `${this.top.offsetHeight}px`)).observe(this.top);
  }

  async start() {
    this.#say("Reading the runs …");
    try {
      await this.#look();
    } catch (error) {
      this.#fail(error);
    }
    if (this.source.live) this.timer ??= setInterval(() => this.#lookAgain(), LOOK_AGAIN);
  }

  #listen() {
    const { state } = this;
    watchTheme((dark) => {
      for (const panel of this.panels.values()) panel.map.setTheme(dark);
      state.set({ dark });
    });
    state.on(["chosen"], () => this.#showChosen());
    state.on(["position", "steps"], () => this.#schedule());
    state.on(["active"], () => this.#activate());
    state.on(["site"], () => this.#each((panel) => panel.map.filter(state.site)));
    state.on(["zoom"], () => this.#each((panel) => panel.map.setZoom(state.zoom)));
    state.on(["hidden", "mechanism", "finding"], () => this.#each((panel) => dimOthers(panel, state)));
    state.on(["colour"], () => this.#each((panel) => colourUnits(panel, state)));
    state.on(["selected", "dark"], () => this.inspector.showPicked(this.panels));
    addEventListener("resize", () => this.inspector.leave());
    watchAsked(() => this.#revealAsked());
  }

  #each(callback) {
    for (const panel of this.panels.values()) callback(panel);
  }

  // ---- which runs

  async #look() {
    const all = await this.source.runs();
    const runs = all.filter((run) => run.windows > 0);
    const unread = all.filter((run) => !run.windows && run.unreadable?.length);
    if (!runs.length) {
      this.#say(...(unread.length ? nothingRead(unread) : nothingYet()));
      return;
    }
    setText(this.unread, unreadWords(unread).join(" "));
    this.unread.hidden = !unread.length;
    const { state } = this;
    const grown = runs.filter((run) => {
      const known = state.runs.find((each) => each.run === run.run);
      return known && (known.windows !== run.windows || known.last_step !== run.last_step);
    });
    state.set({ runs });
    const names = runs.map((run) => run.run);
    const chosen = state.chosen.filter((name) => names.includes(name));
    if (!chosen.length) state.set({ chosen: names.slice(0, FIRST_CHOICE) });
    else if (chosen.length !== state.chosen.length) state.set({ chosen });
    else if (grown.some((run) => chosen.includes(run.run))) await this.#grow(grown);
  }

  async #lookAgain() {
    if (document.hidden) return;
    try {
      await this.#look();
    } catch (error) {
      if (this.panels.size) this.#each((panel) => panel.warn(error.message));
      else this.#fail(error);
    }
  }

  /** Runs have gone on: the reader stays where he was, or at the end. */
  async #grow(runs) {
    const follow = this.state.position >= this.state.steps.length - 1;
    const timelines = new Map([...this.panels].map(([name, panel]) => [name, panel.timeline]));
    const names = runs.map((run) => run.run).filter((name) => timelines.has(name));
    for (const timeline of await Promise.all(names.map((name) => this.source.timeline(name)))) {
      timelines.set(timeline.run, timeline);
    }
    this.#lay(timelines, follow);
  }

  async #showChosen() {
    const { state, source } = this;
    const turn = (this.turn = (this.turn ?? 0) + 1);
    for (const [name, panel] of this.panels) {
      if (!state.chosen.includes(name)) {
        panel.close();
        this.panels.delete(name);
      }
    }
    if (!state.chosen.length) {
      this.#say("Choose a run above.");
      return;
    }
    const timelines = new Map([...this.panels].map(([name, panel]) => [name, panel.timeline]));
    try {
      const missing = state.chosen.filter((name) => !timelines.has(name));
      if (missing.length && !this.panels.size) this.#say("Reading the windows …");
      for (const timeline of await Promise.all(missing.map((name) => source.timeline(name)))) {
        timelines.set(timeline.run, timeline);
      }
    } catch (error) {
      if (turn === this.turn) this.#fail(error);
      return;
    }
    if (turn !== this.turn) return;
    this.#lay(timelines);
  }

  #lay(timelines, follow = false) {
    const { state } = this;
    const shown = state.chosen.map((name) => timelines.get(name)).filter((timeline) => timeline?.windows.length);
    if (!shown.length) {
      this.#say(...nothingYet());
      return;
    }
    const steps = [...new Set(shown.flatMap((timeline) => timeline.windows.map((window) => window.last_step)))];
    steps.sort((one, other) => one - other);
    const before = state.step;
    const started = state.steps.length > 0;
    const range = [Math.min(...shown.map((timeline) => timeline.windows[0].first_step)), steps.at(-1)];
    const same = this.range && this.range[0] === range[0] && this.range[1] === range[1];
    this.range = range;
    const held = this.#held();
    for (const timeline of shown) {
      const before = this.panels.get(timeline.run);
      if (before?.timeline === timeline && same) continue;
      const panel = this.#panel(timeline, range);
      if (before && continues(before.timeline, timeline)) panel.statuses.adopt(before.statuses);
      before?.close();
      this.panels.set(timeline.run, panel);
    }
    this.#say("");
    this.controls.describe(shown);
    const elements = shown.map((timeline) => this.panels.get(timeline.run).element);
    if (elements.some((element, place) => this.stage.children[place] !== element)) fill(this.stage, elements);
    this.panels.get(held?.run)?.hold(held);
    this.stage.classList.toggle("several", shown.length > 1);
    const place = steps.findLastIndex((step) => step <= before);
    const position = follow || !started ? steps.length - 1 : Math.max(place, 0);
    state.set({ steps, position });
    if (!state.chosen.includes(state.active)) state.set({ active: state.chosen[0], finding: null, selected: null });
    else this.#activate();
    this.#schedule();
    if (!started) setTimeout(() => this.#revealAsked(), SETTLED); // the strips have their heights
  }

  /** Which run's panel has the keyboard, and where in it: a panel that takes its place takes that over. */
  #held() {
    for (const panel of this.panels.values()) {
      const held = panel.held();
      if (held) return { run: panel.name, ...held };
    }
    return null;
  }

  /** Shows the site that TensorBoard's address asks for. */
  #revealAsked() {
    const asked = askedSite();
    if (asked) this.#each((panel) => panel.map.reveal(panel.timeline.sites.findIndex((site) => site.site_id === asked), true));
  }

  #panel(timeline, range) {
    const { state } = this;
    const panel = new Panel(this.source, timeline, range, {
      hover: (...where) => this.inspector.point(...where, false),
      focus: (...where) => this.inspector.point(...where, true),
      leave: () => this.inspector.leave(),
      pick: (from, site, unit) => {
        state.set({ active: from.name });
        state.set({ selected: { run: from.name, site, unit } });
      },
      activate: (from) => state.set({ active: from.name }),
      seek: (step) => state.set({ position: this.#nearest(step), playing: false }),
      failed: (error) => panel.warn(error.message),
      arrived: () => this.#schedule(),
    });
    panel.map.setTheme(state.dark);
    panel.map.zoom = state.zoom;
    if (state.site) panel.map.filter(state.site);
    return panel;
  }

  #nearest(step) {
    const { steps } = this.state;
    let best = 0;
    steps.forEach((each, place) => {
      if (Math.abs(each - step) < Math.abs(steps[best] - step)) best = place;
    });
    return best;
  }

  // ---- what follows from the step

  /** Draws once per frame, however often it is asked to. */
  #schedule() {
    if (this.frame) return;
    this.frame = requestAnimationFrame(() => {
      this.frame = 0;
      this.#draw();
    });
  }

  #draw() {
    const counts = new Map();
    for (const panel of this.panels.values()) {
      panel.show(this.state.step);
      const { timeline, window } = panel;
      for (const status of timeline.statuses) {
        const sum = timeline.counts[status]?.[window]?.reduce((all, value) => all + value, 0) ?? 0;
        counts.set(status, (counts.get(status) ?? 0) + sum);
      }
    }
    this.controls.count(counts);
    this.inspector.refresh();
    clearTimeout(this.settling);
    this.settling = setTimeout(() => this.#settle(), SETTLED);
  }

  /** The slider rests: what belongs to this window alone is asked for. */
  #settle() {
    this.#tellFindings();
    this.#each((panel) => {
      if (this.state.mechanism) dimOthers(panel, this.state);
      if (this.state.colour === "rate") colourUnits(panel, this.state);
    });
    if (this.state.selected) this.inspector.showPicked(this.panels);
  }

  #activate() {
    for (const panel of this.panels.values()) {
      const active = panel.name === this.state.active;
      panel.element.classList.toggle("active", active);
      panel.title.setAttribute("aria-pressed", String(active));
    }
    this.#tellFindings();
  }

  async #tellFindings() {
    const panel = this.panels.get(this.state.active);
    if (!panel || panel.window < 0) return;
    const { window } = panel;
    const key = `${panel.name}\n${window}\n${panel.timeline.windows[window].last_step}`;
    if (this.told === key) return;
    this.told = key;
    try {
      const told = await this.source.window(panel.name, window);
      if (this.told !== key) return;
      this.inspector.word = told.verdict.unit_word;
      const { finding } = this.state;
      this.findings.pressed = finding?.run === panel.name ? finding.key : null;
      this.findings.show(this.panels.size > 1 ? panel.name : "", panel.timeline.windows[window].last_step, told);
      if (finding?.run !== panel.name) return;
      const again = told.findings.find((each) => keyOf(each) === finding.key);
      this.state.set({ finding: this.#highlighted(panel, again ?? { code: "", site: "", units: [] }, finding.key) });
    } catch (error) {
      this.told = "";
      panel.warn(error.message);
    }
  }

  // ---- which units are dimmed, and how they are coloured

  #highlight(finding) {
    const panel = this.panels.get(this.state.active);
    if (!finding || !panel) {
      this.state.set({ finding: null });
      return;
    }
    const found = this.#highlighted(panel, finding, keyOf(finding));
    this.state.set({ finding: found });
    if (found.place >= 0) panel.map.reveal(found.place);
  }

  #highlighted(panel, finding, key) {
    return { run: panel.name, key, place: panel.timeline.sites.findIndex((site) => site.name === finding.site), units: finding.units };
  }

  // ---- what is said when there is nothing to show

  #say(...content) {
    const busy = content.some((each) => each !== "");
    this.message.hidden = !busy;
    this.top.hidden = busy && !this.state.runs.length;
    this.body.hidden = busy;
    fill(this.message, busy ? content : []);
  }

  #fail(error) {
    this.#say(...failed(error, () => this.start()));
  }
}
