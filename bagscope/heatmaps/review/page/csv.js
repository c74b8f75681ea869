// CSV of verdicts: RFC 4180, with a mark that spreadsheets read as UTF-8, and no cell that one
// would take for a formula.
(function (bagscope) {
  "use strict";

  const BYTE_ORDER_MARK = "\uFEFF";
  // Apostrophes before such a sign count too, so that reading back gives exactly what was written.
  const guard = (text) => (/^'*[=+\-@\t\r]/.test(text) ? `'${text}` : text);
  const unguard = (text) => (/^'+[=+\-@\t\r]/.test(text) ? text.slice(1) : text);
  const quote = (text) => (/[",;\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);

  function csvOf(columns, rows) {
    const lines = [columns, ...rows.map((row) => columns.map((name) => guard(row[name] ?? "")))];
    return BYTE_ORDER_MARK + lines.map((cells) => cells.map(quote).join(",") + "\r\n").join("");
  }

  function cellsOf(text, delimiter) {
    const rows = [];
    let row = [];
    let cell = "";
    let quoted = false;
    for (let i = 0; i < text.length; i++) {
      const sign = text[i];
      if (quoted) {
        if (sign !== '"') cell += sign;
        else if (text[i + 1] === '"') cell += text[++i];
        else quoted = false;
      } else if (sign === '"' && cell === "") quoted = true;
      else if (sign === delimiter || sign === "\n") {
        row.push(cell);
        cell = "";
        if (sign === "\n") {
          rows.push(row);
          row = [];
        }
      } else if (sign !== "\r") cell += sign;
    }
    if (cell || row.length) rows.push([...row, cell]);
    return rows.filter((cells) => cells.some((one) => one !== ""));
  }

  /** Return rows as objects; throws where a wanted column is missing. */
  function rowsOf(text, wanted) {
    const body = text.startsWith(BYTE_ORDER_MARK) ? text.slice(1) : text;
    // Spreadsheets of some countries save with semicolons.
    const head = body.slice(0, body.search(/[\r\n]|$/));
    const [names, ...rows] = cellsOf(body, head.includes(",") ? "," : ";");
    const missing = wanted.filter((name) => !(names || []).includes(name));
    if (missing.length) {
      throw new Error(`The file has no column ${missing.map((name) => `"${name}"`).join(", ")}.`);
    }
    return rows.map((cells) =>
      Object.fromEntries(names.map((name, i) => [name, unguard(cells[i] ?? "")])),
    );
  }

  Object.assign(bagscope, { csvOf, rowsOf });
})(window.bagscope);
