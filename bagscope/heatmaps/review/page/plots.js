// Small plots as inline SVG.
(function (bagscope) {
  "use strict";

  const SPACE = "http://www.w3.org/2000/svg";
  const [WIDTH, HEIGHT] = [150, 96];
  const [LEFT, RIGHT, TOP, BOTTOM] = [28, 4, 6, 20];

  function svg(tag, attributes, ...children) {
    const element = document.createElementNS(SPACE, tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  }

  /** Lines over shares of the tiles: `series` is [[class, values], ...], the first in front. */
  function curvePlot(title, shares, series) {
    const numbers = series.flatMap(([, values]) => values).filter(Number.isFinite);
    let [low, high] = [Math.min(...numbers), Math.max(...numbers)];
    // Probabilities keep their whole range, so that a flat line looks flat.
    if (low >= 0 && high <= 1) [low, high] = [0, 1];
    if (low === high) [low, high] = [low - 0.5, high + 0.5];
    const x = (share) => LEFT + (WIDTH - LEFT - RIGHT) * share;
    const y = (value) => HEIGHT - BOTTOM - ((HEIGHT - TOP - BOTTOM) * (value - low)) / (high - low);
    const word = (text, place) => svg("text", place, text);
    const lines = [...series].reverse().map(([name, values]) =>
      svg("polyline", {
        class: `line ${name}`,
        points: values.map((value, i) => `${x(shares[i]).toFixed(1)},${y(value).toFixed(1)}`).join(" "),
      }));
    return svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", class: "plot" },
      svg("title", {}, title),
      svg("path", { class: "axes", d: `M${LEFT} ${TOP}V${HEIGHT - BOTTOM}H${WIDTH - RIGHT}` }),
      word(bagscope.brief(high), { x: LEFT - 3, y: TOP + 7, "text-anchor": "end" }),
      word(bagscope.brief(low), { x: LEFT - 3, y: HEIGHT - BOTTOM, "text-anchor": "end" }),
      word("0", { x: LEFT, y: HEIGHT - 9, "text-anchor": "middle" }),
      word("100 %", { x: WIDTH - RIGHT, y: HEIGHT - 9, "text-anchor": "end" }),
      ...lines);
  }

  bagscope.curvePlot = curvePlot;
})(window.bagscope);
