"use strict";
// Small pieces that every figure uses, then the tables. Text always goes in as text, never as markup.
const DATA = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";

function el(tag, attributes, ...children) {
  const node = document.createElement(tag);
  return fill(node, attributes, children);
}
function svg(tag, attributes, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}
function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value);
  }
  for (const child of children.flat()) if (child !== null && child !== undefined) node.append(child);
  return node;
}
const title = (name) => name.replaceAll("_", " ");
const percent = (x) => (100 * x).toFixed(1);
const signed = (x) => (x > 0 ? "+" : x < 0 ? "\u2212" : "\u00b1") + Math.abs(100 * x).toFixed(1);
function short(x) {
  if (x === 0) return "0";
  const size = Math.abs(x);
  if (size >= 10000) return x.toExponential(1);
  return size >= 100 ? x.toFixed(0) : size >= 1 ? x.toFixed(2) : size >= 0.001 ? x.toFixed(3) : x.toExponential(1);
}
function clock(seconds) {
  const whole = Math.round(seconds);
  if (whole < 60) return (seconds < 10 ? seconds.toFixed(1) : whole) + " s";
  if (whole < 3600) return Math.floor(whole / 60) + " min " + String(whole % 60).padStart(2, "0") + " s";
  return Math.floor(whole / 3600) + " h " + String(Math.floor((whole % 3600) / 60)).padStart(2, "0") + " min";
}
const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const stageNamed = (name) => DATA.stages.find((stage) => stage.name === name);

function tip(node, lines) {
  // lines() -> [[label, value] or heading, ...]; asked for when shown, so that it is never out of date.
  const box = byId("tip");
  node.addEventListener("mouseenter", () => {
    box.replaceChildren(...lines().map((line) => Array.isArray(line)
      ? el("div", { class: "row" }, el("span", {}, line[0]), el("span", {}, line[1])) : el("div", {}, el("b", {}, line))));
    box.hidden = false;
  });
  node.addEventListener("mousemove", (event) => place(event.clientX, event.clientY));
  node.addEventListener("mouseleave", () => { box.hidden = true; });
  return node;
}
function place(x, y) {
  const box = byId("tip"), width = box.offsetWidth, height = box.offsetHeight;
  box.style.left = Math.max(4, x + 14 + width > innerWidth ? x - width - 14 : x + 14) + "px";
  box.style.top = Math.max(4, y + 16 + height > innerHeight ? y - height - 12 : y + 16) + "px";
}
function choice(labels, chosen, onchoose) {
  return labels.map(([key, label]) => el("button", { type: "button", "aria-pressed": String(key === chosen), "data-key": key, onclick: () => onchoose(key) }, label));
}
function table(head, rows) {
  return el("div", { class: "scroll" }, el("table", {}, el("thead", {}, el("tr", {}, head.map(([label, number]) => el("th", { class: number ? "num" : null }, label)))),
    el("tbody", {}, rows.map((cells) => el("tr", {}, cells.map((cell, i) => el("td", { class: head[i][1] ? "num" : null }, cell)))))));
}
const nowrap = (content) => el("span", { style: "white-space: nowrap" }, content);
const chip = (text, tone) => el("span", { class: "chip " + (tone || "") }, text);

// --- overview ---------------------------------------------------------------------------------------------------------
const TONES = { done: "good", running: "warn", failed: "bad", pending: "" };

function overview() {
  const done = DATA.stages.filter((stage) => stage.status === "done");
  const seconds = DATA.stages.reduce((sum, stage) => sum + stage.seconds, 0);
  const tiles = [["stages done", done.length + " of " + DATA.stages.length, done.map((stage) => stage.kind).filter((kind, i, all) => all.indexOf(kind) === i).join(", ")],
    ["wall clock of all stages", clock(seconds), ""], ...DATA.headline.map((tile) => [tile.label, tile.value, tile.note])];
  byId("overview").append(el("h2", {}, "The cascade"),
    el("div", { class: "tiles" }, tiles.map(([label, value, note]) => el("div", { class: "tile" }, el("div", { class: "label" }, label), el("div", { class: "value" }, value), el("div", { class: "note" }, note)))),
    fittedGraph(),
    el("p", { class: "muted small" }, "Solid: the stage starts from these weights. Dashed: a teacher that was chosen."),
    table([["stage"], ["kind"], ["starts from"], ["trains"], ["steps", 1], ["time", 1], ["reward or loss"], ["state"]], DATA.stages.map((stage) => [
      el("b", {}, stage.name), stage.kind, stage.parent || "base", trains(stage), nowrap(stage.steps_done + " / " + stage.num_steps), nowrap(clock(stage.seconds)), nowrap(spark(stage)), chip(stage.status, TONES[stage.status])])));
}
function trains(stage) {
  const names = stage.domains.map(title);
  return names.length > 3 ? el("span", { title: names.join(", ") }, names.length + " domains") : names.join(", ");
}
function depths() {
  const depth = {};
  for (const stage of DATA.stages) depth[stage.name] = stage.parent && stage.parent in depth ? depth[stage.parent] + 1 : 0;
  return depth;
}
const NODE = { width: 108, height: 46, gap: 15, row: 70, between: 24 };
function places(room) {
  // One column per depth, wrapped into as many bands of equal length as `room` asks for. A stage whose weights nobody starts
  // from, and that is not the last, is a side branch: a row below.
  const depth = depths(), deepest = Math.max(...Object.values(depth)) + 1;
  const fitting = Math.max(2, Math.floor((room - 24 + NODE.gap) / (NODE.width + NODE.gap)));
  const columns = Math.ceil(deepest / Math.ceil(deepest / fitting)), band = (name) => Math.floor(depth[name] / columns);
  const last = DATA.stages.reduce((a, b) => (depth[b.name] >= depth[a.name] ? b : a), DATA.stages[0]);
  const main = new Set();
  for (let stage = last; stage; stage = stageNamed(stage.parent)) main.add(stage.name);
  const used = {}, rows = {}, tall = [];
  for (const stage of DATA.stages) {
    let row = main.has(stage.name) ? 0 : 1;
    while (used[depth[stage.name] + ":" + row]) row += 1;
    used[depth[stage.name] + ":" + row] = true;
    rows[stage.name] = row;
    tall[band(stage.name)] = Math.max(tall[band(stage.name)] || 0, row + 1);
  }
  const top = tall.map((_, index) => 4 + tall.slice(0, index).reduce((sum, count) => sum + count * NODE.row + NODE.between, 0));
  const at = {};
  for (const stage of DATA.stages) {
    const x = (depth[stage.name] % columns) * (NODE.width + NODE.gap);
    at[stage.name] = { x, y: top[band(stage.name)] + rows[stage.name] * NODE.row, band: band(stage.name) };
  }
  return { at, wide: Math.min(columns, deepest) * (NODE.width + NODE.gap) - NODE.gap, tall: top[top.length - 1] + tall[tall.length - 1] * NODE.row };
}
function edge(from, to) {
  const x = from.x + NODE.width, y = from.y + 22, end = to.y + 22;
  if (from.band !== to.band) return `M${x},${y} h7 V${to.y - 20} H${to.x - 8} V${end} H${to.x}`;
  if (from.y === to.y) return `M${x},${y} H${to.x}`;
  return `M${x},${y} C${x + NODE.gap / 2},${y} ${to.x - NODE.gap / 2},${end} ${to.x},${end}`;
}
function teaching(from, to) {
  const x = from.x + NODE.width / 2, end = to.x + NODE.width / 2, foot = from.y + NODE.height;
  if (from.band !== to.band) return `M${x},${foot} C${x},${foot + 30} ${end},${to.y - 30} ${end},${to.y}`;
  if (from.y <= to.y) return `M${x},${from.y} C${x},${from.y - 24} ${end},${to.y - 24} ${end},${to.y}`;
  return `M${from.x + NODE.width},${from.y + 22} C${from.x + NODE.width + 60},${from.y + 22} ${end},${to.y + 84} ${end},${to.y + NODE.height}`;
}
function graph(room) {
  const { at, wide, tall } = places(room);
  const root = svg("svg", { viewBox: `-12 -22 ${wide + 24} ${tall + 22}`, width: wide + 24, height: tall + 22, role: "img", "aria-label": "stages of the cascade" });
  for (const stage of DATA.stages) {
    const spot = at[stage.name], from = at[stage.parent];
    if (from) root.append(svg("path", { class: "edge", d: edge(from, spot) }));
    const taught = DATA.teachers.filter((row) => row.stage === stage.name).map((row) => row.teacher.split("@")[0]);
    for (const teacher of new Set(taught)) if (at[teacher]) root.append(svg("path", { class: "edge teach", d: teaching(at[teacher], spot) }));
  }
  for (const stage of DATA.stages) {
    const spot = at[stage.name], middle = NODE.width / 2;
    root.append(svg("g", { class: "node " + stage.status, transform: `translate(${spot.x},${spot.y})` }, svg("rect", { width: NODE.width, height: NODE.height, rx: 7 }),
      svg("text", { x: middle, y: 20, "text-anchor": "middle" }, stage.name.length > 17 ? stage.name.slice(0, 16) + "\u2026" : stage.name),
      svg("text", { class: "sub", x: middle, y: 36, "text-anchor": "middle" }, stage.kind + " \u00b7 " + stage.steps_done + " steps")));
  }
  return root;
}
function fittedGraph() {
  const box = el("div", { class: "scroll", id: "graph" });
  let drawn = 0;
  const draw = () => {
    if (!box.clientWidth || box.clientWidth === drawn) return;
    drawn = box.clientWidth;
    box.replaceChildren(graph(drawn));
  };
  requestAnimationFrame(draw);
  addEventListener("resize", draw);
  return box;
}

// --- the ledger --------------------------------------------------------------------------------------------------------
let heatView = "score";

function ledger() {
  const root = byId("ledger");
  root.replaceChildren();
  if (!DATA.cells.length) return;
  root.append(el("h2", {}, "Every checkpoint on every benchmark"),
    el("p", { class: "muted" }, "Mean score in percent on held-out report tasks, with its 95 % interval. A mark says that the score changed against the checkpoint the stage started from, paired over tasks, with an interval that leaves out zero. A frame says that the stage trains this domain."),
    el("div", { class: "bar" }, choice([["score", "Score"], ["change", "Change by the stage"]], heatView, (key) => { heatView = key; ledger(); })));
  for (const mode of ["thinking", "instruct"]) {
    const cells = DATA.cells.filter((cell) => cell.mode === mode);
    if (cells.length) root.append(el("h3", {}, mode === "thinking" ? "Thinking" : "Instruct (no thinking)"), el("div", { class: "scroll" }, heat(cells)));
  }
  root.append(heatLegend());
}
function heat(cells) {
  const domains = DATA.domains.filter((domain) => cells.some((cell) => cell.domain === domain));
  const rows = DATA.checkpoints.filter((name) => cells.some((cell) => cell.checkpoint === name));
  return el("table", { class: "heat" }, el("thead", {}, el("tr", {}, el("th", {}), domains.map((domain) => el("th", {}, title(domain))), el("th", {}, "mean"))),
    el("tbody", {}, rows.map((name) => {
      const stage = stageNamed(name.split(/[@:]/)[0]), found = domains.map((domain) => cells.find((cell) => cell.checkpoint === name && cell.domain === domain));
      const known = found.filter(Boolean), mean = known.reduce((sum, cell) => sum + cell.value, 0) / known.length;
      const start = name.endsWith(":init");
      return el("tr", {}, el("th", {}, start ? "start of " + name.split(":")[0] : name, el("small", {}, start ? "weights that no stage made" : stage ? "from " + stage.reference.replace(/^.*:init$/, "base") : "")),
        found.map((cell) => (cell ? heatCell(cell, stage) : el("td", { class: "none" }, "\u2013"))), el("td", { class: "none" }, el("span", { class: "v" }, known.length === domains.length ? percent(mean) : "\u2013")));
    })));
}
function heatCell(cell, stage) {
  const change = cell.gain, marked = change && (change.low > 0 || change.high < 0);
  const shown = heatView === "score" ? percent(cell.value) : change ? signed(change.value) : "\u2013";
  const half = heatView === "score" ? cell : change;
  const node = el("td", { class: stage && stage.domains.includes(cell.domain) && !cell.checkpoint.endsWith(":init") ? "trained" : null, "data-checkpoint": cell.checkpoint, "data-domain": cell.domain },
    el("span", { class: "v" }, shown), marked ? el("span", { class: "mark" }, change.value > 0 ? "\u25b2" : "\u25bc") : null,
    half ? el("span", { class: "ci" }, "\u00b1" + percent((half.high - half.low) / 2)) : null);
  paint(node, cell, marked);
  return tip(node, () => [title(cell.domain) + " after " + cell.checkpoint, ["score", percent(cell.value) + " %"], ["95 % interval", percent(cell.low) + " to " + percent(cell.high)], ["tasks", String(cell.n)],
    ...(change ? [["change against " + cell.against, signed(change.value)], ["95 % interval", signed(change.low) + " to " + signed(change.high)]] : [])]);
}
function paint(node, cell, marked) {
  if (heatView === "score") {
    const low = color("--heat-low").split(",").map(Number), high = color("--heat-high").split(",").map(Number), share = Math.min(1, Math.max(0, cell.value)) ** 1.3;
    const mixed = low.map((value, i) => Math.round(value + (high[i] - value) * share));
    node.style.background = `rgb(${mixed.join(",")})`;
    node.style.color = 0.299 * mixed[0] + 0.587 * mixed[1] + 0.114 * mixed[2] > 140 ? "#15171a" : "#ffffff";
    if (marked && cell.gain.value < 0) node.style.boxShadow = "inset 0 0 0 2px " + color("--bad");
  } else if (cell.gain) {
    const strength = Math.min(1, Math.abs(cell.gain.value) / 0.4) * (marked ? 0.85 : 0.3);
    node.style.background = `rgba(${color(cell.gain.value < 0 ? "--lose" : "--gain")}, ${strength.toFixed(3)})`;
  } else node.classList.add("none");
}
function heatLegend() {
  const ramp = (css) => el("span", { class: "ramp", style: "background: linear-gradient(90deg, " + css + ")" });
  return el("div", { class: "legend" }, heatView === "score" ? el("span", {}, "0 %", ramp("rgb(var(--heat-low)), rgb(var(--heat-high))"), "100 %") : el("span", {}, "lost 40 points", ramp("rgba(var(--lose), .85), transparent, rgba(var(--gain), .85)"), "gained 40 points"),
    el("span", {}, "\u25bc lost, \u25b2 gained (interval without zero)"), el("span", {}, el("span", { class: "key", style: "box-shadow: inset 0 0 0 2px var(--muted)" }), "trained by the stage"),
    heatView === "score" ? el("span", {}, el("span", { class: "key", style: "box-shadow: inset 0 0 0 2px var(--bad)" }), "regression") : null);
}

// --- recovery, teachers, gates -----------------------------------------------------------------------------------------
function recovery() {
  if (!DATA.recovery.length) return;
  const bar = (row) => {
    if (row.value === null) return el("span", { class: "small muted" }, "no certain lead");
    const at = (x) => Math.min(176, Math.max(4, 24 + 110 * x)), shape = svg("svg", { width: 180, height: 18 });
    shape.append(svg("line", { class: "grid", x1: at(0), x2: at(0), y1: 0, y2: 18 }), svg("line", { class: "grid", x1: at(1), x2: at(1), y1: 0, y2: 18 }),
      svg("line", { x1: at(row.low), x2: at(row.high), y1: 9, y2: 9, stroke: "var(--s1)", "stroke-width": 2 }), svg("circle", { class: "dot", cx: at(row.value), cy: 9, r: 5 }));
    return shape;
  };
  byId("recovery").append(el("h2", {}, "Lost and recovered"), el("p", { class: "muted" }, DATA.recovery_says),
    table([["domain"], ["teacher"], ["its score", 1], ["before", 1], ["after", 1], ["recovered", 1], ["95 % interval", 1], ["0 % to 100 %"]], DATA.recovery.map((row) => [
      title(row.domain), row.teacher, percent(row.best), percent(row.before), percent(row.after), row.value === null ? "\u2013" : el("b", {}, (100 * row.value).toFixed(0) + " %"), row.value === null ? "" : (100 * row.low).toFixed(0) + " to " + (100 * row.high).toFixed(0), bar(row)])));
}
function teachers() {
  if (!DATA.teachers.length) return;
  byId("teachers").append(el("h2", {}, "Teachers"), el("p", { class: "muted" }, "Each domain is taught by the candidate with the best score on select tasks, which the ledger above never shows; a pinned teacher was named in the configuration."),
    table([["stage"], ["domain"], ["teacher"], ["why"], ["candidates, select score"]], DATA.teachers.map((row) => [row.stage, title(row.domain), el("b", {}, row.teacher), row.why,
      el("span", { class: "small" }, row.candidates.map((one) => one.name + " " + percent(one.value)).join("   \u00b7   "))])));
}
function gates() {
  const rows = DATA.stages.flatMap((stage) => stage.gates.map((gate) => [stage.name, title(gate.domain), gate.rule, gate.gain === null ? "\u2013" : signed(gate.gain), gate.gain === null ? "" : signed(gate.low) + " to " + signed(gate.high), chip(gate.verdict, gate.passed ? "good" : gate.on_fail === "warn" ? "warn" : "bad")]));
  if (rows.length) byId("gates").append(el("h2", {}, "Gates"), el("p", { class: "muted" }, "Checked on select tasks when a stage ends, against the checkpoint it started from."),
    table([["stage"], ["domain"], ["rule"], ["change", 1], ["95 % interval", 1], ["verdict"]], rows));
}
function configs() {
  byId("configs").append(el("h2", {}, "Configuration of each stage"), el("p", { class: "muted" }, "As it ran: every default filled in, every reference resolved."),
    ...DATA.stages.map((stage) => el("details", {}, el("summary", {}, stage.name, " ", el("span", { class: "muted small" }, stage.folder + (stage.sha256 ? "  \u00b7  weights " + stage.sha256.slice(0, 12) : ""))), el("pre", {}, stage.config || "no config.yaml yet"))));
}
