// What is said of the slide beside its picture: prediction, layers, faithfulness, verdict.
(function (bagscope) {
  "use strict";

  const { byId, el, brief } = bagscope;

  let summary = null;
  let intervalText = "";
  let usualFaithfulness = null;
  let agreement = "";

  function startPanel(cohort) {
    byId("verdict-choices").replaceChildren(...bagscope.VERDICTS.map((verdict) =>
      el("label", { class: "choice", title: cohort.verdict_words?.[verdict] },
        el("input", { type: "radio", name: "verdict", value: verdict, onchange: () => keep({ verdict }) }),
        el("span", {}, verdict))));
    byId("toggle-panel").addEventListener("click", () => showAside(byId("panel").hidden));
    byId("comment").addEventListener("input", (event) => keep({ comment: event.target.value }));
    byId("slide-reviewer").addEventListener("change", () => {
      const { verdict, comment } = bagscope.verdictOf(summary);
      if (verdict || comment) keep({});
    });
  }

  function showAside(isShown) {
    byId("panel").hidden = !isShown;
    byId("toggle-panel").setAttribute("aria-pressed", String(!isShown));
  }

  function keep(change) {
    bagscope.setVerdict(summary, change);
    byId("verdict-saved").textContent = `Kept: ${change.verdict ?? "comment"}`;
  }

  function showPanel(slide, data, cohort) {
    summary = slide;
    byId("slide-title").textContent = slide.slide;
    byId("slide-patient").textContent = slide.patient === slide.slide
      ? ""
      : /^patient/i.test(slide.patient) ? slide.patient : `patient ${slide.patient}`;
    const unlike = slide.ood ? el("span", { class: "chip caution" }, "⚠ unlike the training slides") : null;
    byId("slide-chips").replaceChildren(...[bagscope.outcomeOf(slide) === "unknown" ? null : bagscope.outcomeChip(slide), unlike].filter(Boolean));
    const notes = [...(slide.notes ?? []), ...(data.notes ?? [])];
    if (!data.picture && !notes.length) notes.push("There is no picture of this slide here: its tiles are drawn alone.");
    byId("slide-notes").replaceChildren(...[...new Set(notes)].map((text) => el("li", {}, text)));
    byId("others").replaceChildren(...(slide.verdicts ?? []).map((one) =>
      el("li", {}, el("b", {}, one.reviewer || "Somebody"), `: ${[one.verdict, one.comment].filter(Boolean).join(", ")}`)));
    intervalText = cohort.interval_text || "the range of the models' answers";
    byId("prediction").replaceChildren(...cohort.targets.map((target) => prediction(slide, target, cohort.targets.length > 1)));
    showLayers(data.layers);
    usualFaithfulness = data.faithfulness;
    agreement = data.agreement ?? "";
    showFaithfulness(usualFaithfulness);
    const { verdict, comment } = bagscope.verdictOf(slide);
    for (const input of byId("verdict-choices").querySelectorAll("input")) input.checked = input.value === verdict;
    byId("comment").value = comment;
    byId("verdict-saved").textContent = "";
    byId("panel").querySelector(".panel-scroll").scrollTop = 0;
  }

  function prediction(slide, target, isNamed) {
    const answer = slide.predicted?.[target.name];
    const truth = slide.truth?.[target.name] ?? null;
    const parts = [];
    if (isNamed) parts.push(el("h3", {}, target.name));
    if (!answer) parts.push(el("p", { class: "quiet" }, "No prediction."));
    else parts.push(...answerParts(answer, target));
    const known = typeof truth === "number" ? brief(truth) : truth;
    parts.push(el("p", { class: "truth" }, "Truth: ", known === null ? el("span", { class: "quiet" }, "unknown") : el("b", {}, known)));
    return el("div", { class: "target" }, ...parts);
  }

  function answerParts(answer, target) {
    const line = el("p", { class: "answer-line" }, el("b", { class: "answer-name" }, answer.text));
    const write = bagscope.writerOf(target);
    const valued = bagscope.valuedClass(answer);
    if (valued && valued !== answer.text) line.append(el("span", { class: "quiet" }, `· ${valued}`));
    if (answer.value !== null && Number.isNaN(Number(answer.text))) {
      line.append(el("span", { class: "number answer-value" }, write(answer.value)));
    }
    const interval = bagscope.intervalOf(answer, write);
    if (interval) line.append(el("span", { class: "number", title: intervalText }, interval));
    const parts = interval ? [line, el("p", { class: "quiet small" }, intervalText)] : [line];
    if (!answer.probabilities) return parts;
    const rows = Object.entries(answer.probabilities).sort((a, b) => b[1] - a[1]).slice(0, 8);
    return [...parts, el("div", { class: "probabilities" }, ...rows.flatMap(([name, value]) =>
      probabilityRow(name, value, name === valued ? answer : null, target)))];
  }

  function probabilityRow(name, value, interval, target) {
    const bar = el("span", { class: "track", "aria-hidden": "true" }, el("span", { class: "filled" }));
    bar.firstChild.style.width = `${100 * value}%`;
    if ((interval?.low ?? null) !== null) {
      const whisker = el("span", { class: "whisker" });
      whisker.style.left = `${100 * interval.low}%`;
      whisker.style.width = `${100 * (interval.high - interval.low)}%`;
      bar.append(whisker);
    }
    const isThresholded = target.threshold !== null && target.threshold !== undefined &&
      (target.task === "multilabel" || name === target.classes.at(-1));
    if (isThresholded) {
      const cut = el("span", { class: "cut", title: `threshold ${brief(target.threshold)}` });
      cut.style.left = `${100 * target.threshold}%`;
      bar.append(cut);
    }
    return [el("span", { class: "probability-name" }, name), bar, el("span", { class: "number" }, bagscope.share(value))];
  }

  function showLayers(layers) {
    byId("heatmap-section").hidden = !layers.length;
    byId("layers").replaceChildren(...layers.map((layer, i) =>
      el("label", { class: "layer" },
        el("input", { type: "radio", name: "layer", value: layer.id, onchange: () => bagscope.chooseLayer(layer.id) }),
        el("span", {}, layer.title),
        i < 9 ? el("kbd", { "aria-hidden": "true" }, String(i + 1)) : null)));
  }

  function showChosenLayer(layer) {
    for (const input of byId("layers").querySelectorAll("input")) input.checked = input.value === layer?.id;
    bagscope.showGallery(layer);
    showFaithfulness(layer?.faithfulness ?? usualFaithfulness);
  }

  function showFaithfulness(faith) {
    const warning = faith?.warning ?? "";
    byId("warning").hidden = !warning;
    byId("warning-text").textContent = warning;
    if (!faith) {
      byId("faithfulness").replaceChildren(el("p", { class: "quiet" }, "Not measured for this slide."));
      return;
    }
    const plots = faith.curves ? [curves(faith.curves)] : [];
    byId("faithfulness").replaceChildren(el("p", { class: warning ? "doubt" : "" }, faith.text), ...plots,
      ...(agreement ? [el("p", { class: "small" }, agreement)] : []));
  }

  function curves(curve) {
    const plot = (title, shares, own, random) =>
      el("figure", {}, el("figcaption", {}, title),
        bagscope.curvePlot(title, shares, [["own", curve[own]], ["random", curve[random]]]));
    return el("div", {},
      el("div", { class: "plots" },
        plot("Highest tiles removed", curve.shares, "deletion", "random_deletion"),
        plot("Only the highest kept", curve.insertion_shares ?? curve.shares, "insertion", "random_insertion")),
      el("p", { class: "plot-key quiet" },
        el("span", { class: "key own", "aria-hidden": "true" }), "in the heatmap's order ",
        el("span", { class: "key random", "aria-hidden": "true" }), "in random order; across: share of the tiles, up: the answer"));
  }

  Object.assign(bagscope, { startPanel, showPanel, showAside, showChosenLayer });
})(window.bagscope);
