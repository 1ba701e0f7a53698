// Which units are dimmed, and how they are coloured.

/** Dims what is not looked at in a panel: by status, by cause, by finding. */
export async function dimOthers(panel, state) {
  const { hidden, mechanism, finding } = state;
  const units = panel.timeline.num_units;
  let mask = null;
  if (finding?.run === panel.name && finding.units.length) {
    mask = new Uint8Array(units).fill(1);
    const site = panel.timeline.sites[finding.place];
    for (const [first, last] of site ? finding.units : []) mask.fill(0, site.start + first, site.start + last + 1);
  } else if (finding?.run === panel.name && finding.place >= 0) {
    const site = panel.timeline.sites[finding.place];
    mask = new Uint8Array(units).fill(1).fill(0, site.start, site.start + site.num_units);
  }
  if (mechanism) {
    const { window } = panel;
    const code = panel.timeline.mechanisms.indexOf(mechanism);
    const held = await panel.column(window, "mechanism").catch(() => null);
    if (window !== panel.window || mechanism !== state.mechanism) return;
    panel.warn(held ? "" : "The causes of this window were not kept: they are there for the last window.");
    mask ??= new Uint8Array(units);
    for (let unit = 0; unit < units; unit++) if (!held || held[unit] !== code) mask[unit] = 1;
    if (!held) mask = null;
  }
  panel.map.dim(hidden, mask);
}

/** Colours the units of a panel by what the reader asked for. */
export async function colourUnits(panel, state) {
  if (state.colour !== "rate") {
    panel.map.shade(null);
    return;
  }
  const { window } = panel;
  const rates = await panel.column(window, "firing_rate").catch(() => null);
  if (window !== panel.window || state.colour !== "rate") return;
  panel.warn(rates ? "" : "The firing rates of this window were not kept.");
  panel.map.shade(rates);
}
