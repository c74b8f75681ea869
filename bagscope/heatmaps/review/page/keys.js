// Keys, and the page of help that lists them.
(function (bagscope) {
  "use strict";

  const { byId, el } = bagscope;

  const EVERYWHERE = [
    ["?", "this help", () => byId("help").showModal()],
  ];
  const IN_TABLE = [
    ["↓ ↑ or j k", "next or previous row", null],
    ["Enter", "open the slide", null],
    ["/", "search", () => byId("filter-text").focus()],
  ];
  const ON_SLIDE = [
    ["j k", "next or previous slide", null],
    ["← ↑ → ↓", "move over the slide", null],
    ["+ −", "zoom", null],
    ["0", "whole slide", () => bagscope.fit()],
    ["r R", "rotate by 90°", null],
    ["h", "heatmap on or off", () => bagscope.toggleHeat()],
    ["[ ]", "less or more of the heatmap", null],
    ["1–9", "layer", null],
    ["a", "annotations on or off", () => !byId("toggle-annotations").hidden && bagscope.toggleOutlines()],
    ["g", "to the tiles; ← → among them, Enter goes there", () => inPanel(bagscope.focusGallery)],
    ["v", "to the verdict", () => inPanel(focusVerdict)],
    ["c", "to the comment", () => inPanel(() => byId("comment").focus())],
    ["f", "picture alone, or with its panel", () => bagscope.showAside(byId("panel").hidden)],
    ["u", "back to all slides", () => (location.hash = "")],
    ["Esc", "leave a field; take the mark away", null],
  ];
  const MOVES = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

  function inPanel(act) {
    bagscope.showAside(true);
    act();
  }

  function focusVerdict() {
    const choices = byId("verdict-choices");
    (choices.querySelector("input:checked") ?? choices.querySelector("input")).focus();
  }

  const onSlide = () => !byId("slide-view").hidden;
  const TYPED_IN = "input:not([type=checkbox]):not([type=radio]):not([type=range]), textarea, select";

  function press(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || byId("help").open) return false;
    const focused = document.activeElement ?? document.body;
    if (event.key === "Escape") return escape(focused);
    if (focused.matches(TYPED_IN)) return false;
    const [known] = [...EVERYWHERE, ...(onSlide() ? ON_SLIDE : IN_TABLE)].filter(([key, , act]) => act && key === event.key);
    if (known) {
      known[2]();
      return true;
    }
    return onSlide() ? pressOnSlide(event, focused) : pressInTable(event, focused);
  }

  function escape(focused) {
    if (focused.matches("input, textarea, select")) {
      focused.blur();
      return true;
    }
    return onSlide() && bagscope.clearMark() === true;
  }

  function pressInTable({ key }, focused) {
    const isRowKey = focused === document.body || focused.closest("main, #cohort-view > header");
    const step = { ArrowDown: 1, j: 1, ArrowUp: -1, k: -1, PageDown: 10, PageUp: -10 }[key];
    if (step && isRowKey) bagscope.moveRow(step);
    else if (key === "Enter" && focused === document.body) bagscope.openRow();
    else return false;
    return true;
  }

  function pressOnSlide({ key }, focused) {
    const layers = bagscope.currentSlide()?.layers ?? [];
    // Radio buttons and the slider use arrows themselves.
    const isChooser = focused.matches("[type=radio], [type=range]");
    if (key in MOVES) {
      if (isChooser) return false;
      const [across, down] = MOVES[key];
      if (!bagscope.stepGallery(across || down)) bagscope.panBy(across, down);
    } else if (key === "j" || key === "k") bagscope.stepSlide(key === "j" ? 1 : -1);
    else if (key === "+" || key === "=") bagscope.zoomBy(1.6);
    else if (key === "-" || key === "−") bagscope.zoomBy(1 / 1.6);
    else if (key === "r") bagscope.rotate(90);
    else if (key === "R") bagscope.rotate(-90);
    else if (key === "[") bagscope.nudgeOpacity(-0.1);
    else if (key === "]") bagscope.nudgeOpacity(0.1);
    else if (/^[1-9]$/.test(key) && layers[key - 1]) bagscope.chooseLayer(layers[key - 1].id);
    else return false;
    return true;
  }

  function startKeys() {
    addEventListener("keydown", (event) => press(event) && event.preventDefault());
    for (const button of document.querySelectorAll(".help-button")) {
      button.addEventListener("click", () => byId("help").showModal());
    }
    const list = (title, keys) => el("section", {}, el("h3", {}, title), el("dl", {},
      ...keys.flatMap(([key, does]) => [el("dt", {}, el("kbd", {}, key)), el("dd", {}, does)])));
    byId("help-keys").replaceChildren(list("On a slide", ON_SLIDE), list("In the table", [...IN_TABLE, ...EVERYWHERE]));
  }

  bagscope.startKeys = startKeys;
})(window.bagscope);
