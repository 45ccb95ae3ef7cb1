// Figures: sparklines, time bars, curves.
const W = 300, H = 120, PAD = { left: 38, right: 8, top: 8, bottom: 20 };

function extent(values) {
  let low = Math.min(...values), high = Math.max(...values);
  if (low === high) { low -= Math.abs(low) * 0.1 || 0.5; high += Math.abs(high) * 0.1 || 0.5; }
  return [low, high];
}
function ticks(low, high) {
  const step = 10 ** Math.floor(Math.log10((high - low) / 2)), wide = [1, 2, 5, 10].map((k) => k * step).find((k) => (high - low) / k <= 3.2);
  const found = [];
  for (let k = Math.ceil(low / wide); k * wide <= high + wide * 1e-9; k += 1) found.push(k * wide);
  return found;
}
function smooth(points) {
  const reach = Math.max(1, Math.round(points.length / 24));
  return points.map(([x], i) => {
    const near = points.slice(Math.max(0, i - reach), i + reach + 1);
    return [x, near.reduce((sum, point) => sum + point[1], 0) / near.length];
  });
}
const path = (points, x, y) => points.map((point, i) => (i ? "L" : "M") + x(point[0]).toFixed(1) + "," + y(point[1]).toFixed(1)).join("");

function spark(stage) {
  const name = ["reward", "loss"].find((key) => stage.curves[key]);
  if (!name) return "";
  const points = smooth(stage.curves[name]), [low, high] = extent(points.map((point) => point[1])), [first, last] = [points[0], points[points.length - 1]];
  const x = (step) => 1 + (116 * (step - first[0])) / Math.max(1, last[0] - first[0]), y = (value) => 23 - (20 * (value - low)) / (high - low);
  return el("span", { class: "small" }, svg("svg", { class: "spark", viewBox: "0 0 120 26" }, svg("path", { class: "line", d: path(points, x, y) })), "  " + name + " " + short(first[1]) + " \u2192 " + short(last[1]));
}

const SPANS = [["sampling", "--s1"], ["reward", "--s2"], ["training", "--s3"], ["refit", "--s4"], ["evaluation", "--s5"], ["other", "--s6"]];

function time() {
  const stages = DATA.stages.filter((stage) => stage.seconds > 0);
  if (!stages.length) return;
  const longest = Math.max(...stages.map((stage) => stage.seconds)), grid = el("div", { class: "times" });
  for (const stage of stages) {
    const track = el("div", { class: "track" });
    for (const [name, css] of SPANS) {
      const spent = stage.spans[name] || 0;
      if (spent <= 0) continue;
      track.append(tip(el("i", { style: `width:${((100 * spent) / longest).toFixed(2)}%;background:var(${css})` }), () => [stage.name, [name, clock(spent)], ["share of the stage", percent(spent / stage.seconds) + " %"]]));
    }
    grid.append(el("div", {}, stage.name), track, el("div", { class: "total" }, clock(stage.seconds)));
  }
  byId("time").append(el("h2", {}, "Where the time went"), el("p", { class: "muted" }, "Wall clock of the first rank. Reward time is what sampling waited for; grading that overlapped with sampling is free. Other: start-up, checkpoints, loading."), grid,
    el("div", { class: "legend" }, SPANS.map(([name, css]) => el("span", {}, el("span", { class: "key", style: `background:var(${css})` }), name))));
}

const CURVES = [["reward", "mean reward"], ["loss", "loss"], ["accuracy", "token accuracy"], ["entropy", "entropy, nat"], ["length", "answer length, tokens"], ["kl", "KL to the start, nat"], ["reverse_kl", "KL(student \u2016 teacher), nat"], ["gap_abs", "|learner \u2212 sampler|, nat"],
  ["grad_norm", "gradient norm"], ["all_equal_share", "groups all equal, share"], ["truncated_share", "truncated, share"], ["invalid_share", "invalid, share"], ["masked_share", "masked tokens, share"], ["masked_sequence_share", "masked sequences, share"], ["clipped_share", "clipped tokens, share"], ["judge_matches_dropped", "matches that the judge dropped"],
  ["non_finite", "skipped, not finite"], ["tokens_per_second", "tokens per second"], ["lr", "learning rate"]];

function curves() {
  const root = byId("curves"), stages = DATA.stages.filter((stage) => Object.keys(stage.curves).length);
  if (!stages.length) return;
  let chosen = (stages.find((stage) => stage.kind !== "sft") || stages[0]).name;
  const bar = el("div", { class: "bar" }), cards = el("div", { class: "cards" });
  const show = () => {
    bar.replaceChildren(...choice(stages.map((stage) => [stage.name, stage.name]), chosen, (key) => { chosen = key; show(); }));
    const stage = stageNamed(chosen), known = CURVES.filter(([name]) => stage.curves[name]);
    const domains = Object.keys(stage.curves).filter((name) => name.startsWith("reward/")).map((name) => [name, "reward, " + title(name.slice(7))]);
    cards.replaceChildren(...[...known, ...(domains.length > 1 ? domains : [])].map(([name, label]) => chart(stage.curves[name], label)));
  };
  root.append(el("h2", {}, "Curves"), el("p", { class: "muted" }, "Every step (thin) and its running mean (thick)."), bar, cards);
  show();
}
function chart(points, label) {
  const [low, high] = extent(points.map((point) => point[1])), first = points[0][0], last = points[points.length - 1][0];
  const x = (step) => PAD.left + ((W - PAD.left - PAD.right) * (step - first)) / Math.max(1, last - first);
  const y = (value) => H - PAD.bottom - ((H - PAD.top - PAD.bottom) * (value - low)) / (high - low);
  const figure = svg("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": label });
  for (const value of ticks(low, high)) figure.append(svg("line", { class: "grid", x1: PAD.left, x2: W - PAD.right, y1: y(value), y2: y(value) }), svg("text", { x: PAD.left - 5, y: y(value) + 3.5, "text-anchor": "end" }, short(value)));
  figure.append(svg("text", { x: PAD.left, y: H - 5 }, "step " + first), svg("text", { x: W - PAD.right, y: H - 5, "text-anchor": "end" }, String(last)));
  const mean = smooth(points), cross = svg("line", { class: "cross", y1: PAD.top, y2: H - PAD.bottom, visibility: "hidden" }), dot = svg("circle", { class: "dot", r: 4.5, visibility: "hidden" });
  figure.append(svg("path", { class: "raw", d: path(points, x, y) }), svg("path", { class: "line", d: path(mean, x, y) }), cross, dot);
  const value = el("span", {}, short(mean[mean.length - 1][1]));
  figure.addEventListener("mousemove", (event) => {
    const frame = figure.getBoundingClientRect(), step = first + ((((event.clientX - frame.left) * W) / frame.width - PAD.left) / (W - PAD.left - PAD.right)) * (last - first);
    const nearest = points.reduce((best, point, i) => (Math.abs(point[0] - step) < Math.abs(points[best][0] - step) ? i : best), 0);
    for (const [node, pairs] of [[cross, { x1: x(points[nearest][0]), x2: x(points[nearest][0]) }], [dot, { cx: x(points[nearest][0]), cy: y(points[nearest][1]) }]]) fill(node, { ...pairs, visibility: "visible" }, []);
    value.textContent = "step " + points[nearest][0] + ": " + short(points[nearest][1]);
  });
  figure.addEventListener("mouseleave", () => { cross.setAttribute("visibility", "hidden"); dot.setAttribute("visibility", "hidden"); value.textContent = short(mean[mean.length - 1][1]); });
  return el("div", { class: "chart" }, el("div", { class: "name" }, label, value), figure);
}
