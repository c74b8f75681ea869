// What the colours mean: the bar with its ticks, how many tiles have each colour, and the score
// under the pointer.
(function (bagscope) {
  "use strict";

  const { byId, el } = bagscope;

  let layer = null;

  function showLegend(shown, values, lut) {
    layer = shown;
    byId("legend-title").textContent = layer.title;
    byId("legend-meaning").textContent = [layer.unit_text, layer.meaning].filter(Boolean).join(": ");
    const [low, high] = [bagscope.brief(layer.low), bagscope.brief(layer.high)];
    byId("legend-bar").setAttribute("aria-label", `Colours from ${low} to ${high} ${layer.unit_text}`);
    drawBar(lut);
    drawCounts(values, lut);
    const ticks = layer.ticks.map(([value, text]) => {
      const tick = el("span", {}, text);
      tick.style.left = `${100 * bagscope.placeOf(layer, value)}%`;
      return tick;
    });
    byId("legend-ticks").replaceChildren(...ticks);
    pointAt(null);
    thinTicks(ticks);
  }

  /** Hide ticks whose words would run into the one before; the ends always stay. */
  function thinTicks(ticks) {
    const boxes = ticks.map((tick) => tick.getBoundingClientRect());
    const last = boxes.at(-1);
    let end = -Infinity;
    ticks.forEach((tick, i) => {
      const isEnd = i === 0 || i === ticks.length - 1;
      const fits = boxes[i].left > end + 4 && boxes[i].right < last.left - 4;
      tick.hidden = !isEnd && !fits;
      if (!tick.hidden) end = boxes[i].right;
    });
  }

  function drawBar(lut) {
    const context = byId("legend-bar").getContext("2d");
    const row = context.createImageData(256, 1);
    for (let i = 0; i < 256; i++) row.data.set([lut[3 * i], lut[3 * i + 1], lut[3 * i + 2], 255], 4 * i);
    context.putImageData(row, 0, 0);
  }

  function drawCounts(values, lut) {
    const canvas = byId("legend-bars");
    const context = canvas.getContext("2d");
    const [bins, height] = [64, canvas.height];
    const counts = new Array(bins).fill(0);
    for (const value of values) {
      if (!Number.isNaN(value)) counts[bagscope.colourIndexOf(layer, value) >> 2] += 1;
    }
    const most = Math.max(...counts, 1);
    context.clearRect(0, 0, canvas.width, height);
    counts.forEach((count, bin) => {
      if (!count) return;
      const colour = 3 * (4 * bin + 2);
      context.fillStyle = `rgb(${lut.slice(colour, colour + 3).join()})`;
      // Roots, so that a few hot tiles are seen beside many cold ones.
      const tall = Math.max(1.5, height * Math.sqrt(count / most));
      context.fillRect(4 * bin, height - tall, 4, tall);
    });
  }

  function pointAt(value) {
    const pointer = byId("legend-pointer");
    pointer.hidden = value === null;
    if (value !== null) pointer.style.left = `${100 * bagscope.placeOf(layer, value)}%`;
  }

  function showAnnotationLegend(annotations) {
    byId("legend-annotations").replaceChildren(...annotations.map((annotation, i) => {
      const line = el("span", { class: "swatch", "aria-hidden": "true" });
      line.style.borderColor = bagscope.outlineColour(i);
      return el("li", {}, line, annotation.class);
    }));
  }

  Object.assign(bagscope, { showLegend, pointAt, showAnnotationLegend });
})(window.bagscope);
