// What the reader looks at. Each part of the page changes it here and hears of the changes here.

export class State extends EventTarget {
  runs = []; // summaries
  chosen = []; // names of the runs shown
  active = ""; // the run that findings and units are shown of
  steps = []; // of all chosen runs, ascending
  position = 0; // in steps
  playing = false;
  hidden = new Set(); // statuses that are not looked at
  site = ""; // part of the names of the sites looked at
  mechanism = ""; // of the units looked at
  colour = "status"; // or "rate"
  zoom = 0; // steps from the size that fits
  dark = false;
  selected = null; // { run, site, unit }
  finding = null; // { run, key, sites, ranges }: whose units are highlighted

  get step() {
    return this.steps[this.position] ?? 0;
  }

  /** Changes some fields; listeners of "change" are told which. */
  set(changes) {
    const changed = Object.keys(changes).filter((key) => this[key] !== changes[key]);
    if (!changed.length) return;
    for (const key of changed) this[key] = changes[key];
    this.dispatchEvent(new CustomEvent("change", { detail: new Set(changed) }));
  }

  /** Calls back when one of the fields changes; returns what ends it. */
  on(fields, callback) {
    const listener = (event) => {
      if (fields.some((field) => event.detail.has(field))) callback(event.detail);
    };
    this.addEventListener("change", listener);
    return () => this.removeEventListener("change", listener);
  }
}

/** The window of a run that was the latest at a step; -1 before its first. */
export function windowAt(timeline, step) {
  const windows = timeline.windows;
  let low = 0;
  let high = windows.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (windows[middle].last_step <= step) low = middle + 1;
    else high = middle;
  }
  return low - 1;
}

/** Whether a run is the same as before but for later windows. */
export function continues(before, after) {
  const same = (one, other) => one && one.last_step === other.last_step && one.closed === other.closed;
  return (
    before.sites.length === after.sites.length &&
    before.sites.every((site, place) => site.site_id === after.sites[place].site_id && site.start === after.sites[place].start) &&
    before.num_units === after.num_units &&
    before.windows.every((window, place) => same(after.windows[place], window))
  );
}
