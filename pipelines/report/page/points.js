
// The map of the images: points on a canvas, coloured by a column, with the picture of the one that is pointed at; a lasso
// puts points into a table. The arrow keys go from point to point, Enter takes one into the table.
const PALETTE = 10; // words with a colour of their own, the commonest; all others share one
const NO_VALUE = 65535, STEPS = 65534; // as in blocks.py
const CELLS = 128; // of the grid in which the nearest point is looked for, each way
const REACH = 12; // CSS pixels between the pointer and the point that it means

async function drawMap(root) {
  const data = json(root), pictures = json(root, 1), parts = await inflate(data.packed);
  const n = data.points, ids = parts.ids;
  const colourings = data.colourings.map((colouring, at) => ({ ...colouring, codes: parts[`codes${at}`] }));
  const layouts = data.layouts.map((title, at) => layoutOf(title, parts[`x${at}`], parts[`y${at}`], parts[`rows${at}`], n));
  const state = { layout: layouts[0], colouring: colourings[0], marked: -1, hidden: new Set(), scale: 1, x: 32768, y: 32768, moving: false, at: -1, chosen: new Set() };

  const canvas = make("canvas", { tabIndex: 0 });
  canvas.setAttribute("role", "application");
  canvas.setAttribute("aria-roledescription", "map of images");
  canvas.setAttribute("aria-label", `${root.querySelector(".caption").textContent}. Arrow keys go from image to image, Enter puts one into the table below, plus and minus zoom, 0 shows all.`);
  const outline = svg("svg", { class: "lasso", "aria-hidden": "true" }), path = svg("polygon");
  outline.append(path);
  const card = make("div", { className: "card", hidden: true });
  const board = make("div", { className: "board" }, canvas, outline, card);
  const status = make("p", { className: "made" }), spoken = make("p", { className: "sr" }), legend = make("ul", { className: "legend" }), place = make("div");
  status.setAttribute("role", "status");
  spoken.setAttribute("role", "status");
  const brush = canvas.getContext("2d", { alpha: false });

  // ---- colours
  const ink = (name) => {
    const text = getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
    return [1, 3, 5].map((at) => parseInt(text.slice(at, at + 2), 16));
  };
  const word = ([r, g, b]) => (255 << 24 | b << 16 | g << 8 | r) >>> 0; // as little-endian pixels have it
  const mix = (a, b, share) => a.map((value, at) => Math.round(value + (b[at] - value) * share));
  let shades = null, picture = null;
  function paint() {
    const ground = ink("ground"), rest = mix(ink("muted"), ground, 0.45), colouring = state.colouring;
    const own = Array.from({ length: PALETTE }, (_, at) => ink(`series-${at + 1}`));
    const ramp = ["ramp-1", "ramp-2", "ramp-3"].map(ink);
    const of = (code) => {
      if (code === NO_VALUE) return mix(rest, ground, 0.5);
      if (!colouring.words.length) return code < STEPS / 2 ? mix(ramp[0], ramp[1], code / (STEPS / 2)) : mix(ramp[1], ramp[2], code / (STEPS / 2) - 1);
      if (state.marked >= 0) return code === state.marked ? own[0] : mix(rest, ground, 0.5);
      return colouring.rank[code] < PALETTE ? own[colouring.rank[code]] : rest;
    };
    const distinct = colouring.words.length || 256, step = colouring.words.length ? 1 : STEPS / 255;
    const colours = Array.from({ length: distinct }, (_, at) => of(Math.round(at * step)));
    shades = {
      of, ground: word(ground), ink: word(ink("ink")),
      full: Uint32Array.from(colours, word), dim: Uint32Array.from(colours, (colour) => word(mix(colour, ground, 0.75))),
      none: word(of(NO_VALUE)), noneDim: word(mix(of(NO_VALUE), ground, 0.6)),
      index: colouring.words.length ? (code) => code : (code) => Math.round(code / step),
    };
  }
  for (const colouring of colourings) {
    const counts = new Uint32Array(colouring.words.length + 1);
    for (const code of colouring.codes) counts[code === NO_VALUE ? colouring.words.length : code] += 1;
    colouring.counts = counts;
    const order = colouring.words.map((_, code) => code).sort((a, b) => counts[b] - counts[a] || a - b);
    colouring.rank = new Uint32Array(colouring.words.length);
    order.forEach((code, at) => { colouring.rank[code] = at; });
    colouring.order = order;
  }
  // Words beyond the palette are hidden and shown together.
  const group = (code) => {
    const colouring = state.colouring;
    if (code === NO_VALUE) return -1;
    return colouring.words.length ? Math.min(colouring.rank[code], PALETTE) : 0;
  };
  const visible = (row) => state.layout.has(row) && (!state.hidden.size || !state.hidden.has(group(state.colouring.codes[row])));

  // ---- from data to pixels and back
  let width = 0, height = 0, ratio = 1, unit = 1;
  const view = () => {
    unit = state.scale * Math.min(width, height) / 65536 * 0.94;
    return { left: width / 2 - state.x * unit, top: height / 2 + state.y * unit };
  };
  function draw() {
    const { left, top } = view(), { layout, colouring } = state;
    const w = canvas.width, h = canvas.height, image = brush.createImageData(w, h), pixels = new Uint32Array(image.data.buffer);
    pixels.fill(shades.ground);
    const radius = Math.max(1, Math.round(ratio * (n > 20000 ? 1 : n > 3000 ? 1.6 : 3) * Math.min(3, Math.sqrt(state.scale))));
    const disc = discOf(radius, w), picked = state.chosen, dim = picked.size > 0;
    // A stride that meets every point once, so that classes which follow each other do not cover each other.
    const stride = strideOf(layout.n);
    for (let step = 0, at = 0; step < layout.n; step += 1, at = (at + stride) % layout.n) {
      const row = layout.row(at);
      if (state.hidden.size && state.hidden.has(group(colouring.codes[row]))) continue;
      if (dim && picked.has(row)) continue;
      stamp(at, row, dim);
    }
    if (dim) for (const row of picked) if (visible(row)) stamp(layout.place(row), row, false);
    picture = { image, radius };
    mark();
    function stamp(at, row, faint) {
      const x = Math.round((left + layout.x[at] * unit) * ratio), y = Math.round((top - layout.y[at] * unit) * ratio);
      if (x < radius || y < radius || x >= w - radius || y >= h - radius) return;
      const code = colouring.codes[row], middle = y * w + x;
      const colour = code === NO_VALUE ? (faint ? shades.noneDim : shades.none) : (faint ? shades.dim : shades.full)[shades.index(code)];
      for (const offset of disc) pixels[middle + offset] = colour;
    }
  }
  // The points as they were drawn last, and a ring around the one that is pointed at: all that a hover draws.
  function mark() {
    const { left, top } = view(), { layout } = state, { image, radius } = picture;
    brush.putImageData(image, 0, 0);
    if (state.at >= 0 && visible(state.at)) {
      const at = layout.place(state.at);
      brush.strokeStyle = getComputedStyle(document.documentElement).getPropertyValue("--ink");
      brush.lineWidth = 2 * ratio;
      brush.beginPath();
      brush.arc((left + layout.x[at] * unit) * ratio, (top - layout.y[at] * unit) * ratio, radius + 4 * ratio, 0, 7);
      brush.stroke();
    }
  }
  let waiting = false, stale = false;
  const soon = () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      if (stale) draw(); else mark();
      stale = false;
    });
  };
  const redraw = () => { stale = true; soon(); };
  const measure = () => {
    ratio = Math.min(devicePixelRatio || 1, 2);
    width = board.clientWidth;
    height = Math.round(Math.min(Math.max(width * 0.62, 300), innerHeight * 0.75));
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    canvas.style.height = `${height}px`;
  };
  const nearest = (x, y, reach = REACH) => {
    const { left, top } = view(), { layout } = state;
    return layout.near((x - left) / unit, (top - y) / unit, reach / unit, visible);
  };

  // ---- what a point is
  const value = (colouring, row) => {
    const code = colouring.codes[row];
    if (code === NO_VALUE) return null;
    return colouring.words.length ? colouring.words[code] : colouring.low + (colouring.high - colouring.low) * code / STEPS;
  };
  const written = (colouring, row) => {
    const found = value(colouring, row);
    return found === null ? "–" : typeof found === "string" ? found : String(Number(found.toPrecision(4)));
  };
  const source = (row) => (pictures[row] ? `data:image/webp;base64,${pictures[row]}` : null);
  function point(row, speak) {
    if (row === state.at && !speak) return;
    state.at = row;
    card.hidden = row < 0;
    if (row >= 0) {
      const { left, top } = view(), { layout } = state, at = layout.place(row);
      const lines = colourings.map((colouring) => make("div", {}, make("dt", {}, colouring.title), make("dd", {}, make("bdi", {}, written(colouring, row)))));
      const image = source(row);
      const text = make("div", {}, make("p", { className: "name" }, make("bdi", {}, ids[row])), make("dl", {}, ...lines));
      card.replaceChildren(...(image ? [make("img", { src: image, alt: "" })] : []), text);
      const x = left + layout.x[at] * unit, y = top - layout.y[at] * unit;
      const beside = (value, size, whole) => Math.max(0, Math.min(value + 14 + size <= whole ? value + 14 : value - 14 - size, whole - size));
      card.style.left = `${beside(x, card.offsetWidth, width)}px`;
      card.style.top = `${beside(y, card.offsetHeight, height)}px`;
      if (speak) spoken.textContent = `${ids[row]}: ${colourings.map((colouring) => `${colouring.title} ${written(colouring, row)}`).join(", ")}${state.chosen.has(row) ? ", in the table" : ""}`;
    }
    soon();
  }

  // ---- the table of what is chosen
  const say = () => {
    const shown = state.hidden.size ? `${fixed(rows().length, 0)} of ${fixed(n, 0)} images shown` : `${fixed(state.layout.n, 0)} images`;
    status.textContent = `${shown}${state.chosen.size ? `, ${fixed(state.chosen.size, 0)} in the table below` : ""}.`;
  };
  const rows = () => Array.from({ length: state.layout.n }, (_, at) => state.layout.row(at)).filter(visible);
  function choose(chosen) {
    state.chosen = new Set(chosen);
    const list = [...state.chosen].sort((a, b) => a - b);
    say();
    redraw();
    if (!list.length) { place.replaceChildren(); return; }
    const seen = pictures.length ? [{ name: "picture", title: "picture", format: "picture" }] : [];
    const columns = [...seen, { name: "id", title: "image", format: "text" },
      ...colourings.map((colouring, at) => ({ name: `c${at}`, title: colouring.title, format: colouring.words.length ? "text" : "number" }))];
    const values = [...(seen.length ? [list.map(source)] : []), list.map((row) => ids[row]), ...colourings.map((colouring) => list.map((row) => value(colouring, row)))];
    placeTable(place, `${fixed(list.length, 0)} images chosen on the map`, { name: `${data.name}-chosen`, columns, values, rows: list.length, sortable: true, filters: columns.filter((_, at) => at > seen.length && values[at].some((v) => typeof v === "string")).map((column) => column.name) });
  }

  // ---- tools
  const layoutPicker = picker(layouts.map((layout, at) => [at, layout.title]));
  layoutPicker.addEventListener("change", () => { state.layout = layouts[layoutPicker.value]; home(); });
  const colourPicker = picker(colourings.map((colouring, at) => [at, colouring.title]));
  const markPicker = make("select");
  colourPicker.addEventListener("change", () => recolour());
  markPicker.addEventListener("change", () => { state.marked = Number(markPicker.value); state.hidden.clear(); paint(); explain(); say(); redraw(); });
  const button = (text, name, act, pressed) => {
    const made = make("button", { type: "button", title: name }, text);
    made.setAttribute("aria-label", name);
    if (pressed !== undefined) made.setAttribute("aria-pressed", pressed);
    made.addEventListener("click", act);
    return made;
  };
  const mode = (moving) => {
    state.moving = moving;
    canvas.style.touchAction = "none"; // from the first press on, a finger draws or moves instead of scrolling the page
    lasso.setAttribute("aria-pressed", !moving);
    move.setAttribute("aria-pressed", moving);
    canvas.style.cursor = moving ? "grab" : "crosshair";
  };
  const lasso = button("Lasso", "Draw around images to put them into a table", () => mode(false), true);
  const move = button("Move", "Move the map by dragging", () => mode(true), false);
  const zoom = (factor, x = width / 2, y = height / 2) => {
    const { left, top } = view(), dataX = (x - left) / unit, dataY = (top - y) / unit;
    state.scale = Math.min(400, Math.max(1, state.scale * factor));
    unit = state.scale * Math.min(width, height) / 65536 * 0.94;
    state.x = dataX - (x - width / 2) / unit;
    state.y = dataY + (y - height / 2) / unit;
    point(-1);
    redraw();
  };
  const home = () => { Object.assign(state, { scale: 1, x: 32768, y: 32768 }); point(-1); say(); redraw(); };
  const tools = make("div", { className: "tools" },
    ...(layouts.length > 1 ? [labelled("Places", layoutPicker)] : []), labelled("Colour", colourPicker), labelled("Only one value", markPicker),
    lasso, move, button("+", "Zoom in", () => zoom(1.6)), button("−", "Zoom out", () => zoom(1 / 1.6)), button("Whole", "Show the whole map", home),
    button("All to the table", "Put all images that are shown into the table", () => choose(rows())), button("Empty the table", "Empty the table", () => choose([])));
  tools.setAttribute("role", "group");
  tools.setAttribute("aria-label", "Map");

  function explain() {
    const colouring = state.colouring;
    if (!colouring.words.length) {
      const bar = make("span", { className: "ramp" });
      legend.replaceChildren(make("li", {}, String(Number(colouring.low.toPrecision(4))), bar, String(Number(colouring.high.toPrecision(4)))));
      return;
    }
    const item = (at, name, count, code) => {
      const swatch = make("span", { className: "swatch" }), [r, g, b] = shades.of(code);
      swatch.style.background = `rgb(${r},${g},${b})`;
      const toggle = make("button", { type: "button", title: "Hide or show" }, swatch, make("bdi", {}, name), ` ${fixed(count, 0)}`);
      toggle.setAttribute("aria-pressed", !state.hidden.has(at));
      toggle.addEventListener("click", () => {
        if (state.hidden.has(at)) state.hidden.delete(at); else state.hidden.add(at);
        toggle.setAttribute("aria-pressed", !state.hidden.has(at));
        point(-1);
        say();
        redraw();
      });
      return make("li", {}, toggle);
    };
    const own = colouring.order.slice(0, PALETTE), others = colouring.order.slice(PALETTE), missing = colouring.counts[colouring.words.length];
    legend.replaceChildren(
      ...own.map((code, at) => item(at, colouring.words[code], colouring.counts[code], code)),
      ...(others.length ? [item(PALETTE, `${fixed(others.length, 0)} others`, others.reduce((sum, code) => sum + colouring.counts[code], 0), others[0])] : []),
      ...(missing ? [item(-1, "no value", missing, NO_VALUE)] : []));
  }
  function recolour() {
    state.colouring = colourings[colourPicker.value];
    state.marked = -1;
    state.hidden.clear();
    const names = state.colouring.words.map((text, code) => [code, text]).sort((a, b) => words.compare(a[1], b[1]));
    markPicker.replaceChildren(make("option", { value: -1 }, "all"), ...names.slice(0, 2000).map(([code, text]) => make("option", { value: code }, text)));
    markPicker.disabled = names.length < 2;
    paint();
    explain();
    say();
    redraw();
  }

  // ---- pointer and keys
  let drawn = null, from = null;
  const spot = (event) => {
    const box = canvas.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  };
  canvas.addEventListener("pointerdown", (event) => {
    if (event.button || (event.pointerType === "touch" && canvas.style.touchAction !== "none")) return;
    canvas.setPointerCapture(event.pointerId);
    drawn = [spot(event)];
    from = { x: state.x, y: state.y };
  });
  canvas.addEventListener("pointermove", (event) => {
    const [x, y] = spot(event);
    if (!drawn) { point(nearest(x, y)); return; }
    if (state.moving) {
      state.x = from.x - (x - drawn[0][0]) / unit;
      state.y = from.y + (y - drawn[0][1]) / unit;
      point(-1);
      redraw();
      return;
    }
    drawn.push([x, y]);
    path.setAttribute("points", drawn.map((corner) => corner.join(",")).join(" "));
  });
  const end = (event) => {
    if (!drawn) return;
    const corners = drawn, [x, y] = spot(event), far = corners.some(([a, b]) => Math.hypot(a - corners[0][0], b - corners[0][1]) > 4);
    drawn = null;
    path.setAttribute("points", "");
    if (state.moving) return;
    if (!far) {
      const row = nearest(x, y);
      if (row >= 0) take(row);
      return;
    }
    const inside = within(corners);
    choose(event.shiftKey ? [...state.chosen, ...inside] : inside);
  };
  canvas.addEventListener("pointerup", end);
  canvas.addEventListener("pointercancel", () => { drawn = null; path.setAttribute("points", ""); });
  canvas.addEventListener("pointerleave", () => { if (!drawn && document.activeElement !== canvas) point(-1); });
  canvas.addEventListener("click", (event) => { if (event.pointerType === "touch") point(nearest(...spot(event), 2 * REACH)); });
  canvas.addEventListener("wheel", (event) => {
    if (!event.ctrlKey && !event.metaKey && !state.moving) return;
    event.preventDefault();
    zoom(Math.exp(-event.deltaY / 300), ...spot(event));
  }, { passive: false });
  const take = (row) => {
    const chosen = new Set(state.chosen);
    if (chosen.has(row)) chosen.delete(row); else chosen.add(row);
    choose(chosen);
  };
  function within(corners) {
    const { left, top } = view(), { layout } = state, found = [];
    const xs = corners.map((corner) => corner[0]), ys = corners.map((corner) => corner[1]);
    const box = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
    for (let at = 0; at < layout.n; at += 1) {
      const x = left + layout.x[at] * unit, y = top - layout.y[at] * unit;
      if (x < box[0] || x > box[1] || y < box[2] || y > box[3]) continue;
      let inside = false;
      for (let i = 0, j = xs.length - 1; i < xs.length; j = i, i += 1) {
        if (ys[i] > y !== ys[j] > y && x < (xs[j] - xs[i]) * (y - ys[i]) / (ys[j] - ys[i]) + xs[i]) inside = !inside;
      }
      if (inside && visible(layout.row(at))) found.push(layout.row(at));
    }
    return found;
  }
  const WAYS = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] };
  canvas.addEventListener("keydown", (event) => {
    const way = WAYS[event.key];
    if (way) {
      event.preventDefault();
      const next = state.at < 0 ? nearest(width / 2, height / 2, 4 * width) : state.layout.beside(state.at, way, visible);
      if (next >= 0) { follow(next); point(next, true); }
    } else if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      if (state.at >= 0) { take(state.at); point(state.at, true); }
    } else if (event.key === "+" || event.key === "=") zoom(1.6);
    else if (event.key === "-") zoom(1 / 1.6);
    else if (event.key === "0") home();
    else if (event.key === "Escape") point(-1);
  });
  // A point that the keys reach outside of the window brings it along.
  function follow(row) {
    const { left, top } = view(), at = state.layout.place(row), x = left + state.layout.x[at] * unit, y = top - state.layout.y[at] * unit;
    if (x < 0 || y < 0 || x > width || y > height) { state.x = state.layout.x[at]; state.y = state.layout.y[at]; }
  }

  root.querySelector("noscript").remove();
  root.append(tools, board, legend, status, spoken, place);
  new ResizeObserver(() => { if (board.clientWidth && board.clientWidth !== width) { measure(); redraw(); } }).observe(board);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { paint(); explain(); redraw(); });
  canvas.style.touchAction = "pan-y";
  canvas.style.cursor = "crosshair";
  measure();
  recolour();
  draw();
  root.dataset.drawn = "yes";
}

// One layout: places of `n` points, of all rows or of some, with a grid to look for the nearest in.
function layoutOf(title, x, y, rows, total) {
  const n = x.length, starts = new Uint32Array(CELLS * CELLS + 1), order = new Uint32Array(n);
  const cell = (value) => Math.min(CELLS - 1, Math.max(0, Math.floor(value / 65536 * CELLS)));
  for (let at = 0; at < n; at += 1) starts[cell(y[at]) * CELLS + cell(x[at]) + 1] += 1;
  for (let at = 0; at < CELLS * CELLS; at += 1) starts[at + 1] += starts[at];
  const next = starts.slice();
  for (let at = 0; at < n; at += 1) order[next[cell(y[at]) * CELLS + cell(x[at])]++] = at;
  const row = rows ? (at) => rows[at] : (at) => at;
  let placeOf = null;
  if (rows) {
    placeOf = new Int32Array(total).fill(-1);
    rows.forEach((value, at) => { placeOf[value] = at; });
  }
  const place = rows ? (value) => placeOf[value] : (value) => value;
  return {
    title, x, y, n, row, place,
    has: (value) => place(value) >= 0,
    // The row nearest to a place within `reach`, -1 where there is none.
    near(px, py, reach, wanted) {
      let best = reach * reach, found = -1;
      for (let cy = cell(py - reach); cy <= cell(py + reach); cy += 1) {
        for (let cx = cell(px - reach); cx <= cell(px + reach); cx += 1) {
          for (let step = starts[cy * CELLS + cx]; step < starts[cy * CELLS + cx + 1]; step += 1) {
            const at = order[step], far = (x[at] - px) ** 2 + (y[at] - py) ** 2;
            if (far <= best && wanted(row(at))) { best = far; found = row(at); }
          }
        }
      }
      return found;
    },
    // The nearest row in one of the four directions, seen under half a right angle.
    beside(from, [dx, dy], wanted) {
      const here = place(from);
      let best = Infinity, found = -1;
      for (let at = 0; at < n; at += 1) {
        const along = (x[at] - x[here]) * dx + (y[at] - y[here]) * dy, across = Math.abs((x[at] - x[here]) * dy) + Math.abs((y[at] - y[here]) * dx);
        if (along <= 0 || across > along) continue;
        const far = along * along + across * across;
        if (far < best && wanted(row(at))) { best = far; found = row(at); }
      }
      return found;
    },
  };
}

const discOf = (radius, width) => {
  const offsets = [];
  for (let y = -radius; y <= radius; y += 1) {
    for (let x = -radius; x <= radius; x += 1) if (x * x + y * y <= (radius + 0.35) ** 2) offsets.push(y * width + x);
  }
  return offsets;
};

function strideOf(n) {
  const divisor = (a, b) => (b ? divisor(b, a % b) : a);
  let stride = Math.max(1, Math.floor(n * 0.618));
  while (divisor(stride, n) !== 1) stride += 1;
  return stride;
}
