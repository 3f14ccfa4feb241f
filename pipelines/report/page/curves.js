
// ROC and precision-recall curves of one class, with a threshold to move. Counts are exact at every threshold of the slider.
async function drawCurves(root) {
  const data = json(root), parts = await inflate(data.packed), SIZE = 320, EDGE = 40;
  const id = root.dataset.curves;
  const choice = picker(data.curves.map((curve, at) => [at, curve.name]));
  choice.value = data.chosen;
  const slider = make("input", { type: "range", min: 0, step: 1, className: "threshold" });
  const numbers = make("dl", { className: "facts" }), said = make("p", { className: "sr" });
  said.setAttribute("role", "status");
  const charts = [
    chart("ROC curve", "false positive rate", "true positive rate (recall)"),
    chart("Precision-recall curve", "recall", "precision"),
  ];
  const drawings = make("div", { className: "pair" }, ...charts.map((made) => made.figure), numbers);
  let curve = null;

  function chart(title, xlabel, ylabel) {
    const line = svg("polyline", { class: "line" }), chance = svg("line", { class: "chance" }), dot = svg("circle", { class: "dot", r: 6 });
    const drawing = svg("svg", { viewBox: `0 0 ${SIZE + EDGE + 12} ${SIZE + EDGE + 12}`, role: "img" });
    const x = (value) => EDGE + value * SIZE, y = (value) => 8 + (1 - value) * SIZE;
    const text = (content, left, top, more = {}) => svg("text", { x: left, y: top, ...more }, content);
    for (const tick of [0, 0.25, 0.5, 0.75, 1]) {
      drawing.append(svg("line", { class: "grid", x1: x(tick), x2: x(tick), y1: y(0), y2: y(1) }), svg("line", { class: "grid", x1: x(0), x2: x(1), y1: y(tick), y2: y(tick) }),
        text(tick, x(tick), y(0) + 15, { "text-anchor": tick === 1 ? "end" : "middle" }), text(tick, x(0) - 5, y(tick) + 4, { "text-anchor": "end" }));
    }
    drawing.append(text(xlabel, x(0.5), y(0) + 32, { "text-anchor": "middle" }), text(ylabel, 10, y(0.5), { "text-anchor": "middle", transform: `rotate(-90 10 ${y(0.5)})` }), chance, line, dot);
    const caption = make("figcaption");
    return { title, line, chance, dot, drawing, caption, x, y, figure: make("figure", { className: "chart" }, drawing, caption) };
  }

  const share = (value) => (value === null || Number.isNaN(value) ? "–" : `${fixed(value * 100, 2)} %`);
  function pick() {
    const at = Number(choice.value), of = data.curves[at];
    curve = { ...of, thresholds: parts[`thresholds${at}`], found: parts[`found${at}`], wrong: parts[`false${at}`] };
    const last = curve.thresholds.length - 1, places = [...curve.thresholds.keys()];
    const recall = (place) => curve.found[place] / curve.positives, alarms = (place) => curve.wrong[place] / curve.negatives;
    const precision = (place) => curve.found[place] / (curve.found[place] + curve.wrong[place]);
    const [roc, pr] = charts;
    roc.line.setAttribute("points", [[0, 0], ...places.map((place) => [alarms(place), recall(place)])].map(([a, b]) => `${roc.x(a)},${roc.y(b)}`).join(" "));
    pr.line.setAttribute("points", places.map((place) => [recall(place), precision(place)]).map(([a, b]) => `${pr.x(a)},${pr.y(b)}`).join(" "));
    line(roc, 0, 0, 1, 1);
    const rate = curve.positives / (curve.positives + curve.negatives);
    line(pr, 0, rate, 1, rate);
    roc.caption.textContent = `ROC curve of ${curve.name} against the rest; area ${curve.auc === null ? "–" : fixed(curve.auc, 4)}. Dashed: chance.`;
    pr.caption.textContent = `Precision-recall curve of ${curve.name}; average precision ${curve.average_precision === null ? "–" : fixed(curve.average_precision, 4)}. Dashed: the class's share.`;
    roc.drawing.setAttribute("aria-label", roc.caption.textContent);
    pr.drawing.setAttribute("aria-label", pr.caption.textContent);
    slider.max = last;
    // Where one half is, as the winner decides between two classes.
    const half = curve.thresholds.findIndex((threshold) => threshold < 0.5);
    slider.value = half < 0 ? last : Math.max(0, half - 1);
    show();
  }
  function line(made, x1, y1, x2, y2) {
    for (const [name, value] of Object.entries({ x1: made.x(x1), y1: made.y(y1), x2: made.x(x2), y2: made.y(y2) })) made.chance.setAttribute(name, value);
  }
  function show() {
    const place = Number(slider.value), { found, wrong, thresholds, positives, negatives } = curve;
    const missed = positives - found[place], rest = negatives - wrong[place];
    const precision = found[place] / (found[place] + wrong[place]), recall = found[place] / positives;
    const [roc, pr] = charts;
    const put = (made, x, y) => { made.dot.setAttribute("cx", made.x(x)); made.dot.setAttribute("cy", made.y(y)); };
    put(roc, wrong[place] / negatives, recall);
    put(pr, recall, precision);
    const facts = [
      ["threshold", number(thresholds[place])],
      ["found (true positives)", `${fixed(found[place], 0)} of ${fixed(positives, 0)}: recall ${share(recall)}`],
      ["false alarms (false positives)", `${fixed(wrong[place], 0)} of ${fixed(negatives, 0)}: false positive rate ${share(wrong[place] / negatives)}`],
      ["missed (false negatives)", fixed(missed, 0)],
      ["rightly left (true negatives)", `${fixed(rest, 0)}: specificity ${share(rest / negatives)}`],
      ["precision", share(precision)],
      ["F1", number(2 * found[place] / (2 * found[place] + wrong[place] + missed))],
    ];
    numbers.replaceChildren(...facts.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value))));
    slider.setAttribute("aria-valuetext", `threshold ${number(thresholds[place])}: recall ${share(recall)}, precision ${share(precision)}`);
  }
  choice.addEventListener("change", () => { pick(); said.textContent = charts[0].caption.textContent; });
  slider.addEventListener("input", show);
  const points = () => {
    const columns = ["threshold", "true positives", "false positives", "recall", "false positive rate", "precision"].map((title) => ({ title }));
    const { found, wrong, thresholds, positives, negatives } = curve, list = (of) => [...thresholds.keys()].map(of);
    const values = [[...thresholds], [...found], [...wrong], list((at) => found[at] / positives), list((at) => wrong[at] / negatives), list((at) => found[at] / (found[at] + wrong[at]))];
    download(`${id}.csv`, csv({ columns, values, rows: thresholds.length }), "text/csv;charset=utf-8");
  };
  const save = make("button", { type: "button", className: "download" }, "CSV");
  save.setAttribute("aria-label", `Download as CSV: ${root.querySelector(".caption").textContent}`);
  save.addEventListener("click", points);
  root.querySelector(".caption").after(save);
  const tools = make("div", { className: "tools" }, ...(data.curves.length > 1 ? [labelled("Show", choice)] : []), labelled("Threshold (from sure to everything)", slider));
  root.querySelector("noscript").remove();
  root.append(tools, drawings, said);
  pick();
  root.dataset.drawn = "yes";
}
