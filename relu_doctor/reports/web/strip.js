// One site's units as a strip of squares: one canvas per some rows of them, drawn only while it can be seen, and of it
// only the units that look different than before.

import { h } from "./dom.js";
import { BASE, SHADES } from "./palette.js";

const TILE_ROWS = 48;

export class Strip {
  /** `site` has start and num_units, `place` is its place in the timeline; `observer` is an IntersectionObserver whose entries lead back by `tileOf`. */
  constructor(site, place, observer, tileOf) {
    this.site = site;
    this.place = place;
    this.observer = observer;
    this.tileOf = tileOf;
    this.tiles = [];
    this.cursor = h("div", { class: "cursor", hidden: true });
    this.pin = h("div", { class: "cursor pin", hidden: true });
    this.element = h("div", { class: "strip" }, this.cursor, this.pin);
    this.columns = 1;
    this.cell = 1;
  }

  /** How high it is for a width, in rows of squares. */
  static rows(units, width, cell) {
    return Math.ceil(units / Math.max(1, Math.floor(width / cell)));
  }

  /** Lays the squares out anew: `cell` CSS pixels each, `scale` device pixels per CSS pixel. */
  layOut(width, cell, scale) {
    this.release();
    this.cell = cell;
    this.scale = scale;
    this.columns = Math.max(1, Math.min(Math.floor(width / cell), this.site.num_units));
    const rows = Math.ceil(this.site.num_units / this.columns);
    this.element.style.width = `${this.columns * cell}px`;
    this.element.style.height = `${rows * cell}px`;
    this.element.dataset.cell = String(cell);
    for (let first = 0; first < rows; first += TILE_ROWS) {
      const count = Math.min(TILE_ROWS, rows - first);
      const canvas = h("canvas", { class: "tile", "aria-hidden": "true" });
      canvas.width = canvas.height = 0;
      canvas.style.top = `${first * cell}px`;
      canvas.style.width = `${this.columns * cell}px`;
      canvas.style.height = `${count * cell}px`;
      const tile = { canvas, strip: this, first: first * this.columns, rows: count, visible: false, last: null };
      this.tileOf.set(canvas, tile);
      this.tiles.push(tile);
      this.element.insertBefore(canvas, this.cursor);
      this.observer.observe(canvas);
    }
  }

  /** Draws what can be seen of it. `picture` has status, shades, dims, mask and sprites; see map.js. */
  draw(picture) {
    for (const tile of this.tiles) if (tile.visible) this.drawTile(tile, picture);
  }

  drawTile(tile, picture) {
    const size = Math.round(this.cell * this.scale);
    const width = this.columns * size;
    if (!tile.last || tile.sprites !== picture.sprites) this.#prepare(tile, width, tile.rows * size, picture.sprites);
    const units = Math.min(tile.rows * this.columns, this.site.num_units - tile.first);
    const { status, shades, dims, mask, sprites, steady } = picture;
    const { last, pixels } = tile;
    let from = this.site.start + tile.first;
    let top = tile.rows;
    let bottom = -1;
    for (let unit = 0, row = 0, column = 0; unit < units; unit++, from++) {
      const code = status === null ? 15 : status[from] & 15;
      const dim = dims[code] | (mask === null ? 0 : mask[from]);
      let look = dim ? code + BASE : code;
      if (shades !== null && !steady[code]) look = 2 * BASE + shades[from] + (dim ? SHADES : 0);
      if (last[unit] !== look) {
        last[unit] = look;
        blit(pixels, width, row * size * width + column * size, sprites[look], size);
        if (row < top) top = row;
        bottom = row;
      }
      if (++column === this.columns) {
        column = 0;
        row++;
      }
    }
    if (bottom >= 0) tile.context.putImageData(tile.image, 0, 0, 0, top * size, width, (bottom - top + 1) * size);
  }

  #prepare(tile, width, height, sprites) {
    if (!tile.image || tile.canvas.width !== width) {
      tile.canvas.width = width;
      tile.canvas.height = height;
      tile.context = tile.canvas.getContext("2d", { desynchronized: false });
      tile.image = tile.context.createImageData(width, height);
      tile.pixels = new Uint32Array(tile.image.data.buffer);
    }
    tile.sprites = sprites;
    tile.last = new Uint8Array(tile.rows * this.columns).fill(255);
  }

  /** Shows or hides a tile; what cannot be seen keeps no picture. */
  setVisible(tile, visible) {
    tile.visible = visible;
    if (visible) return;
    tile.last = tile.image = tile.pixels = tile.context = null;
    tile.canvas.width = tile.canvas.height = 0;
  }

  release() {
    for (const tile of this.tiles) {
      this.observer.unobserve(tile.canvas);
      this.setVisible(tile, false);
      tile.canvas.remove();
    }
    this.tiles = [];
  }

  /** The unit under a point of the strip; null beside them. */
  unitAt(x, y) {
    const column = Math.floor(x / this.cell);
    const unit = Math.floor(y / this.cell) * this.columns + column;
    return x < 0 || y < 0 || column >= this.columns || unit >= this.site.num_units ? null : unit;
  }

  /** Puts a frame (the cursor or the pin) around a unit; null takes it away. */
  frame(element, unit) {
    element.hidden = unit === null;
    if (unit === null) return;
    const column = unit % this.columns;
    const row = Math.floor(unit / this.columns);
    element.style.transform = `translate(${column * this.cell}px, ${row * this.cell}px)`;
    element.style.width = element.style.height = `${Math.max(this.cell, 4)}px`;
  }
}

function blit(pixels, width, start, sprite, size) {
  let from = 0;
  for (let y = 0; y < size; y++, start += width) {
    for (let x = 0; x < size; x++) pixels[start + x] = sprite[from++];
  }
}
