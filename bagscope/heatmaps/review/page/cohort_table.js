// The table of slides. Only rows in sight are in the page, so that a thousand of them filter and
// sort at once; a row once made is kept.
(function (bagscope) {
  "use strict";

  const { byId, el, brief } = bagscope;
  const ROW_PX = 60;
  const ROWS_BEYOND = 6;
  const OUTCOMES = { wrong: 0, unknown: 1, right: 2 };
  const natural = new Intl.Collator("en", { numeric: true, sensitivity: "base" });

  let cohort = null;
  let target = null;
  let shown = [];
  let active = 0;
  let isRestoring = false;
  let sort = { column: "outcome", down: false };
  const rows = new Map();

  const outcomeOf = (slide) =>
    slide.correct === true ? "right" : slide.correct === false ? "wrong" : "unknown";
  const answerOf = (slide) => (target ? slide.predicted?.[target.name] : null) ?? null;
  const truthOf = (slide) => (target ? slide.truth?.[target.name] : null) ?? null;
  const textOf = (value) => (typeof value === "number" ? brief(value) : (value ?? ""));

  function outcomeChip(slide) {
    const outcome = outcomeOf(slide);
    if (outcome === "unknown") return el("span", { class: "quiet" }, "–");
    // Who is mistaken, the model or the label, is for the reviewer to say.
    return outcome === "wrong"
      ? el("span", { class: "chip wrong", title: "Predicted is not the truth that is stated; either may be mistaken" }, "✕ discordant")
      : el("span", { class: "chip right", title: "Predicted is the truth that is stated" }, "✓ concordant");
  }

  function answerCell(slide) {
    const answer = answerOf(slide);
    if (!answer) return el("span", { class: "quiet" }, "none");
    const write = bagscope.writerOf(target);
    const isShare = write === bagscope.share && answer.value !== null;
    const words = el("span", {}, el("b", {}, answer.text));
    const valued = bagscope.valuedClass(answer);
    if (isShare) {
      // A share of another class than the answer's is named, or it would read as the answer's own.
      const name = valued && valued !== answer.text ? ` · ${valued}` : "";
      words.append(el("span", { class: "number" }, `${name} ${write(answer.value)}`));
    }
    const interval = bagscope.intervalOf(answer, write);
    if (interval) words.append(el("span", { class: "number quiet" }, ` ${interval}`));
    if (!isShare) return words;
    const bar = el("span", { class: "answer-bar", "aria-hidden": "true" }, el("span", {}));
    bar.firstChild.style.width = `${100 * Math.min(Math.max(answer.value, 0), 1)}%`;
    if ((target.threshold ?? null) !== null) {
      bar.append(el("span", { class: "cut", title: `threshold ${brief(target.threshold)}` }));
      bar.lastChild.style.left = `${100 * target.threshold}%`;
    }
    return el("span", { class: "answer" }, words, bar);
  }

  function faithCell(slide) {
    const faith = slide.faithfulness;
    if ((faith?.score ?? null) === null && !faith?.warning) return el("span", { class: "quiet" }, "–");
    if (!faith.warning) return el("span", { class: "number" }, bagscope.share(faith.score));
    return el("span", { class: "chip caution", title: faith.warning }, `⚠ ${faith.score === null ? "" : bagscope.share(faith.score)}`);
  }

  function verdictCell(slide) {
    const { verdict, comment } = bagscope.verdictOf(slide);
    if (!verdict && !comment) return el("span", { class: "quiet" }, "–");
    return el("span", { class: "verdict-cell", title: comment },
      el("b", {}, verdict || "comment"), comment ? el("span", { class: "quiet" }, comment) : null);
  }

  const number = (value) => (value === null || value === undefined ? Infinity : value);
  const COLUMNS = [
    { id: "slide", title: "Slide", key: (slide) => slide.slide, cell: slideCell },
    { id: "patient", title: "Patient", wide: true, key: (slide) => slide.patient, cell: (slide) => slide.patient },
    { id: "fold", title: "Fold", wide: true, numeric: true, if: (slide) => slide.fold !== null, key: (slide) => number(slide.fold), cell: (slide) => textOf(slide.fold) || "–" },
    { id: "truth", title: "Truth", key: truthOf, cell: (slide) => textOf(truthOf(slide)) || el("span", { class: "quiet" }, "unknown") },
    { id: "predicted", title: "Predicted", key: (slide) => answerOf(slide)?.value ?? answerOf(slide)?.text ?? null, cell: answerCell },
    { id: "outcome", title: "Outcome", key: (slide) => OUTCOMES[outcomeOf(slide)], cell: outcomeChip },
    { id: "faithfulness", title: "Faithful", if: (slide) => slide.faithfulness, key: (slide) => number(slide.faithfulness?.score), cell: faithCell, numeric: true },
    { id: "ood", title: "Unlike training", wide: true, if: (slide) => slide.ood !== null, key: (slide) => (slide.ood ? 0 : 1), cell: (slide) => (slide.ood ? el("span", { class: "chip caution" }, "⚠ unlike") : el("span", { class: "quiet" }, "–")) },
    { id: "tiles", title: "Tiles", wide: true, numeric: true, key: (slide) => slide.tiles, cell: (slide) => bagscope.whole(slide.tiles) },
    { id: "verdict", title: "Verdict", key: (slide) => bagscope.verdictOf(slide).verdict || null, cell: verdictCell },
  ];
  let columns = COLUMNS;

  function slideCell(slide) {
    const link = el("a", { href: bagscope.hrefOf(slide), class: "slide-link" }, slide.slide);
    const picture = slide.thumb
      ? el("img", { src: slide.thumb, alt: "", width: 72, height: 48, decoding: "async" })
      : el("span", { class: "no-thumb" });
    return el("span", { class: "slide-cell" }, picture, link);
  }

  function rowOf(slide) {
    let row = rows.get(slide.key);
    if (!row) {
      row = el("tr", { class: outcomeOf(slide) === "wrong" ? "is-wrong" : "" },
        ...columns.map((column) =>
          el("td", { class: classOf(column) }, column.cell(slide))));
      row.addEventListener("click", (event) => {
        if (!event.target.closest("a")) location.hash = bagscope.hrefOf(slide);
      });
      rows.set(slide.key, row);
    }
    return row;
  }

  const classOf = (column) =>
    `of-${column.id}${column.wide ? " wide" : ""}${column.numeric ? " number" : ""}`;

  function compare(a, b) {
    const { key } = columns.find((column) => column.id === sort.column);
    const [left, right] = [key(a), key(b)];
    // What is not known comes last, whichever way the rest runs.
    if ((left ?? null) === null || (right ?? null) === null) {
      return ((left ?? null) === null) - ((right ?? null) === null);
    }
    const order = typeof left === "number" && typeof right === "number"
      ? left - right || 0
      : natural.compare(left, right);
    return sort.down ? -order : order;
  }

  function matches() {
    const words = byId("filter-text").value.trim().toLowerCase();
    const value = (name) => byId(`filter-${name}`).value;
    const [outcome, truth, predicted, verdict] =
      ["outcome", "truth", "predicted", "verdict"].map(value);
    const warned = byId("filter-warning").checked;
    const unlike = byId("filter-ood").checked;
    return cohort.slides.filter((slide) =>
      (!words || `${slide.slide} ${slide.patient} ${bagscope.verdictOf(slide).comment}`.toLowerCase().includes(words)) &&
      (!outcome || outcomeOf(slide) === outcome) &&
      (!truth || String(truthOf(slide)) === truth) &&
      (!predicted || answerOf(slide)?.text === predicted) &&
      (!verdict || (bagscope.verdictOf(slide).verdict || "none") === verdict) &&
      (!warned || Boolean(slide.faithfulness?.warning)) &&
      (!unlike || slide.ood === true));
  }

  /** Filter and sort anew, and show from the top. */
  function refresh() {
    shown = matches().sort(compare);
    active = 0;
    byId("table-scroll").scrollTop = 0;
    const [all, some] = [cohort.slides.length, shown.length];
    const slides = `${bagscope.whole(all)} ${all === 1 ? "slide" : "slides"}`;
    byId("filter-count").textContent = some === all ? slides : `${bagscope.whole(some)} of ${slides}`;
    byId("slides-none").hidden = some > 0;
    byId("filter-clear").hidden = !isFiltered();
    byId("slides").setAttribute("aria-rowcount", some + 1);
    for (const head of byId("slides-head").children) {
      const own = head.dataset.column === sort.column;
      head.setAttribute("aria-sort", own ? (sort.down ? "descending" : "ascending") : "none");
    }
    render();
  }

  function render() {
    const scroller = byId("table-scroll");
    const first = Math.max(0, Math.floor(scroller.scrollTop / ROW_PX) - ROWS_BEYOND);
    const last = Math.min(shown.length, first + Math.ceil(scroller.clientHeight / ROW_PX) + 2 * ROWS_BEYOND);
    const spacer = (count) => {
      const row = el("tr", { class: "spacer", "aria-hidden": "true" }, el("td", { colSpan: columns.length }));
      row.firstChild.style.height = `${count * ROW_PX}px`;
      return row;
    };
    const visible = shown.slice(first, last).map((slide, i) => {
      const row = rowOf(slide);
      row.setAttribute("aria-rowindex", first + i + 2);
      row.classList.toggle("is-active", first + i === active);
      return row;
    });
    const focused = document.activeElement?.closest("#slides-body a");
    byId("slides-body").replaceChildren(spacer(first), ...visible, spacer(shown.length - last));
    // A row that leaves the page and comes back must not lose the keyboard.
    if (!focused?.isConnected || focused === document.activeElement) return;
    isRestoring = true;
    focused.focus({ preventScroll: true });
    isRestoring = false;
  }

  function moveTo(index) {
    if (!shown.length) return;
    active = Math.min(Math.max(index, 0), shown.length - 1);
    const scroller = byId("table-scroll");
    const top = active * ROW_PX;
    const room = scroller.clientHeight - byId("slides-head").offsetHeight - ROW_PX;
    if (top < scroller.scrollTop) scroller.scrollTop = top;
    else if (top > scroller.scrollTop + room) scroller.scrollTop = top - room;
    render();
    rows.get(shown[active].key).querySelector("a").focus({ preventScroll: true });
  }

  const isFiltered = () =>
    [...byId("filters").elements].some((field) =>
      field.type === "checkbox" ? field.checked : field.id !== "filter-target" && field.value !== "" && field.type !== "button");

  const fill = (select, pairs) =>
    select.replaceChildren(...pairs.map(([value, text]) => el("option", { value }, text)));

  function chooseTarget(name) {
    target = cohort.targets.find((one) => one.name === name) ?? cohort.targets[0] ?? null;
    rows.clear();
    const classes = (target?.classes ?? []).map((one) => [one, one]);
    for (const label of document.querySelectorAll(".of-classes")) label.hidden = !classes.length;
    fill(byId("filter-truth"), [["", "all"], ...classes]);
    fill(byId("filter-predicted"), [["", "all"], ...classes]);
    columns = COLUMNS.filter((column) => !column.if || cohort.slides.some(column.if));
    byId("slides-head").replaceChildren(...columns.map((column) =>
      el("th", { scope: "col", class: classOf(column), "data-column": column.id },
        el("button", { type: "button", onclick: () => sortBy(column.id) }, column.title))));
  }

  function sortBy(id) {
    sort = { column: id, down: sort.column === id && !sort.down };
    refresh();
  }

  function showProgress() {
    const done = cohort.slides.filter(bagscope.isReviewed).length;
    const all = cohort.slides.length;
    byId("progress-text").textContent = `${bagscope.whole(done)} of ${bagscope.whole(all)} reviewed`;
    byId("progress-done").style.width = `${all ? (100 * done) / all : 0}%`;
  }

  function startTable(data) {
    cohort = data;
    byId("cohort-title").textContent = data.title;
    byId("cohort-run").textContent =
      `run ${data.run}${data.pseudonymised ? " · pseudonyms" : ""}${data.live ? " · live" : ""}`;
    byId("headline").replaceChildren(...data.headline.map((text) => el("li", {}, text)));
    byId("notes").replaceChildren(...data.notes.map((text) => el("li", {}, text)));
    byId("filter-target-label").hidden = data.targets.length < 2;
    fill(byId("filter-target"), data.targets.map((one) => [one.name, one.name]));
    fill(byId("filter-verdict"), [["", "all"], ["none", "none yet"], ...bagscope.VERDICTS.map((one) => [one, one])]);
    byId("filter-warning").parentElement.hidden = !data.slides.some((slide) => slide.faithfulness?.warning);
    byId("filter-ood").parentElement.hidden = !data.slides.some((slide) => slide.ood);
    byId("filters").addEventListener("submit", (event) => event.preventDefault());
    byId("filters").addEventListener("input", (event) => {
      if (event.target.id === "filter-target") chooseTarget(event.target.value);
      refresh();
    });
    byId("filter-clear").addEventListener("click", () => {
      byId("filters").reset();
      refresh();
      byId("filter-text").focus();
    });
    byId("table-scroll").addEventListener("scroll", bagscope.atNextFrame(render));
    addEventListener("resize", bagscope.atNextFrame(render));
    byId("slides-body").addEventListener("focusin", (event) => {
      if (isRestoring) return;
      const index = shown.findIndex((slide) => rows.get(slide.key)?.contains(event.target));
      if (index >= 0 && index !== active) {
        active = index;
        render();
      }
    });
    bagscope.onVerdict((key) => {
      if (key === null) rows.clear();
      else rows.delete(key);
      showProgress();
    });
    chooseTarget(null);
    showProgress();
    refresh();
  }

  /** Show the table again, with the slide just seen under the keyboard. */
  function showTable(key) {
    const index = shown.findIndex((slide) => slide.key === key);
    if (index >= 0) moveTo(index);
    else render();
  }

  /** The slides in the order of the table: all of them where the one in hand is filtered away. */
  function orderWith(key) {
    return shown.some((slide) => slide.key === key) ? shown : cohort.slides;
  }

  Object.assign(bagscope, {
    startTable, showTable, orderWith, outcomeOf, outcomeChip,
    refreshTable: refresh,
    moveRow: (step) => moveTo(document.activeElement?.closest("#slides-body") ? active + step : active),
    openRow: () => shown[active] && (location.hash = bagscope.hrefOf(shown[active])),
  });
})(window.bagscope);
