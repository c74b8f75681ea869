// The heatmap and the marks over the picture: two canvases that follow the view exactly.
//
// The heatmap is drawn opaque and its canvas made translucent, so that opacity costs nothing and
// tiles have no seams.
(function (bagscope) {
  "use strict";

  const OUTLINES = ["#00c2d1", "#ffd400", "#ff4fd8", "#7dff6a", "#ff8a3c", "#b48cff"];

  class Overlay {
    /** `toDevice()` gives the affine map [a, b, c, d, e, f] from level 0 to device pixels. */
    constructor(parent, toDevice, deviceSize) {
      this.toDevice = toDevice;
      this.deviceSize = deviceSize;
      this.heat = bagscope.el("canvas", { class: "overlay heat", "aria-hidden": "true" });
      this.marks = bagscope.el("canvas", { class: "overlay marks", "aria-hidden": "true" });
      parent.append(this.heat, this.marks);
      this.clear();
    }

    clear() {
      this.map = null;
      this.image = null;
      this.sorted = null;
      this.outlines = [];
      this.marked = null;
      this.hovered = null;
      this.outlinesShown = true;
    }

    showSlide(map, annotations) {
      this.clear();
      this.map = map;
      this.outlines = annotations.map((annotation, i) => {
        const path = new Path2D();
        for (const ring of annotation.polygons.flat()) {
          ring.forEach(([x, y], k) => (k ? path.lineTo(x, y) : path.moveTo(x, y)));
          path.closePath();
        }
        return { path, colour: outlineColour(i) };
      });
    }

    showLayer(layer, values, lut) {
      if (!layer) return;
      this.lut = lut;
      this.image = this.map.image(layer, values, lut);
      this.colours = Uint8Array.from(values, (value) => bagscope.colourIndexOf(layer, value));
      this.sorted = this.image
        ? null
        : [...values.keys()].filter((i) => !Number.isNaN(values[i])).sort((a, b) => values[a] - values[b]);
    }

    draw() {
      const [width, height] = this.deviceSize();
      for (const canvas of [this.heat, this.marks]) {
        if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
        canvas.getContext("2d").setTransform(1, 0, 0, 1, 0, 0);
        canvas.getContext("2d").clearRect(0, 0, width, height);
      }
      if (!this.map) return;
      const affine = this.toDevice();
      const seen = boundsIn(affine, width, height);
      const context = this.heat.getContext("2d");
      if (this.image) this.drawImage(context, affine, seen);
      else if (this.sorted) this.drawTiles(context, affine, seen);
      this.drawMarks(this.marks.getContext("2d"), affine);
    }

    drawImage(context, affine, seen) {
      const { across, down } = this.map.lattice;
      const cut = (axis, from, to) => {
        const begin = Math.max(0, Math.floor((from - axis.first) / axis.step));
        const end = Math.min(axis.count, Math.ceil((to - axis.first) / axis.step));
        return [begin, end - begin];
      };
      const [column, columns] = cut(across, seen.left, seen.right);
      const [row, rows] = cut(down, seen.top, seen.bottom);
      if (columns <= 0 || rows <= 0) return;
      context.setTransform(...affine);
      context.imageSmoothingEnabled = false;
      context.drawImage(this.image, column, row, columns, rows,
        across.first + column * across.step, down.first + row * down.step,
        columns * across.step, rows * down.step);
    }

    drawTiles(context, [a, b, c, d, e, f], seen) {
      const { xs, ys, size } = this.map;
      const isUpright = Math.abs(b) + Math.abs(c) < 1e-9 * Math.abs(a);
      if (!isUpright) context.setTransform(a, b, c, d, e, f);
      let colour = -1;
      for (const i of this.sorted) {
        const [x, y] = [xs[i], ys[i]];
        if (x > seen.right || y > seen.bottom || x + size < seen.left || y + size < seen.top) continue;
        if (this.colours[i] !== colour) {
          colour = this.colours[i];
          context.fillStyle = `rgb(${this.lut.slice(3 * colour, 3 * colour + 3).join()})`;
        }
        if (isUpright) {
          // On whole pixels, so that no edge is blended.
          const [left, top] = [Math.round(a * x + e), Math.round(d * y + f)];
          context.fillRect(left, top, Math.round(a * (x + size) + e) - left, Math.round(d * (y + size) + f) - top);
        } else context.fillRect(x, y, size, size);
      }
    }

    drawMarks(context, affine) {
      const px = 1 / Math.hypot(affine[0], affine[1]);
      const line = devicePixelRatio * px;
      context.setTransform(...affine);
      context.lineJoin = "round";
      if (this.outlinesShown) {
        for (const { path, colour } of this.outlines) stroke(context, path, line, colour);
      }
      const box = (tile) => {
        const path = new Path2D();
        path.rect(this.map.xs[tile], this.map.ys[tile], this.map.size, this.map.size);
        return path;
      };
      if (this.hovered !== null) {
        context.strokeStyle = "#000a";
        context.lineWidth = line;
        context.stroke(box(this.hovered));
      }
      if (this.marked !== null) {
        context.strokeStyle = "#000";
        context.lineWidth = 7 * line;
        context.stroke(box(this.marked));
        context.strokeStyle = "#fff";
        context.lineWidth = 4 * line;
        context.stroke(box(this.marked));
      }
    }
  }

  function stroke(context, path, line, colour) {
    context.strokeStyle = "#000c";
    context.lineWidth = 4 * line;
    context.stroke(path);
    context.strokeStyle = colour;
    context.lineWidth = 2 * line;
    context.stroke(path);
  }

  /** The upright box, in level-0 pixels, around what a device of this size shows. */
  function boundsIn([a, b, c, d, e, f], width, height) {
    const det = a * d - b * c;
    const xs = [];
    const ys = [];
    for (const [x, y] of [[0, 0], [width, 0], [0, height], [width, height]]) {
      xs.push((d * (x - e) - c * (y - f)) / det);
      ys.push((a * (y - f) - b * (x - e)) / det);
    }
    return { left: Math.min(...xs), right: Math.max(...xs), top: Math.min(...ys), bottom: Math.max(...ys) };
  }

  const outlineColour = (i) => OUTLINES[i % OUTLINES.length];

  Object.assign(bagscope, { Overlay, outlineColour });
})(window.bagscope);
