// What all parts of the page share, and the tables. Each table has its rows as JSON beside it; what stands in the page is
// the first of them, so that it reads without this script. Cells are set as text, never as HTML.
const grouped = (text) => text.replace(/\B(?=(\d{3})+(?!\d))/g, ",");
const fixed = (value, digits) => {
  const [whole, part] = value.toFixed(digits).replace(/^-(0(?:\.0+)?)$/, "$1").split("."); // no "-0.0000"
  return part === undefined ? grouped(whole) : `${grouped(whole)}.${part}`;
};
const bytes = (value) => {
  let unit = 0;
  const units = ["B", "kB", "MB", "GB", "TB"];
  while (value >= 1000 && unit < 4) { value /= 1000; unit += 1; }
  return `${unit ? fixed(value, 1) : fixed(value, 0)} ${units[unit]}`;
};
const small = (value) => (value ? value.toExponential(2) : "0");
const number = (value) => {
  const size = Math.abs(value);
  return size >= 1e9 ? small(value) : fixed(value, size >= 1000 ? 1 : 4);
};
const written = {
  text: String,
  count: (value) => fixed(value, 0),
  share: (value) => `${fixed(value * 100, 2)} %`,
  seconds: (value) => fixed(value, Math.abs(value) >= 100 ? 1 : 2),
  bytes,
  number,
  small,
  yes: (value) => (value ? "yes" : "no"),
};
const say = (value, format) => (value === null ? "–" : written[format](value));
const words = new Intl.Collator(undefined, { numeric: true, sensitivity: "base" });
const make = (tag, properties = {}, ...children) => {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
};
const svg = (tag, attributes = {}, ...children) => {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
};
const labelled = (text, control) => make("label", {}, text, control);
const picker = (values) => make("select", {}, ...values.map(([value, text]) => make("option", { value }, text)));
const json = (root, at = 0) => JSON.parse(root.querySelectorAll(":scope > script")[at].textContent);
const unpack = (column) => (Array.isArray(column) ? column : column.codes.map((code) => column.words[code]));

// Arrays and texts that packing.py has deflated: {name: typed array or list of texts}.
async function inflate({ parts, data }) {
  const text = atob(data), bytes = new Uint8Array(text.length);
  for (let at = 0; at < text.length; at += 1) bytes[at] = text.charCodeAt(at);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  const buffer = await new Response(stream).arrayBuffer();
  const types = { u1: Uint8Array, u2: Uint16Array, u4: Uint32Array, f4: Float32Array };
  const found = {};
  let start = 0;
  for (const [name, type, length] of parts) {
    if (type === "text") {
      found[name] = length ? new TextDecoder().decode(new Uint8Array(buffer, start, length)).split("\0") : [];
    } else {
      found[name] = new types[type](buffer, start, length / types[type].BYTES_PER_ELEMENT);
    }
    start += Math.ceil(length / 4) * 4;
  }
  return found;
}

function download(name, text, type) {
  const link = make("a", { href: URL.createObjectURL(new Blob([text], { type })), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}

// A spreadsheet runs a cell that begins like a formula: a word of somebody's data that does so gets an apostrophe.
const csvCell = (value) => {
  if (value === null || value === undefined) return "";
  const text = typeof value === "string" && /^\s*[=+@-]/.test(value) ? `'${value}` : String(value);
  return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
};
function csv(data) {
  const columns = data.columns.map((column, place) => unpack(data.values[place]));
  const lines = [data.columns.map((column) => csvCell(column.title))];
  for (let row = 0; row < data.rows; row += 1) lines.push(columns.map((values) => csvCell(values[row])));
  return lines.map((line) => `${line.join(",")}\r\n`).join("");
}

function addDownload(root, data) {
  const caption = root.querySelector(".caption");
  const button = make("button", { type: "button", className: "download" }, "CSV");
  button.setAttribute("aria-label", `Download as CSV: ${caption.textContent}`);
  button.addEventListener("click", () => {
    const shown = data.columns.map((column, place) => place).filter((place) => data.columns[place].format !== "picture");
    download(`${data.name}.csv`, csv({ ...data, columns: shown.map((at) => data.columns[at]), values: shown.map((at) => data.values[at]) }), "text/csv;charset=utf-8");
  });
  caption.after(button);
}

function enhance(root, data) {
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
        if (column.format === "picture") {
          const source = column.values[row];
          line.append(make("td", {}, ...(source ? [make("img", { src: source, alt: "", className: "mini" })] : [])));
          continue;
        }
        const text = say(column.values[row], column.format), right = !["text", "yes"].includes(column.format);
        line.append(make("td", { className: right ? "number" : text.length <= 28 ? "short" : "" }, column.format === "text" ? make("bdi", {}, text) : text));
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

function addTable(root) {
  const data = json(root);
  addDownload(root, data);
  if (data.sortable) enhance(root, data);
}

// A table that the script makes: `place` is emptied and holds it.
function placeTable(place, caption, data) {
  const heads = data.columns.map((column) => make("th", { scope: "col", className: ["text", "yes", "picture"].includes(column.format) ? "" : "number" }, column.title));
  const name = make("p", { className: "caption", id: `caption-${data.name}` }, caption);
  const scroll = make("div", { className: "scroll", tabIndex: 0 }, make("table", {}, make("thead", {}, make("tr", {}, ...heads)), make("tbody")));
  scroll.setAttribute("role", "region");
  scroll.setAttribute("aria-labelledby", name.id);
  const root = make("div", { className: "table" }, name, scroll);
  place.replaceChildren(root);
  addDownload(root, data);
  enhance(root, { filters: [], search: data.rows > 8, switch: null, marked: [], page: 10, total: data.rows, ...data });
}

function addFolding() {
  const parts = [...document.querySelectorAll("details.part")];
  const all = make("button", { type: "button" });
  const open = () => parts.some((part) => part.open);
  const name = () => { all.textContent = open() ? "Fold all" : "Unfold all"; };
  all.addEventListener("click", () => {
    const unfold = !open();
    for (const part of parts) part.open = unfold;
    name();
  });
  for (const part of parts) part.addEventListener("toggle", name);
  name();
  document.querySelector("nav ul").append(make("li", {}, all));
  // What is linked to is shown, and what is printed is all.
  const show = () => {
    const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    for (let part = target && (target.querySelector("details.part") ?? target.closest("details")); part; part = part.parentElement.closest("details")) part.open = true;
  };
  addEventListener("hashchange", show);
  addEventListener("beforeprint", () => { for (const part of parts) part.open = true; });
  show();
}

// Runs `draw` once the element comes near the window: what nobody looks at costs nothing.
function whenSeen(root, draw) {
  const watch = new IntersectionObserver((entries) => {
    if (!entries.some((entry) => entry.isIntersecting)) return;
    watch.disconnect();
    draw().catch((error) => {
      root.append(make("p", { className: "note warning" }, `This part cannot be drawn here (${error.message}). It needs a browser of 2023 or later.`));
    });
  }, { rootMargin: "400px" });
  watch.observe(root);
}

function start() {
  for (const root of document.querySelectorAll("[data-table]")) addTable(root);
  addFolding();
  addPictures();
  for (const root of document.querySelectorAll("[data-map]")) whenSeen(root, () => drawMap(root));
  for (const root of document.querySelectorAll("[data-curves]")) whenSeen(root, () => drawCurves(root));
  for (const root of document.querySelectorAll("[data-matrix]")) whenSeen(root, () => drawMatrix(root));
  document.documentElement.dataset.ready = "yes";
}
