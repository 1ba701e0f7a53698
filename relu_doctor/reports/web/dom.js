// Elements out of plain values. Text only ever becomes text: nothing here, or elsewhere, parses markup.

const SVG = "http://www.w3.org/2000/svg";
const UNSEEN = /[\p{Cc}\p{Cf}\u2028\u2029]/gu; // control, bidi and zero-width characters

/** An HTML element: properties that begin with "on" are listeners, the others attributes; children are text or nodes. */
export function h(tag, properties = {}, ...children) {
  return filled(document.createElement(tag), properties, children);
}

/** The same for SVG. */
export function s(tag, properties = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), properties, children);
}

function filled(element, properties, children) {
  for (const [key, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** Text with what cannot be seen made visible. */
export function printable(text) {
  return String(text ?? "").slice(0, 20000).replace(UNSEEN, "\ufffd");
}

/** At most so many characters, the middle left out: both ends of a dotted path tell the most. */
export function shorten(text, most) {
  const characters = Array.from(text.slice(0, 20000));
  if (characters.length <= most) return text;
  const tail = Math.ceil(most * 0.6);
  return `${characters.slice(0, most - 1 - tail).join("")}…${characters.slice(-tail).join("")}`;
}

/** A name from somebody's model: isolated from the text around it, shortened, whole (so far as it is sane) on hover. */
export function named(text, most = 44) {
  const clean = printable(text);
  return h("bdi", { class: "name", title: clean.length > most ? shorten(clean, 400) : null }, shorten(clean, most));
}

/** Replaces an element's text where it has changed, so that nothing is laid out anew for nothing. */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Replaces what is inside an element. */
export function fill(element, ...children) {
  element.replaceChildren(...children.flat().filter((child) => child));
  return element;
}
