// Which of the two views is shown, by the address's hash: nothing, or #slide/<key>?layer=…&x=…
(function (bagscope) {
  "use strict";

  const { byId } = bagscope;

  let cohort = null;
  let shownKey = null;
  let opening = 0;
  // The address's hash as it was followed or written last.
  let known = null;

  const hrefOf = (slide) => `#slide/${encodeURIComponent(slide.key)}`;

  function viewOf(query) {
    const asked = new URLSearchParams(query);
    const number = (name) => (asked.has(name) ? Number(asked.get(name)) : NaN);
    return {
      layer: asked.get("layer"), x: number("x"), y: number("y"), zoom: number("zoom"),
      rotation: number("rotation") || 0,
    };
  }

  /** The slide's key and the query of a hash; no key where it names no slide. */
  function addressed(hash) {
    const [, name, query] = /^#slide\/([^?]*)\??(.*)$/.exec(hash) ?? [];
    try {
      return { key: name && decodeURIComponent(name), query };
    } catch {
      return { key: name, query };
    }
  }

  async function route() {
    known = location.hash;
    const { key, query } = addressed(known);
    if (key === undefined) return showCohort();
    const slide = cohort.slides.find((one) => one.key === key);
    if (slide) return showSlide(slide, viewOf(query));
    showCohort();
    return bagscope.fault(`There is no slide ${key} in this bundle.`);
  }

  function showCohort() {
    opening += 1;
    if (bagscope.currentSlide()) bagscope.closeSlide();
    byId("slide-view").hidden = true;
    byId("cohort-view").hidden = false;
    document.title = cohort.title;
    bagscope.showTable(shownKey);
    shownKey = null;
  }

  async function showSlide(slide, view) {
    if (slide.key === shownKey && bagscope.currentSlide()) {
      bagscope.applyView(view);
      return;
    }
    const own = ++opening;
    // The one before must not answer for this one while it is being read.
    if (bagscope.currentSlide()) bagscope.closeSlide();
    shownKey = slide.key;
    byId("cohort-view").hidden = true;
    byId("slide-view").hidden = false;
    byId("loading").hidden = false;
    document.title = `${slide.slide} · ${cohort.title}`;
    showStepper(slide);
    try {
      const data = await bagscope.loadSlide(slide.key);
      if (own !== opening) return;
      bagscope.showPanel(slide, data, cohort);
      await bagscope.openSlide(data, view);
    } catch (error) {
      if (own === opening) bagscope.fault(error.message);
    }
    if (own === opening) {
      byId("loading").hidden = true;
      bagscope.announce(`Slide ${slide.slide}`);
    }
  }

  function showStepper(slide) {
    const order = bagscope.orderWith(slide.key);
    const index = order.findIndex((one) => one.key === slide.key);
    byId("slide-place").textContent = `${bagscope.whole(index + 1)} of ${bagscope.whole(order.length)}`;
    byId("previous-slide").disabled = index === 0;
    byId("next-slide").disabled = index === order.length - 1;
  }

  function stepSlide(step) {
    const order = bagscope.orderWith(shownKey);
    const next = order[order.findIndex((one) => one.key === shownKey) + step];
    if (next) location.hash = hrefOf(next);
  }

  /** Keep the view in the address, so that it can be sent to a colleague; no entry in the history. */
  function keepView() {
    const slide = cohort.slides.find((one) => one.key === shownKey);
    if (!slide || !bagscope.isViewReady()) return;
    // A link that was followed just now, and has not been read yet, must not be written over.
    if (location.hash !== known) return;
    const wanted = Object.entries(bagscope.view()).filter(([, value]) => value !== undefined);
    history.replaceState(null, "", `${hrefOf(slide)}?${new URLSearchParams(wanted)}`);
    known = location.hash;
  }

  function importFile(event) {
    const [file] = event.target.files;
    if (!file) return;
    const reader = new FileReader();
    reader.onload = () => {
      try {
        const said = bagscope.importVerdicts(reader.result);
        bagscope.announce(said);
        byId("storage-note").textContent = said;
        byId("storage-note").hidden = false;
        bagscope.refreshTable();
      } catch (error) {
        bagscope.fault(`${file.name}: ${error.message}`);
      }
      event.target.value = "";
    };
    reader.onerror = () => bagscope.fault(`${file.name} could not be read.`);
    reader.readAsText(file);
  }

  function start(data) {
    if (data.schema !== "bagscope.review" || data.version !== 1) {
      bagscope.fault(`This page reads bagscope.review version 1, not ${data.schema} ${data.version}.`);
      return;
    }
    cohort = data;
    bagscope.startVerdicts(data);
    bagscope.startPanel(data);
    bagscope.startKeys();
    byId("slide-view").hidden = false;
    bagscope.startViewer(keepView);
    byId("slide-view").hidden = true;
    byId("cohort-view").hidden = false;
    bagscope.startTable(data);
    byId("previous-slide").addEventListener("click", () => stepSlide(-1));
    byId("next-slide").addEventListener("click", () => stepSlide(1));
    byId("export").addEventListener("click", bagscope.exportVerdicts);
    byId("import").addEventListener("click", () => byId("import-file").click());
    byId("import-file").addEventListener("change", importFile);
    addEventListener("hashchange", () => {
      bagscope.fault("");
      route();
    });
    route();
  }

  Object.assign(bagscope, { cohort: start, hrefOf, stepSlide });
})(window.bagscope);
