// What is said when there is nothing to show, and what to do about it.

import { h, printable, shorten } from "./dom.js";

/** No run has a window. */
export function nothingYet() {
  return [
    h("h2", {}, "No windows of a run yet"),
    h("p", {}, "relu_doctor writes them beside your other summaries, from training:"),
    h("pre", {}, 'relu_doctor.Monitor(model, optimizer=optimizer, sinks=["tensorboard:runs/exp1"])'),
    h("p", {}, "or from a scan of checkpoints:"),
    h("pre", {}, "relu-doctor scan runs/exp1/*.pt --model net.py:make --data valid.npy --tensorboard runs/exp1"),
    h("p", { class: "quiet" }, "Point TensorBoard's --logdir at that directory, or one above. This tab looks again every 10 seconds."),
  ];
}

/** Runs of which no window could be read, a sentence each, with the first reason. */
export function unreadWords(runs) {
  return runs.map(({ run, unreadable }) => `Nothing of ${shorten(printable(run), 60)} could be read: ${shorten(printable(unreadable[0]), 300)}`);
}

/** There are windows, but none that could be read. */
export function nothingRead(runs) {
  return [
    h("h2", {}, "No window could be read"),
    ...unreadWords(runs.slice(0, 20)).map((words) => h("p", {}, words)),
    h("p", { class: "quiet" }, "A newer relu_doctor may have written them, or their files are damaged."),
  ];
}

/** Something could not be had; `again()` tries once more. */
export function failed(error, again) {
  return [
    h("h2", {}, "That did not work"),
    h("p", {}, printable(error.message)),
    h("button", { type: "button", class: "again", onclick: again }, "Try again"),
  ];
}
