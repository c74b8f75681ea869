// The whole slide, small: where the view lies, where the scores are, and a way to move there.
(function (bagscope) {
  "use strict";

  const LONGEST_PX = 190;

  class Minimap {
    /** `moveTo(x, y)` is called with a place in level-0 pixels. */
    constructor(canvas, moveTo) {
      this.canvas = canvas;
      this.frame = null;
      this.picture = null;
      this.overlay = null;
      this.opacity = 0;
      let held = false;
      const go = (event) => {
        if (!held || !this.frame) return;
        const box = canvas.getBoundingClientRect();
        const x = (event.clientX - box.left) / box.width;
        const y = (event.clientY - box.top) / box.height;
        moveTo(this.frame.x + x * this.frame.width, this.frame.y + y * this.frame.height);
      };
      canvas.addEventListener("pointerdown", (event) => {
        held = true;
        canvas.setPointerCapture(event.pointerId);
        go(event);
      });
      canvas.addEventListener("pointermove", go);
      for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, () => (held = false));
    }

    /** `frame` is what is shown (level 0); `source` the address of a small picture of it, or null. */
    show(frame, source, overlay) {
      this.frame = frame;
      this.overlay = overlay;
      this.picture = null;
      const scale = (LONGEST_PX * devicePixelRatio) / Math.max(frame.width, frame.height);
      this.canvas.width = Math.max(1, Math.round(frame.width * scale));
      this.canvas.height = Math.max(1, Math.round(frame.height * scale));
      this.canvas.style.width = `${this.canvas.width / devicePixelRatio}px`;
      this.canvas.style.height = `${this.canvas.height / devicePixelRatio}px`;
      if (!source) return;
      const image = new Image();
      image.onload = () => {
        if (this.frame !== frame) return;
        this.picture = image;
        this.draw();
      };
      image.src = source;
    }

    /** Draw anew; `corners` are those of the view, in level-0 pixels. */
    draw(corners = this.corners, opacity = this.opacity) {
      this.corners = corners;
      this.opacity = opacity;
      if (!this.frame) return;
      const { width, height } = this.canvas;
      const context = this.canvas.getContext("2d");
      const scale = width / this.frame.width;
      context.setTransform(1, 0, 0, 1, 0, 0);
      context.globalAlpha = 1;
      context.fillStyle = "#fff";
      context.fillRect(0, 0, width, height);
      context.imageSmoothingEnabled = true;
      if (this.picture) context.drawImage(this.picture, 0, 0, width, height);
      context.setTransform(scale, 0, 0, scale, -this.frame.x * scale, -this.frame.y * scale);
      const { image, map, marked } = this.overlay;
      if (image) {
        const { across, down } = map.lattice;
        context.globalAlpha = opacity;
        context.imageSmoothingEnabled = false;
        context.drawImage(image, across.first, down.first, across.count * across.step, down.count * down.step);
        context.globalAlpha = 1;
      }
      if (marked !== null) {
        context.beginPath();
        context.arc(map.xs[marked] + map.size / 2, map.ys[marked] + map.size / 2, (5 * devicePixelRatio) / scale, 0, 7);
        context.fillStyle = "#fff";
        context.fill();
        context.strokeStyle = "#000";
        context.lineWidth = (2 * devicePixelRatio) / scale;
        context.stroke();
      }
      if (!corners) return;
      context.beginPath();
      corners.forEach(([x, y], i) => (i ? context.lineTo(x, y) : context.moveTo(x, y)));
      context.closePath();
      for (const [colour, thick] of [["#fff", 4], ["#b3005e", 2]]) {
        context.strokeStyle = colour;
        context.lineWidth = (thick * devicePixelRatio) / scale;
        context.stroke();
      }
    }
  }

  bagscope.Minimap = Minimap;
})(window.bagscope);
