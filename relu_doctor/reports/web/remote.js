// Data from TensorBoard: every address is relative to this file, so that any --path_prefix works.

import { decodeColumn, splitColumns, widthOf } from "./columns.js";

/** What could not be had, in a sentence for the reader. */
export class DataError extends Error {}

export class RemoteSource {
  live = true; // more may come
  title = "";
  #columns = new Map(); // run -> the columns of its numbers

  async runs() {
    return (await this.#json("runs", {})).runs;
  }

  async timeline(run) {
    const timeline = await this.#json("timeline", { run });
    this.#columns.set(run, { columns: timeline.columns, sites: timeline.sites });
    return timeline;
  }

  async status(run, first, last) {
    return this.#bytes("status", { run, first, last });
  }

  async numbers(run, window, site) {
    const bytes = await this.#bytes("numbers", { run, window, site });
    const known = this.#columns.get(run);
    if (!bytes.length || !known) return null;
    const units = bytes.length / known.columns.reduce((sum, [, dtype]) => sum + widthOf(dtype), 0);
    return splitColumns(bytes, known.columns, units);
  }

  async column(run, window, column) {
    const bytes = await this.#bytes("column", { run, window, column });
    const dtype = new Map(this.#columns.get(run)?.columns ?? []).get(column);
    return bytes.length && dtype ? decodeColumn(bytes, dtype) : null;
  }

  async window(run, window) {
    return this.#json("window", { run, window });
  }

  async history(run, site, unit) {
    return this.#json("history", { run, site, unit });
  }

  async #fetch(route, asked) {
    const url = new URL(`../${route}`, import.meta.url);
    for (const [key, value] of Object.entries(asked)) url.searchParams.set(key, value);
    let response;
    try {
      response = await fetch(url);
    } catch {
      throw new DataError("TensorBoard does not answer. Is it still running?");
    }
    if (response.ok) return response;
    let said = "";
    try {
      said = (await response.json()).error ?? "";
    } catch {
      // no sentence came with it
    }
    throw new DataError(said || `TensorBoard answered ${response.status} to ${route}.`);
  }

  async #json(route, asked) {
    return (await this.#fetch(route, asked)).json();
  }

  async #bytes(route, asked) {
    return new Uint8Array(await (await this.#fetch(route, asked)).arrayBuffer());
  }
}
