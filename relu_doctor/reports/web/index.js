// What TensorBoard calls to draw the tab.

import { App } from "./app.js";
import { RemoteSource } from "./remote.js";

/** Draws the tab into the frame that TensorBoard has made for it. */
export async function render() {
  document.title = "ReLU Doctor";
  document.documentElement.lang = "en";
  const style = document.createElement("link");
  style.rel = "stylesheet";
  style.href = new URL("./style.css", import.meta.url).href;
  const styled = new Promise((resume) => (style.onload = style.onerror = resume));
  document.head.append(style);
  await styled; // so that nothing is measured before it is styled
  await new App(new RemoteSource(), document.body.appendChild(document.createElement("main"))).start();
}
