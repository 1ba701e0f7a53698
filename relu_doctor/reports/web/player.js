// The step slider and play.

import { h, setText } from "./dom.js";
import { whole } from "./words.js";

const WHOLE_RUN = 12000; // milliseconds that playing all of it takes, at least
const FASTEST = 30; // windows a second

export class Player {
  constructor(state) {
    this.state = state;
    this.button = h("button", { class: "play", type: "button", "aria-label": "Play", onclick: () => this.toggle() });
    this.slider = h("input", { type: "range", class: "steps", min: 0, step: 1, "aria-label": "Step", oninput: () => this.#slid() });
    this.step = h("output", { class: "step" });
    this.kept = h("span", { class: "kept" });
    this.element = h("div", { class: "player", role: "group", "aria-label": "Steps" }, this.button, this.slider, this.step, this.kept);
    state.on(["steps", "position", "playing", "runs", "chosen"], () => this.render());
    document.addEventListener("keydown", (event) => {
      const busy = event.target instanceof Element && event.target.closest("button, input, select, textarea, summary, a, .strip");
      if (event.key === " " && !busy && !event.ctrlKey && !event.metaKey && !event.altKey) {
        event.preventDefault();
        this.toggle();
      }
    });
    this.render();
  }

  #slid() {
    this.state.set({ position: Number(this.slider.value), playing: false });
  }

  toggle() {
    const { state } = this;
    if (state.playing) {
      state.set({ playing: false });
      return;
    }
    if (state.position >= state.steps.length - 1) state.set({ position: 0 });
    state.set({ playing: true });
    const each = Math.max(1000 / FASTEST, WHOLE_RUN / Math.max(1, state.steps.length));
    let before = performance.now();
    const tick = (now) => {
      if (!state.playing) return;
      const moved = Math.floor((now - before) / each);
      if (moved > 0) {
        before += moved * each;
        const position = Math.min(state.position + moved, state.steps.length - 1);
        state.set({ position, playing: position < state.steps.length - 1 });
      }
      requestAnimationFrame(tick);
    };
    requestAnimationFrame(tick);
  }

  render() {
    const { steps, position, playing, runs, chosen } = this.state;
    this.element.hidden = steps.length < 2;
    this.slider.max = String(Math.max(0, steps.length - 1));
    this.slider.value = String(position);
    const text = `step ${whole(this.state.step)}`;
    this.slider.setAttribute("aria-valuetext", `${text} of ${whole(steps.at(-1) ?? 0)}`);
    setText(this.step, text);
    if (this.shown !== playing) {
      this.shown = playing;
      this.button.classList.toggle("playing", playing);
      this.button.setAttribute("aria-label", playing ? "Pause" : "Play");
    }
    const shown = runs.filter((run) => chosen.includes(run.run));
    const kept = shown.reduce((sum, run) => sum + run.windows, 0);
    const made = shown.reduce((sum, run) => sum + run.made, 0);
    setText(this.kept, `${whole(kept)} of ${whole(made)} windows`);
    const damaged = shown.flatMap((run) => run.unreadable ?? []);
    const sampled = "A sample of the windows was kept. Start TensorBoard with --samples_per_plugin relu_doctor=0 to see all.";
    this.kept.classList.toggle("some", kept < made);
    this.kept.title = kept === made ? "" : damaged.length ? `Some records cannot be read: ${damaged[0]}` : sampled;
  }
}
