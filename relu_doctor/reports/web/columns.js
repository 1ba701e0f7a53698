// Numbers of units as they travel: columns of little-endian values, one behind the other.

const HALVES = new Float32Array(1 << 16); // every value of half precision
for (let bits = 0; bits < HALVES.length; bits++) {
  const exponent = (bits >> 10) & 31;
  const fraction = bits & 1023;
  const sign = bits >> 15 ? -1 : 1;
  if (exponent === 31) HALVES[bits] = fraction ? NaN : sign * Infinity;
  else HALVES[bits] = sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -14 * (fraction / 1024));
}

const WIDTHS = { u1: 1, "<f2": 2, "<i4": 4, "<f4": 4 };

/** Bytes of one value. */
export function widthOf(dtype) {
  const width = WIDTHS[dtype];
  if (!width) throw new Error(`expected a known type of numbers, found ${dtype}: reload the page.`);
  return width;
}

/** The values of one column. */
export function decodeColumn(bytes, dtype) {
  const width = widthOf(dtype);
  if (width === 1) return bytes;
  const copy = bytes.slice().buffer; // aligned
  if (dtype === "<i4") return new Int32Array(copy);
  if (dtype === "<f4") return new Float32Array(copy);
  return Float32Array.from(new Uint16Array(copy), (bits) => HALVES[bits]);
}

/** All columns of one site: name -> values. */
export function splitColumns(bytes, columns, units) {
  const found = {};
  let start = 0;
  for (const [name, dtype] of columns) {
    const stop = start + units * widthOf(dtype);
    found[name] = decodeColumn(bytes.subarray(start, stop), dtype);
    start = stop;
  }
  return found;
}
