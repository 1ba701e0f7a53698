// How numbers and codes are told.

const WHOLE = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

export const STATUS_WORDS = {
  dead: "silent on every input, and enough inputs were seen to be sure",
  unproven: "silent on every input, but too few were seen to say dead",
  saturated: "never left the flat high side of its rectifier",
  rare: "fired, on few inputs; rare is not dead",
  dormant: "fires, but its mean output is tiny beside its site's",
  active: "fires",
  non_finite: "NaN or Inf reached it: nothing can be said",
  unobserved: "its rectifier was never called",
};

const MECHANISM_WORDS = {
  non_finite: "NaN or Inf",
  zero_weights: "weights are zero",
  dead_upstream: "fed by dead units",
  constant_inputs: "inputs do not vary",
  normalization: "normalisation's shift",
  negative_bias: "negative bias",
  input_offset: "mean of the inputs",
  bias_or_offset: "bias or inputs' mean",
  bias_and_offset: "bias and inputs' mean",
  not_selected: "never selected",
  saturated: "saturated",
  unknown: "not known",
};

const ONSET_WORDS = {
  born_dead: "born dead",
  found_dead: "found dead",
  died: "died",
  revived: "revived",
};

const OTHER_WORDS = { absent: "not there in this window", waiting: "being read" };

/** The word of a status; `code` is undefined while it is on its way, and 255 where the site was not there. */
export const statusOf = (timeline, code) => (code === undefined ? "waiting" : (timeline.statuses[code] ?? "absent"));
export const plainStatus = (status) => OTHER_WORDS[status] ?? status.replace("_", "-");
export const plainMechanism = (mechanism) => MECHANISM_WORDS[mechanism] ?? mechanism.replaceAll("_", " ");
export const plainOnset = (onset) => ONSET_WORDS[onset] ?? onset.replaceAll("_", " ");

/** 12,345 */
export function whole(value) {
  return WHOLE.format(value);
}

/** 12.3 %, and two digits where it is below one. */
export function percent(share) {
  const value = share * 100;
  if (value === 0 || value >= 99.95) return `${value.toFixed(0)} %`;
  if (value >= 1) return `${value.toFixed(1)} %`;
  return value < 0.001 ? "< 0.001 %" : `${Number(value.toPrecision(2))} %`;
}

/** The same, or a dash where it is not known. */
export function fraction(share) {
  return share === null ? "–" : percent(share);
}

/** A number in three digits, with a real minus sign. */
export function decimal(value) {
  if (value === null || value === undefined || Number.isNaN(Number(value))) return "–";
  const number = Number(value);
  if (!Number.isFinite(number)) return number > 0 ? "∞" : "−∞";
  const size = Math.abs(number);
  const text = number === 0 ? "0" : size < 1e-3 || size >= 1e5 ? number.toExponential(1) : String(Number(number.toPrecision(3)));
  return text.replace("-", "−");
}

/** 1 unit, 2 units */
export function plural(count, word) {
  return `${whole(count)} ${word}${count === 1 ? "" : "s"}`;
}
