// What part of the units is silent: of those that were there in a window, and none where nothing is known of them.

/** Of one site in one window. */
export function ofSite({ counts }, window, place) {
  return told((name) => counts[name][window][place]);
}

/** Of all sites whose units can die, in one window. */
export function ofRun({ counts, sites }, window) {
  return told((name) => counts[name][window].reduce((all, value, place) => (sites[place].can_die === false ? all : all + value), 0));
}

/** Places that follow each other and have a value, as lists: a curve has a gap between two of them. */
export function stretches(places, has) {
  const found = [];
  let open = false;
  for (const place of places) {
    const known = has(place);
    if (known && open) found.at(-1).push(place);
    else if (known) found.push([place]);
    open = known;
  }
  return found;
}

/** Counts, and as fractions `share` (dead) and `silent` (dead or unproven): null where of no unit is known whether it fired. */
function told(count) {
  const [units, dead, unproven, nonFinite, unobserved] = ["num_units", "dead", "unproven", "non_finite", "unobserved"].map(count);
  const known = units - nonFinite - unobserved > 0;
  const fraction = (part) => (known ? part / units : null);
  return { units, dead, unproven, nonFinite, known, share: fraction(dead), silent: fraction(dead + unproven) };
}
