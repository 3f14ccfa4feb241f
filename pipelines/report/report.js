"use strict";
// Sorts, filters and pages the tables. Each has its rows as JSON beside it; what stands in the page is the first of them,
// so that it reads without this script. Cells are set as text, never as HTML.
(() => {
  const grouped = (text) => text.replace(/\B(?=(\d{3})+(?!\d))/g, ",");
  const fixed = (value, digits) => {
    const [whole, part] = value.toFixed(digits).split(".");
    return part === undefined ? grouped(whole) : `${grouped(whole)}.${part}`;
  };
  const bytes = (value) => {
    let unit = 0;
    const units = ["B", "kB", "MB", "GB", "TB"];
    while (value >= 1000 && unit < 4) { value /= 1000; unit += 1; }
    return `${unit ? fixed(value, 1) : fixed(value, 0)} ${units[unit]}`;
  };
  const number = (value) => {
    const size = Math.abs(value);
    if (size && (size < 1e-3 || size >= 1e9)) return value.toExponential(2);
    return fixed(value, size >= 1000 ? 1 : 4);
  };
  const written = {
    text: String,
    count: (value) => fixed(value, 0),
    share: (value) => `${fixed(value * 100, 2)} %`,
    seconds: (value) => fixed(value, Math.abs(value) >= 100 ? 1 : 2),
    bytes,
    number,
    yes: (value) => (value ? "yes" : "no"),
  };
  const say = (value, format) => (value === null ? "–" : written[format](value));
  const words = new Intl.Collator(undefined, { numeric: true, sensitivity: "base" });
  const make = (tag, properties = {}, ...children) => {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...children);
    return element;
  };
  const unpack = (column) => (Array.isArray(column) ? column : column.codes.map((code) => column.words[code]));

  function enhance(root) {
    const data = JSON.parse(root.querySelector("script").textContent);
    const columns = data.columns.map((column, place) => ({ ...column, values: unpack(data.values[place]) }));
    const all = Array.from({ length: data.rows }, (_, row) => row);
    const marked = new Set(data.marked);
    const body = root.querySelector("tbody");
    const heads = [...root.querySelectorAll("thead th")];
    const name = root.querySelector(".caption").textContent;
    const state = { column: -1, down: false, page: 0, query: "", chosen: new Map(), only: false };
    let order = all, shown = all, texts = null;
    const only = data.switch && new Set(data.switch.rows);

    const searched = () => {
      texts ??= all.map((row) => columns.filter((c) => c.format === "text").map((c) => c.values[row]).join("\n").toLowerCase());
      return texts;
    };
    // Ranks of texts are computed once per column: comparing 10,000 texts anew for each click takes a second.
    const rank = (column) => {
      if (column.ranks) return column.ranks;
      if (column.format !== "text") {
        column.ranks = column.values.map((value) => (value === null ? NaN : Number(value)));
      } else {
        const sorted = [...new Set(column.values.filter((value) => value !== null))].sort(words.compare);
        const place = new Map(sorted.map((value, at) => [value, at]));
        column.ranks = column.values.map((value) => (value === null ? NaN : place.get(value)));
      }
      return column.ranks;
    };
    const sort = () => {
      if (state.column < 0) { order = all; return; }
      const ranks = rank(columns[state.column]), sign = state.down ? -1 : 1;
      order = [...all].sort((a, b) => {
        const missing = Number(Number.isNaN(ranks[a])) - Number(Number.isNaN(ranks[b])); // always last
        return missing || sign * (ranks[a] - ranks[b]) || a - b;
      });
    };
    const filter = () => {
      const parts = state.query.toLowerCase().split(/\s+/).filter(Boolean);
      const chosen = [...state.chosen].filter(([, value]) => value !== "");
      shown = order.filter((row) =>
        (!state.only || only.has(row))
        && chosen.every(([column, value]) => say(column.values[row], column.format) === value)
        && (!parts.length || parts.every((part) => searched()[row].includes(part))));
    };
    const pages = () => Math.max(1, Math.ceil(shown.length / data.page));
    const draw = () => {
      state.page = Math.min(state.page, pages() - 1);
      const start = state.page * data.page;
      body.replaceChildren(...shown.slice(start, start + data.page).map((row) => {
        const line = make("tr", { className: marked.has(row) ? "marked" : "" });
        for (const column of columns) {
          const text = say(column.values[row], column.format), right = !["text", "yes"].includes(column.format);
          line.append(make("td", { className: right ? "number" : text.length <= 44 ? "short" : "" }, column.format === "text" ? make("bdi", {}, text) : text));
        }
        return line;
      }));
      heads.forEach((head, place) => {
        if (place === state.column) head.setAttribute("aria-sort", state.down ? "descending" : "ascending");
        else head.removeAttribute("aria-sort");
      });
      if (!pager) return;
      const of = shown.length < data.rows ? ` of ${fixed(shown.length, 0)} found in ${fixed(data.rows, 0)}` : ` of ${fixed(data.rows, 0)}`;
      status.textContent = shown.length
        ? `Rows ${fixed(start + 1, 0)} to ${fixed(Math.min(start + data.page, shown.length), 0)}${of}`
        : `No row of ${fixed(data.rows, 0)} fits`;
      buttons.forEach((button) => { button.disabled = button.target_() === state.page; });
    };
    const update = (changes, sorted = false) => {
      Object.assign(state, { page: 0 }, changes);
      if (sorted) sort();
      filter();
      draw();
    };

    heads.forEach((head, place) => {
      const button = make("button", { type: "button" }, head.textContent);
      button.addEventListener("click", () => {
        // First the way that people look for: numbers from the largest, texts from A; then the other; then as it was.
        const first = !["text", "yes"].includes(columns[place].format);
        if (state.column !== place) update({ column: place, down: first }, true);
        else if (state.down === first) update({ down: !first }, true);
        else update({ column: -1 }, true);
      });
      head.replaceChildren(button);
    });

    if (data.search || data.filters.length || data.switch) {
      const tools = make("div", { className: "tools" });
      tools.setAttribute("role", "group");
      tools.setAttribute("aria-label", `Filter: ${name}`);
      if (data.search) {
        const input = make("input", { type: "search", autocomplete: "off", spellcheck: false });
        input.addEventListener("input", () => update({ query: input.value }));
        tools.append(make("label", {}, "Search", input));
      }
      for (const filtered of data.filters) {
        const column = columns.find((candidate) => candidate.name === filtered);
        const values = [...new Set(column.values)].filter((value) => value !== null).map((value) => say(value, column.format));
        if (values.length < 2 || values.length > 500) continue;
        const select = make("select", {}, make("option", { value: "" }, "all"),
          ...values.sort(words.compare).map((value) => make("option", { value }, value)));
        select.addEventListener("change", () => {
          state.chosen.set(column, select.value);
          update({});
        });
        tools.append(make("label", {}, column.title, select));
      }
      if (data.switch) {
        const box = make("input", { type: "checkbox" });
        box.addEventListener("change", () => update({ only: box.checked }));
        tools.append(make("label", { className: "tick" }, box, data.switch.label));
      }
      root.querySelector(".scroll").before(tools);
    }

    let pager = null, status = null, buttons = [];
    if (data.rows > data.page || data.search || data.filters.length || data.switch) {
      pager = make("div", { className: "pager" });
      status = make("span", {});
      status.setAttribute("role", "status");
      const step = (label, text, target) => {
        const button = make("button", { type: "button", title: label }, text);
        button.setAttribute("aria-label", `${label}: ${name}`);
        button.target_ = () => Math.max(0, Math.min(target(), pages() - 1));
        button.addEventListener("click", () => {
          state.page = button.target_();
          draw();
        });
        return button;
      };
      buttons = data.rows > data.page ? [
        step("First page", "«", () => 0), step("Page before", "‹", () => state.page - 1),
        step("Next page", "›", () => state.page + 1), step("Last page", "»", () => pages() - 1),
      ] : [];
      pager.append(...buttons, status);
      root.querySelector(".scroll").after(pager);
    }
    draw();
  }

  for (const root of document.querySelectorAll("[data-table]")) enhance(root);
  document.documentElement.dataset.ready = "yes";
})();
