// Colours of the statuses, for light and dark, told apart by lightness and pattern too: no one needs to see hues.

// Per status [light, dark, pattern]. Warm and strong is silent, blue is alive, so that the eye finds the dead at once.
const LOOKS = {
  active: ["#c5d4e3", "#33475c", "full"],
  rare: ["#6fa8d8", "#5b9bd5", "dot"],
  dormant: ["#3f8f83", "#56b3a4", "low"],
  unproven: ["#e2a32c", "#f0b429", "hatch"],
  dead: ["#c2370c", "#ff6b3d", "full"],
  saturated: ["#8a4fa3", "#c38be0", "high"],
  non_finite: ["#15191e", "#f4f6f8", "cross"],
  unobserved: ["#aab2bb", "#5d6874", "frame"],
  absent: ["#edf0f3", "#1f262d", "full"], // the site was not there in the window
};
const GROUNDS = ["#ffffff", "#14191f"]; // what the map lies on
const RAMP = [
  ["#e6eef6", "#1d5f99"], // light: rarely to always
  ["#22313f", "#8cc8ff"],
];
export const SHADES = 24; // of firing rates
const DIMMED = 0.16; // of the colour is left
const STEADY = ["dead", "unproven", "saturated", "non_finite", "unobserved"]; // keep their colour when rates are shown

/** The order in which statuses are listed: what matters first. */
export const LISTED = ["dead", "unproven", "saturated", "non_finite", "rare", "dormant", "active", "unobserved"];

export function colourOf(status, dark) {
  return (LOOKS[status] ?? LOOKS.absent)[dark ? 1 : 0];
}

/**
 * Pictures of one unit, by what it is: place `code` for a status, `code + BASE` dimmed, and from `2 * BASE` on the
 * shades of firing rates, then those dimmed. Each is Uint32 (cell * cell), its last row and column the gap.
 */
export const BASE = 16;
export function spritesFor(statuses, cell, gap, dark) {
  const ground = rgb(GROUNDS[dark ? 1 : 0]);
  const found = [];
  for (let code = 0; code < BASE; code++) {
    const [light, night, pattern] = LOOKS[statuses[code]] ?? LOOKS.absent;
    const colour = rgb(dark ? night : light);
    found[code] = sprite(cell, gap, colour, ground, pattern);
    found[code + BASE] = sprite(cell, gap, mixed(ground, colour, DIMMED), ground, pattern);
  }
  const [low, high] = RAMP[dark ? 1 : 0].map(rgb);
  for (let shade = 0; shade < SHADES; shade++) {
    const colour = mixed(low, high, shade / (SHADES - 1));
    found[2 * BASE + shade] = sprite(cell, gap, colour, ground, "full");
    found[2 * BASE + SHADES + shade] = sprite(cell, gap, mixed(ground, colour, DIMMED), ground, "full");
  }
  return found;
}

/** Per status, whether it keeps its colour when firing rates are shown. */
export function steady(statuses) {
  return statuses.map((status) => STEADY.includes(status));
}

/** A swatch of a status as the map draws it. */
export function drawSwatch(canvas, status, dark) {
  const scale = Math.max(1, Math.round(globalThis.devicePixelRatio || 1));
  const cell = 12 * scale;
  canvas.width = canvas.height = cell;
  const [light, night, pattern] = LOOKS[status];
  const pixels = new ImageData(cell, cell);
  new Uint32Array(pixels.data.buffer).set(sprite(cell, 0, rgb(dark ? night : light), rgb(GROUNDS[dark ? 1 : 0]), pattern));
  canvas.getContext("2d").putImageData(pixels, 0, 0);
}

function sprite(cell, gap, colour, ground, pattern) {
  const size = cell - gap;
  const found = new Uint32Array(cell * cell);
  const on = packed(colour);
  const off = packed(ground);
  const soft = packed(mixed(ground, colour, 0.35));
  for (let y = 0; y < cell; y++) {
    for (let x = 0; x < cell; x++) {
      const inside = x < size && y < size;
      found[y * cell + x] = inside ? (covers(pattern, x, y, size) ? on : soft) : off;
    }
  }
  return found;
}

/** Whether a pattern covers a point of a unit's square; too small a square is full. */
function covers(pattern, x, y, size) {
  if (size < 5) return true;
  const edge = x === 0 || y === 0 || x === size - 1 || y === size - 1;
  const wide = Math.max(1, Math.round(size / 6));
  switch (pattern) {
    case "hatch":
      return (x + y) % (4 * wide) < 2 * wide;
    case "cross":
      return Math.abs(x - y) < wide || Math.abs(size - 1 - x - y) < wide || edge;
    case "dot":
      return (x - (size - 1) / 2) ** 2 + (y - (size - 1) / 2) ** 2 <= (size * 0.42) ** 2;
    case "low":
      return y >= size / 2;
    case "high":
      return y < size / 2;
    case "frame":
      return edge;
    default:
      return true;
  }
}

function rgb(hex) {
  const value = Number.parseInt(hex.slice(1), 16);
  return [value >> 16, (value >> 8) & 255, value & 255];
}

function mixed(from, to, share) {
  return from.map((value, place) => Math.round(value + (to[place] - value) * share));
}

function packed([red, green, blue]) {
  return ((255 << 24) | (blue << 16) | (green << 8) | red) >>> 0; // ImageData is little-endian RGBA
}
