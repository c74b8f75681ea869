// What the reviewer says of each slide: kept by the browser where it keeps anything for this page,
// written to CSV and read from it everywhere.
(function (bagscope) {
  "use strict";

  const { byId } = bagscope;
  const VERDICTS = ["agree", "disagree", "unsure", "not assessable"];
  const EMPTY = Object.freeze({ verdict: "", comment: "", reviewer: "" });
  const NAME_KEY = "bagscope.reviewer";

  let cohort = null;
  let storageKey = "";
  let kept = false;
  let unexported = false;
  const own = new Map();
  const listeners = [];

  /** Return whether the browser keeps what is stored; private windows and some settings refuse. */
  function store(name, value) {
    try {
      localStorage.setItem(name, value);
      return true;
    } catch {
      return false;
    }
  }

  function stored(name) {
    try {
      return localStorage.getItem(name);
    } catch {
      return null;
    }
  }

  function startVerdicts(data) {
    cohort = data;
    storageKey = `bagscope.review:${data.run}:${data.fingerprint ?? ""}`;
    kept = store("bagscope.probe", "1");
    const known = new Set(data.slides.map((slide) => slide.key));
    let before = {};
    try {
      before = JSON.parse(stored(storageKey) || "{}");
    } catch {
      bagscope.fault("The browser's copy of your verdicts could not be read; import your last CSV.");
    }
    for (const [key, saved] of Object.entries(before)) {
      if (known.has(key)) own.set(key, { ...EMPTY, ...saved });
    }
    const note = kept
      ? "Verdicts are kept by this browser, on this machine. Export them as CSV to hand them on."
      : "This browser keeps nothing for this page: export your verdicts as CSV before you close it.";
    byId("help-storage").textContent = note;
    byId("storage-note").textContent = note;
    byId("storage-note").hidden = kept;
    setReviewer(stored(NAME_KEY) || "");
    for (const id of ["reviewer", "slide-reviewer"]) {
      byId(id).addEventListener("input", (event) => setReviewer(event.target.value));
    }
    addEventListener("beforeunload", (event) => {
      if (!kept && unexported) event.preventDefault();
    });
  }

  function setReviewer(name) {
    for (const id of ["reviewer", "slide-reviewer"]) {
      if (byId(id).value !== name) byId(id).value = name;
    }
    store(NAME_KEY, name);
  }

  const verdictOf = (slide) => own.get(slide.key) ?? slide.verdict ?? EMPTY;

  function save(key) {
    unexported = true;
    if (kept) kept = store(storageKey, JSON.stringify(Object.fromEntries(own)));
    for (const listener of listeners) listener(key);
  }

  function setVerdict(slide, change) {
    own.set(slide.key, { ...EMPTY, ...verdictOf(slide), reviewer: byId("reviewer").value.trim(), ...change });
    save(slide.key);
  }

  const isReviewed = (slide) => verdictOf(slide).verdict !== "";

  const counted = (count) => `${bagscope.whole(count)} ${count === 1 ? "verdict" : "verdicts"}`;

  function exportVerdicts() {
    const rows = cohort.slides
      .map((slide) => ({ slide: slide.slide, run: cohort.run, ...verdictOf(slide) }))
      .filter((row, i) => row.verdict || row.comment || own.has(cohort.slides[i].key));
    const text = bagscope.csvOf(cohort.reviewer_csv_columns, rows);
    const url = URL.createObjectURL(new Blob([text], { type: "text/csv;charset=utf-8" }));
    bagscope.el("a", { href: url, download: `${cohort.run}-verdicts.csv` }).click();
    setTimeout(() => URL.revokeObjectURL(url), 10_000);
    unexported = false;
    bagscope.announce(`${counted(rows.length)} exported.`);
  }

  /** Take the verdicts of a CSV file; what differs from one's own is replaced only if confirmed. */
  function importVerdicts(text) {
    const rows = bagscope.rowsOf(text, ["slide", "verdict", "comment", "reviewer"]);
    const bySlide = new Map(cohort.slides.map((slide) => [slide.slide, slide]));
    const taken = [];
    const unknown = [];
    for (const row of rows) {
      const slide = bySlide.get(row.slide);
      if (!slide) unknown.push(`slide ${row.slide}`);
      else if (row.verdict && !VERDICTS.includes(row.verdict)) unknown.push(`verdict ${row.verdict}`);
      else taken.push([slide, { verdict: row.verdict, comment: row.comment, reviewer: row.reviewer }]);
    }
    const differs = ([slide, row]) => {
      const mine = own.get(slide.key);
      return mine && (mine.verdict || mine.comment) && JSON.stringify(mine) !== JSON.stringify(row);
    };
    const clashes = taken.filter(differs);
    const replace =
      clashes.length === 0 ||
      confirm(`${counted(clashes.length)} of the file differ from yours. Replace yours?`);
    const used = replace ? taken : taken.filter((pair) => !differs(pair));
    for (const [slide, row] of used) own.set(slide.key, row);
    if (used.length) save(null);
    const left = unknown.length ? ` Left out: ${unknown.length}, the first for its ${unknown[0]}.` : "";
    return `${counted(used.length)} imported.${left}`;
  }

  Object.assign(bagscope, {
    VERDICTS, startVerdicts, verdictOf, setVerdict, isReviewed, exportVerdicts, importVerdicts,
    onVerdict: (listener) => listeners.push(listener),
  });
})(window.bagscope);
