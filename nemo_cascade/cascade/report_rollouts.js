// The rollouts reader, the theme, and the order in which the page is drawn.
const reader = { stage: null, step: 0, filter: "all", index: 0 };
const rollingStages = DATA.stages.filter((stage) => stage.rollouts.length);
const FILTERS = [["all", "all"], ["right", "full reward"], ["wrong", "less"], ["invalid", "invalid"]];

function passes(row) {
  if (reader.filter === "all") return true;
  if (reader.filter === "invalid") return row.reward === null;
  return row.reward !== null && (row.reward >= 1) === (reader.filter === "right");
}
const rowsNow = () => stageNamed(reader.stage).rollouts.filter((row) => row.step === reader.step && passes(row));
const stepsOf = (stage) => [...new Set(stage.rollouts.map((row) => row.step))];

function rollouts() {
  if (!rollingStages.length) return;
  reader.stage = rollingStages[0].name;
  reader.step = stepsOf(rollingStages[0])[0];
  byId("rollouts").append(el("h2", {}, "Rollouts"), el("p", { class: "muted" }, "What the policy was asked, what it sampled, and what the verifier said. The stronger the colour of a token, the less likely it was; hover for its log-probability. Arrow keys: left and right for the next rollout, up and down for the next recorded step."),
    el("div", { id: "reader", tabindex: "0" }));
  byId("reader").addEventListener("keydown", (event) => {
    const moves = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] };
    if (!(event.key in moves) || event.target.tagName === "SELECT") return;
    event.preventDefault();
    move(...moves[event.key]);
  });
  showRollout();
}
function move(rollout, step) {
  const steps = stepsOf(stageNamed(reader.stage));
  if (step) {
    reader.step = steps[Math.min(steps.length - 1, Math.max(0, steps.indexOf(reader.step) + step))];
    reader.index = 0;
  } else reader.index = Math.min(Math.max(0, rowsNow().length - 1), Math.max(0, reader.index + rollout));
  showRollout();
}
function showRollout() {
  const stage = stageNamed(reader.stage), steps = stepsOf(stage), rows = rowsNow(), row = rows[reader.index];
  const pick = (values, now, label, onchange) => el("select", { "aria-label": label, onchange: (event) => onchange(event.target.value) }, values.map(([value, text]) => el("option", { value, selected: String(value) === String(now) }, text)));
  const bar = el("div", { class: "bar" },
    pick(rollingStages.map((one) => [one.name, one.name]), reader.stage, "stage", (value) => { Object.assign(reader, { stage: value, step: stepsOf(stageNamed(value))[0], index: 0 }); showRollout(); }),
    pick(steps.map((step) => [step, "step " + step]), reader.step, "step", (value) => { Object.assign(reader, { step: Number(value), index: 0 }); showRollout(); }),
    choice(FILTERS, reader.filter, (key) => { Object.assign(reader, { filter: key, index: 0 }); showRollout(); }), el("span", { class: "gap" }),
    el("button", { type: "button", id: "previous", disabled: reader.index <= 0, onclick: () => move(-1, 0) }, "\u2190"), el("span", { id: "position", class: "small muted" }, rows.length ? reader.index + 1 + " of " + rows.length : "none"),
    el("button", { type: "button", id: "next", disabled: reader.index >= rows.length - 1, onclick: () => move(1, 0) }, "\u2192"));
  byId("reader").replaceChildren(bar, row ? el("div", { class: "reader" }, tokens(row), facts(row, rows)) : el("p", { class: "muted" }, "No rollout of this step passes the filter."));
}
function tokens(row) {
  const box = el("div", { class: "tokens" });
  for (const run of row.runs) {
    if (typeof run === "string") { box.append(el("span", { class: "given" }, run)); continue; }
    for (const [text, logprob] of run) {
      const chance = Math.exp(logprob), strength = Math.min(1, -logprob / 4);
      box.append(tip(el("span", { class: "tok", style: strength > 0.02 ? `background: rgba(var(--lose), ${(0.6 * strength).toFixed(2)})` : null }, text),
        () => [JSON.stringify(text), ["log p", logprob.toFixed(3)], ["probability", percent(chance) + " %"]]));
    }
  }
  if (row.cut) box.append(el("span", { class: "given" }, "\n\u2026 " + row.cut + " more tokens"));
  return box;
}
function facts(row, rows) {
  const group = rows.filter((other) => other.group === row.group), list = el("dl", { class: "facts" });
  const add = (label, ...value) => list.append(el("dt", {}, label), el("dd", {}, ...value));
  add("reward", el("span", { class: "reward " + (row.reward === null ? "warn" : row.reward >= 1 ? "good" : row.reward <= 0 ? "bad" : "") }, row.reward === null ? "invalid" : short(row.reward)));
  if (row.reason) add("why", row.reason);
  const parts = Object.entries(row.parts);
  if (parts.length) add("parts", parts.map(([name, value]) => el("div", { class: "small" }, title(name) + " " + short(value))));
  if (row.advantage !== null) add("advantage", short(row.advantage));
  add("task", el("span", { class: "small" }, row.task, el("br"), title(row.domain) + (row.thinking ? ", thinking" : ", instruct")));
  add("sampled", row.sampled + " tokens" + (row.truncated ? ", truncated" : "") + (row.in_loss ? "" : ", not in the loss"));
  if (group.length > 1) add("its group", el("div", { class: "squares" }, group.map((other) => el("button", { type: "button", class: other === row ? "now" : null, style: other.reward === null ? null : `background: rgba(var(${other.reward >= 0.5 ? "--gain" : "--lose"}), ${other.reward >= 0.5 ? 0.35 * other.reward : 0.35 * (1 - other.reward)})`, onclick: () => { reader.index = rows.indexOf(other); showRollout(); } }, other.reward === null ? "?" : short(other.reward).slice(0, 4)))));
  return list;
}

function theme(name) {
  document.documentElement.dataset.theme = name;
  ledger();
}
function draw() {
  byId("title").textContent = DATA.name;
  byId("subtitle").textContent = DATA.subtitle;
  overview(); recovery(); teachers(); gates(); time(); curves(); rollouts(); configs();
  theme(matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  byId("theme").addEventListener("click", () => theme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));
  const names = { overview: "Cascade", ledger: "Ledger", recovery: "Recovery", teachers: "Teachers", gates: "Gates", time: "Time", curves: "Curves", rollouts: "Rollouts", configs: "Configuration" };
  byId("nav").append(...Object.entries(names).filter(([id]) => byId(id).childElementCount).map(([id, text]) => el("a", { href: "#" + id }, text)));
}
draw();
