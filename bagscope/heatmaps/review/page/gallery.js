// The highest and lowest tiles of the layer shown; pressing one moves there and marks it.
(function (bagscope) {
  "use strict";

  const { byId, el } = bagscope;
  const SIDES = { top: "Highest", bottom: "Lowest" };

  function showGallery(layer) {
    const { gallery } = bagscope.currentSlide();
    const own = gallery.filter((entry) => entry.layer === layer?.id);
    byId("gallery-section").hidden = !gallery.length;
    const rows = Object.entries(SIDES).map(([side, title]) => {
      const entries = own.filter((entry) => entry.side === side).sort((a, b) => a.rank - b.rank);
      if (!entries.length) return null;
      return el("div", { class: "gallery-side" }, el("h3", {}, title),
        el("div", { class: "gallery-tiles", role: "group", "aria-label": `${title} tiles` },
          ...entries.map((entry) => tileButton(entry, layer))));
    }).filter(Boolean);
    byId("gallery").replaceChildren(...(rows.length ? rows : [el("p", { class: "quiet" }, "None for this layer.")]));
  }

  function tileButton(entry, layer) {
    const score = bagscope.brief(entry.value);
    const words = `${SIDES[entry.side]} ${entry.rank}: ${score} ${layer.unit_text}`;
    const picture = entry.image
      ? el("img", { src: entry.image, alt: "", decoding: "async" })
      : el("span", { class: "no-tile" });
    return el("button", {
      type: "button", class: "tile", title: words, "aria-label": `${words}. Go there`, "data-tile": entry.tile,
      onclick: (event) => {
        bagscope.jumpTo(entry.tile, entry.image, words);
        bagscope.showChosenTile(event.currentTarget);
        bagscope.announce(`Moved to tile ${words}`);
      },
    }, picture, el("span", { class: "number tile-score" }, score));
  }

  function showChosenTile(button) {
    for (const one of byId("gallery").querySelectorAll(".tile")) {
      if (one === button) one.setAttribute("aria-current", "true");
      else one.removeAttribute("aria-current");
    }
  }

  /** Move the keyboard among the gallery's tiles; returns whether it was there. */
  function stepGallery(step) {
    const buttons = [...byId("gallery").querySelectorAll(".tile")];
    const index = buttons.indexOf(document.activeElement);
    if (index < 0) return false;
    buttons[Math.min(Math.max(index + step, 0), buttons.length - 1)].focus();
    return true;
  }

  const focusGallery = () => byId("gallery").querySelector(".tile")?.focus();

  Object.assign(bagscope, { showGallery, showChosenTile, stepGallery, focusGallery });
})(window.bagscope);
