// Data that lie in the page itself, deflated and in base64; page_data.py says how.

import { splitColumns } from "./columns.js";

const NOT_KNOWN = 255;

export class EmbeddedSource {
  live = false;

  /** Reads what is in the page. */
  static async open() {
    const source = new EmbeddedSource();
    const read = async (name) => inflate(document.getElementById(`rd-${name}`)?.textContent ?? "");
    const [data, status, mechanism, rates, marks, last] = await Promise.all(
      ["data", "status", "mechanism", "rates", "marks", "last"].map(read),
    );
    const { timeline, windows, decades, shades } = JSON.parse(new TextDecoder().decode(data));
    Object.assign(source, { told: timeline, windows, decades, shades });
    source.units = source.told.num_units;
    source.count = source.told.windows.length;
    source.bytes = { status, mechanism, rates };
    source.marks = source.#layers(marks);
    source.last = splitColumns(last, source.told.columns, source.units);
    return source;
  }

  #layers(marks) {
    const width = Math.ceil(this.count / 8);
    let start = 0;
    return this.windows[0].layers.map((units) => {
      const bits = marks.subarray(start, (start += units * width));
      return (window) => rangesOf(units, (unit) => (bits[unit * width + (window >> 3)] >> (window & 7)) & 1);
    });
  }

  async runs() {
    const { run, windows, made } = this.told;
    const last = windows.at(-1);
    return [{ run, windows: windows.length, made, first_step: windows[0].first_step, last_step: last.last_step }];
  }

  async timeline() {
    return this.told;
  }

  async status(_run, first, last) {
    const found = new Uint8Array((last - first + 1) * this.units);
    for (let window = first; window <= last; window++) {
      found.set(this.#column("status", window), (window - first) * this.units);
    }
    return found;
  }

  /** One byte per unit in one window. */
  #column(name, window) {
    const found = new Uint8Array(this.units);
    const bytes = this.bytes[name];
    for (let unit = 0, from = window; unit < this.units; unit++, from += this.count) found[unit] = bytes[from];
    return found;
  }

  #rate(code) {
    if (code === NOT_KNOWN) return NaN;
    return code === 0 ? 0 : 10 ** (((code - 1) / this.shades - 1) * this.decades);
  }

  async numbers(_run, window, site) {
    const { start, num_units: units } = this.told.sites[site];
    const cut = (values) => values.subarray(start, start + units);
    if (window === this.count - 1) {
      return Object.fromEntries(Object.entries(this.last).map(([name, values]) => [name, cut(values)]));
    }
    const found = { mechanism: cut(this.#column("mechanism", window)) };
    if (this.bytes.rates.length) {
      found.firing_rate = Float32Array.from(cut(this.#column("rates", window)), (code) => this.#rate(code));
    }
    return found;
  }

  async column(_run, window, name) {
    if (window === this.count - 1) return this.last[name];
    if (name === "mechanism") return this.#column(name, window);
    if (name !== "firing_rate" || !this.bytes.rates.length) return null;
    return Float32Array.from(this.#column("rates", window), (code) => this.#rate(code));
  }

  async window(_run, window) {
    const told = this.windows[window];
    const findings = told.findings.map((finding) => ({
      ...finding,
      units: finding.layer < 0 ? [] : this.marks[finding.layer](window),
    }));
    return { ...told, findings };
  }

  async history(_run, site, unit) {
    const from = (this.told.sites[site].start + unit) * this.count;
    const row = (name) => Array.from(this.bytes[name].subarray(from, from + this.count));
    const status = row("status");
    const windows = status.flatMap((code, window) => (code === NOT_KNOWN ? [] : [window]));
    const pick = (values) => windows.map((window) => values[window]);
    const place = this.told.sites[site].start + unit;
    return {
      windows,
      status: pick(status),
      mechanism: pick(row("mechanism")),
      firing_rate: this.bytes.rates.length ? pick(row("rates")).map((code) => this.#rate(code)) : [],
      onset: this.last.onset[place],
      onset_step: this.last.onset_step[place],
    };
  }
}

function rangesOf(units, has) {
  const found = [];
  for (let unit = 0; unit < units; unit++) {
    if (!has(unit)) continue;
    if (found.length && found.at(-1)[1] === unit - 1) found.at(-1)[1] = unit;
    else found.push([unit, unit]);
  }
  return found;
}

async function inflate(text) {
  if (!text) return new Uint8Array(0);
  const packed = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}
