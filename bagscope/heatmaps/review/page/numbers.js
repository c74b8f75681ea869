// Numbers as people read them, and where a score lies between the ends of its colours.
(function (bagscope) {
  "use strict";

  const grouped = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
  const whole = (value) => grouped.format(value);

  /** Three significant digits, and no more than are there. */
  function brief(value) {
    if (!Number.isFinite(value)) return "none";
    const size = Math.abs(value);
    if (size >= 1000) return whole(value);
    if (size !== 0 && size < 0.001) return value.toExponential(1).replace("e", "·10^");
    return String(Number(value.toPrecision(3))).replace("-", "−");
  }

  // Adding 0 makes a rounded −0 a plain one.
  const share = (value) => (Math.round(100 * value) / 100 + 0).toFixed(2).replace("-", "−");

  /** How a target's answers are written: probabilities with both digits, so that columns align. */
  const writerOf = (target) =>
    ["classes", "multilabel", "ordinal"].includes(target?.task) ? share : brief;

  /** Return 0 at `low`, 1 at `high`, kept within; NaN stays. */
  function placeOf(layer, value) {
    let [low, high] = [layer.low, layer.high];
    if (layer.log) {
      [low, high] = [Math.log(low), Math.log(high)];
      value = value > 0 ? Math.log(value) : value === value ? low : NaN;
    }
    const place = (value - low) / (high - low);
    return place < 0 ? 0 : place > 1 ? 1 : place;
  }

  /** Which of the 256 colours: as the files of the same heatmap choose it. */
  const colourIndexOf = (layer, value) => Math.min(Math.floor(placeOf(layer, value) * 256), 255);

  function lengthText(um) {
    return um >= 1000 ? `${brief(um / 1000)} mm` : `${brief(um)} µm`;
  }

  /** Return the longest of 1, 2, 5 × 10^n that is no longer than `longest`. */
  function roundLength(longest) {
    const power = 10 ** Math.floor(Math.log10(longest));
    const digit = longest / power;
    return (digit >= 5 ? 5 : digit >= 2 ? 2 : 1) * power;
  }

  /** The interval of an answer; empty where one model answered. */
  function intervalOf(answer, write) {
    if ((answer.low ?? null) === null) return "";
    return `${write(answer.low)}–${write(answer.high)}`;
  }

  /** The class whose probability an answer's value is; of two classes, that of the positive. */
  function valuedClass(answer) {
    const known = Object.entries(answer.probabilities ?? {});
    return known.find(([, value]) => Math.abs(value - answer.value) < 1e-6)?.[0] ?? "";
  }

  Object.assign(bagscope, {
    whole, brief, share, placeOf, colourIndexOf, lengthText, roundLength, writerOf, intervalOf,
    valuedClass,
  });
})(window.bagscope);
