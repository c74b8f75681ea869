// Where the tiles of a slide lie. Frame: level-0 pixels throughout.
//
// Tiles on a lattice (neighbours abut, or overlap by whole steps) become an image of one pixel per
// cell; a cell under several tiles has their mean, as in the files of the same heatmap. Anything
// else is drawn tile by tile, the highest score on top.
(function (bagscope) {
  "use strict";

  const MOST_CELLS = 1 << 24;
  const LONGEST_SIDE = 8192;
  const MOST_STEPS_PER_TILE = 8;

  /** Fit first + i·step to the corners along one axis; null where one lies a pixel off. */
  function fitAxis(corners, size) {
    const places = [...new Set(corners)].sort((a, b) => a - b);
    if (places.length === 1) return { first: places[0], step: size, per: 1, index: new Map([[places[0], 0]]), count: 1 };
    let smallest = Infinity;
    for (let i = 1; i < places.length; i++) smallest = Math.min(smallest, places[i] - places[i - 1]);
    const per = Math.max(1, Math.round(size / smallest));
    let step = size / per;
    if (per > MOST_STEPS_PER_TILE || Math.abs(smallest - step) > 1) return null;
    const index = new Map([[places[0], 0]]);
    for (let i = 1; i < places.length; i++) {
      const far = index.get(places[i - 1]) + Math.round((places[i] - places[i - 1]) / step);
      index.set(places[i], far);
      // Corners are whole pixels, steps need not be: the farther, the better it is known.
      step = (places[i] - places[0]) / far;
    }
    for (const [place, i] of index) {
      if (Math.abs(places[0] + i * step - place) > 1) return null;
    }
    return { first: places[0], step, per, index, count: index.get(places.at(-1)) + per };
  }

  function fitLattice(xs, ys, size) {
    const across = fitAxis(xs, size);
    const down = across && fitAxis(ys, size);
    if (!down) return null;
    const fits = Math.max(across.count, down.count) <= LONGEST_SIDE && across.count * down.count <= MOST_CELLS;
    return fits ? { across, down } : null;
  }

  class TileMap {
    constructor(tiles) {
      const coords = bagscope.int32sOf(tiles.coords);
      this.count = coords.length / 2;
      this.size = tiles.size_l0;
      this.xs = coords.filter((_, i) => i % 2 === 0);
      this.ys = coords.filter((_, i) => i % 2 === 1);
      this.lattice = this.count ? fitLattice(this.xs, this.ys, this.size) : null;
      this.buckets = new Map();
      for (let i = 0; i < this.count; i++) {
        const bucket = this.bucketOf(this.xs[i], this.ys[i]);
        const inside = this.buckets.get(bucket);
        if (inside) inside.push(i);
        else this.buckets.set(bucket, [i]);
      }
    }

    bucketOf(x, y) {
      return Math.floor(x / this.size) * 0x4000000 + Math.floor(y / this.size);
    }

    /** The tiles over a point. */
    at(x, y) {
      const over = [];
      for (const left of [x - this.size, x]) {
        for (const top of [y - this.size, y]) {
          for (const i of this.buckets.get(this.bucketOf(left, top)) ?? []) {
            const [dx, dy] = [x - this.xs[i], y - this.ys[i]];
            if (dx >= 0 && dy >= 0 && dx < this.size && dy < this.size) over.push(i);
          }
        }
      }
      return over;
    }

    /** The score drawn at a point, and its tile; null where there is none. */
    scoreAt(x, y, values) {
      const scored = this.at(x, y).filter((i) => !Number.isNaN(values[i]));
      if (!scored.length) return null;
      const tile = scored.reduce((best, i) => (values[i] > values[best] ? i : best));
      if (!this.lattice) return { value: values[tile], tile };
      return { value: scored.reduce((sum, i) => sum + values[i], 0) / scored.length, tile };
    }

    bounds() {
      let [left, top, right, bottom] = [Infinity, Infinity, -Infinity, -Infinity];
      for (let i = 0; i < this.count; i++) {
        left = Math.min(left, this.xs[i]);
        top = Math.min(top, this.ys[i]);
        right = Math.max(right, this.xs[i] + this.size);
        bottom = Math.max(bottom, this.ys[i] + this.size);
      }
      return { x: left, y: top, width: right - left, height: bottom - top };
    }

    /** Draw a layer into a canvas of one pixel per cell; null off a lattice. */
    image(layer, values, lut) {
      if (!this.lattice) return null;
      const { across, down } = this.lattice;
      const [wide, high] = [across.count, down.count];
      const sums = new Float64Array(wide * high);
      const counts = new Uint8Array(wide * high);
      for (let i = 0; i < this.count; i++) {
        if (Number.isNaN(values[i])) continue;
        const [column, row] = [across.index.get(this.xs[i]), down.index.get(this.ys[i])];
        for (let y = row; y < row + down.per; y++) {
          for (let x = column; x < column + across.per; x++) {
            sums[y * wide + x] += values[i];
            counts[y * wide + x] += 1;
          }
        }
      }
      const canvas = bagscope.el("canvas", { width: wide, height: high });
      const context = canvas.getContext("2d");
      const picture = context.createImageData(wide, high);
      const pixels = new Uint32Array(picture.data.buffer);
      const opaque = Uint32Array.from({ length: 256 }, (_, i) =>
        ((255 << 24) | (lut[3 * i + 2] << 16) | (lut[3 * i + 1] << 8) | lut[3 * i]) >>> 0);
      for (let cell = 0; cell < counts.length; cell++) {
        if (counts[cell]) pixels[cell] = opaque[bagscope.colourIndexOf(layer, sums[cell] / counts[cell])];
      }
      context.putImageData(picture, 0, 0);
      return canvas;
    }
  }

  bagscope.TileMap = TileMap;
})(window.bagscope);
