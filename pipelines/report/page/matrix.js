
// A confusion matrix of many classes, to walk over with the pointer or the arrow keys, in an order of one's choice.
async function drawMatrix(root) {
  const data = json(root), parts = await inflate(data.packed), n = data.classes.length, counts = parts.counts;
  const sums = Array.from({ length: n }, (_, row) => counts.subarray(row * n, (row + 1) * n).reduce((sum, count) => sum + count, 0));
  const choice = picker(data.orders.map((title, at) => [at, title]));
  const canvas = make("canvas", { tabIndex: 0 }), card = make("p", { className: "made" }), brush = canvas.getContext("2d", { alpha: false });
  card.setAttribute("role", "status");
  canvas.setAttribute("role", "application");
  canvas.setAttribute("aria-roledescription", "confusion matrix");
  canvas.setAttribute("aria-label", `${root.querySelector(".caption").textContent}. Arrow keys go from cell to cell.`);
  const state = { order: parts.order0, row: -1, column: -1 };
  const ink = (name) => {
    const text = getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
    return [1, 3, 5].map((at) => parseInt(text.slice(at, at + 2), 16));
  };
  const side = () => canvas.width / n;
  function draw() {
    const ratio = Math.min(devicePixelRatio || 1, 2), size = Math.min(root.clientWidth, 640, innerHeight * 0.85);
    canvas.style.width = canvas.style.height = `${size}px`;
    canvas.width = canvas.height = Math.round(size * ratio);
    const ground = ink("ground"), right = ink("series-1"), wrong = ink("series-2");
    const [r, g, b] = ground;
    brush.fillStyle = `rgb(${r},${g},${b})`;
    brush.fillRect(0, 0, canvas.width, canvas.height);
    for (let i = 0; i < n; i += 1) {
      for (let j = 0; j < n; j += 1) {
        const row = state.order[i], column = state.order[j], count = counts[row * n + column];
        if (!count) continue;
        // The square root shows a single image among a hundred.
        const share = Math.sqrt(count / sums[row]), colour = (row === column ? right : wrong).map((value, at) => Math.round(ground[at] + (value - ground[at]) * share));
        brush.fillStyle = `rgb(${colour.join(",")})`;
        brush.fillRect(Math.floor(j * side()), Math.floor(i * side()), Math.ceil(side()), Math.ceil(side()));
      }
    }
    if (state.row >= 0) {
      brush.strokeStyle = `rgb(${ink("ink").join(",")})`;
      brush.lineWidth = 2 * ratio;
      brush.strokeRect(state.column * side(), state.row * side(), side(), side());
    }
  }
  function go(row, column) {
    state.row = Math.min(n - 1, Math.max(0, row));
    state.column = Math.min(n - 1, Math.max(0, column));
    const actual = state.order[state.row], said = state.order[state.column], count = counts[actual * n + said];
    const share = sums[actual] ? `, ${fixed(100 * count / sums[actual], 2)} % of its ${fixed(sums[actual], 0)}` : "";
    card.replaceChildren(make("bdi", {}, data.classes[actual]), actual === said ? ", rightly predicted: " : " predicted as ", ...(actual === said ? [] : [make("bdi", {}, data.classes[said]), ": "]), `${fixed(count, 0)}${share}`);
    draw();
  }
  canvas.addEventListener("pointermove", (event) => {
    const box = canvas.getBoundingClientRect();
    go(Math.floor((event.clientY - box.top) / box.height * n), Math.floor((event.clientX - box.left) / box.width * n));
  });
  const WAYS = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
  canvas.addEventListener("keydown", (event) => {
    const way = WAYS[event.key];
    if (!way) return;
    event.preventDefault();
    if (state.row < 0) go(0, 0); else go(state.row + way[0], state.column + way[1]);
  });
  choice.addEventListener("change", () => { Object.assign(state, { order: parts[`order${choice.value}`], row: -1, column: -1 }); card.textContent = ""; draw(); });
  root.querySelector("noscript").remove();
  root.append(make("div", { className: "tools" }, labelled("Order of the classes", choice)), canvas, card);
  new ResizeObserver(() => draw()).observe(root);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  draw();
  root.dataset.drawn = "yes";
}
