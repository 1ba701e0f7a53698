// The status of every unit in every window of a run: fetched in chunks, the nearest first, and kept.

const CHUNK_BYTES = 1 << 21;
const MOST_WINDOWS = 64; // that are handed out at once
const MOST_BYTES = 1 << 28; // kept per run; 500 windows of 100,000 units are 50 MB

export class Statuses {
  /** `arrived()` is called when a chunk has come, `failed(error)` when it did not. */
  constructor(source, run, units, windows, arrived, failed) {
    this.source = source;
    this.run = run;
    this.units = units;
    this.windows = windows;
    this.arrived = arrived;
    this.failed = failed;
    this.size = Math.max(1, Math.min(MOST_WINDOWS, Math.floor(CHUNK_BYTES / Math.max(units, 1))));
    this.chunks = new Map(); // place -> Uint8Array, the last used last
    this.fetching = false;
    this.wanted = 0;
    this.closed = false;
    this.resting = 0; // until when nothing is asked for, after a failure
  }

  /** One window's statuses, or null while they are on their way. */
  get(window) {
    const place = Math.floor(window / this.size);
    this.wanted = place;
    const chunk = this.chunks.get(place);
    this.#fetchNearest();
    if (!chunk) return null;
    const start = (window - place * this.size) * this.units;
    const found = chunk.subarray(start, start + this.units);
    return found.length === this.units ? found : null;
  }

  /** Takes over what an earlier look at the same windows has fetched, but for a chunk that was not full. */
  adopt(other) {
    for (const [place, chunk] of other.chunks) {
      if (chunk.length === this.size * this.units) this.chunks.set(place, chunk);
    }
  }

  close() {
    this.closed = true;
    this.chunks.clear();
  }

  /** Fetches what is nearest to the window looked at last, in both directions, until all is here or memory is used. */
  async #fetchNearest() {
    if (this.fetching || this.closed || Date.now() < this.resting) return;
    this.fetching = true;
    try {
      for (;;) {
        const place = this.#next();
        if (place === null) break;
        const first = place * this.size;
        const last = Math.min(first + this.size, this.windows) - 1;
        const bytes = await this.source.status(this.run, first, last);
        if (this.closed) return;
        this.chunks.set(place, bytes);
        this.#drop();
        this.arrived();
        await new Promise((resume) => setTimeout(resume, 0)); // drawing goes first
      }
    } catch (error) {
      this.resting = Date.now() + 3000;
      if (!this.closed) this.failed(error);
    } finally {
      this.fetching = false;
    }
  }

  #next() {
    const last = Math.ceil(this.windows / this.size) - 1;
    const most = Math.max(1, Math.floor(MOST_BYTES / (this.size * Math.max(this.units, 1))));
    for (let distance = 0; distance <= Math.min(last, Math.floor(most / 2)); distance++) {
      for (const place of [this.wanted + distance, this.wanted - distance]) {
        if (place >= 0 && place <= last && !this.chunks.has(place)) return place;
      }
    }
    return null;
  }

  /** Forgets what is farthest away when too much is kept. */
  #drop() {
    const most = Math.max(2, Math.floor(MOST_BYTES / (this.size * Math.max(this.units, 1))));
    while (this.chunks.size > most) {
      let farthest = null;
      for (const place of this.chunks.keys()) {
        if (farthest === null || Math.abs(place - this.wanted) > Math.abs(farthest - this.wanted)) farthest = place;
      }
      this.chunks.delete(farthest);
    }
  }
}
