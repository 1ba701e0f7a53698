// What a page of its own starts with: the data are in it.

import { App } from "./app.js";
import { fill, h } from "./dom.js";
import { EmbeddedSource } from "./embedded.js";

/** Draws the picture where the page has its place for it, and closes the tables that stand in for it. */
export async function start() {
  const root = document.getElementById("relu-doctor");
  try {
    await new App(await EmbeddedSource.open(), root).start();
    document.getElementById("relu-doctor-tables").open = false;
  } catch (error) {
    fill(root, h("p", {}, `The picture cannot be drawn in this browser (${error.message}). The tables below say the same.`));
  }
}
