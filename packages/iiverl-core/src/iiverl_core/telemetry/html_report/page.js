"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const COLOURS = 8, LISTED = 200, HEIGHT = 190, MARGIN = { top: 6, right: 8, bottom: 20, left: 52 };
const colour = (i) => `var(--c${i % COLOURS})`;

function element(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

function shape(name, attributes = {}, text = null) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== null) node.textContent = text;
  return node;
}

function number(value, digits = 4) {
  if (value === null || value === undefined) return "–";
  if (value !== 0 && (Math.abs(value) >= 1e6 || Math.abs(value) < 1e-4)) return String(Number(value.toPrecision(digits)).toExponential()).replace("e+", "e");
  return String(Number(value.toPrecision(digits)));
}

function duration(seconds) {
  const [h, m, s] = [Math.floor(seconds / 3600), Math.floor((seconds % 3600) / 60), Math.round(seconds % 60)];
  return h ? `${h} h ${m} min` : m ? `${m} min ${s} s` : `${s} s`;
}

// --- head and findings

function drawHead() {
  const run = data.runs[0], { steps, values } = run.curves;
  const last = steps.length ? steps[steps.length - 1] : 0;
  const facts = [];
  const add = (name, value) => facts.push(element("span", {}, `${name} `, element("b", {}, value)));
  if (run.state) add("state", run.state);
  add("step", run.total_steps ? `${last} of ${run.total_steps}` : String(last));
  const scores = (values["critic/score/mean"] || []).filter((value) => value !== null);
  if (scores.length > 1) {
    const n = Math.max(1, Math.floor(scores.length / 10));
    const mean = (part) => part.reduce((sum, value) => sum + value, 0) / part.length;
    add("reward", `${number(mean(scores.slice(0, n)), 3)} → ${number(mean(scores.slice(-n)), 3)}`);
  }
  if (run.started) {
    add("started", new Date(run.started * 1000).toLocaleString());
    add("took", duration(run.ended - run.started));
  }
  byId("head").append(element("h1", {}, run.name), element("p", { class: "facts" }, ...facts));
  for (const finding of data.findings) {
    byId("findings").append(element("div", { class: "finding", role: "note" },
      element("p", {}, finding.text), element("p", { class: "quiet" }, finding.advice, " ", element("code", {}, finding.metric))));
  }
  if (data.runs.length > 1) {
    byId("legend").append(...data.runs.map((run, i) => element("span", { style: `--of:${colour(i)}` }, run.name)));
  }
}

// --- charts

const smoothed = (values) => {
  const window = Math.floor(values.length / 15) | 1, reach = window >> 1;
  return values.map((value, i) => {
    if (value === null) return null;
    const near = values.slice(Math.max(0, i - reach), i + reach + 1).filter((each) => each !== null);
    return near.reduce((sum, each) => sum + each, 0) / near.length;
  });
};

function ticks(low, high, about) {
  const span = (high - low) / about, power = 10 ** Math.floor(Math.log10(span));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((each) => each >= span * 0.7);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i <= Math.floor(high / step + 1e-9); i++) found.push(i * step);
  return found;
}

// The series of a chart: one line for each metric and run that has it.
function seriesOf(chart) {
  const runs = chart.kind === "stacked" ? data.runs.slice(0, 1) : data.runs;
  const series = [];
  runs.forEach((run, r) => chart.metrics.forEach((metric, m) => {
    const values = run.curves.values[metric];
    if (!values) return;
    series.push({
      metric, run, values, steps: run.curves.steps,
      colour: colour(data.runs.length > 1 && chart.metrics.length === 1 ? r : m + r * chart.metrics.length),
      label: data.runs.length > 1 && runs.length > 1 ? `${run.name}: ${metric}` : metric,
    });
  }));
  return series;
}

function drawChart(chart, smooth) {
  const series = seriesOf(chart);
  const box = element("figure", { class: "chart", style: "margin:0" }, element("h2", { title: titleOf(chart) }, chart.title));
  if (!series.length) return box;
  const svg = shape("svg", { role: "img", "aria-label": `${chart.title} by training step` });
  box.append(svg);
  box.append(element("div", { class: "legend" }, ...series.map((each) =>
    element("span", { style: `--of:${each.colour}`, title: meaning(each.metric) }, each.label))));
  const draw = () => fill(svg, chart, series, smooth);
  svg.redraw = draw;
  sizes.observe(svg);
  return box;
}

const sizes = new ResizeObserver((entries) => entries.forEach((entry) => entry.target.redraw && entry.target.redraw()));
const meaning = (metric) => { const known = data.meanings[metric]; return known ? `${known[1]}${known[0] ? ` (${known[0]})` : ""}` : ""; };
const titleOf = (chart) => chart.metrics.map((metric) => `${metric}: ${meaning(metric)}`).join("\n");

function fill(svg, chart, series, smooth) {
  const width = Math.max(svg.clientWidth, 120), { top, right, bottom, left } = MARGIN;
  svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
  svg.replaceChildren();
  const stacked = chart.kind === "stacked";
  const band = chart.band && series.length === 1 ? chart.band.map((name) => series[0].run.curves.values[name]) : null;
  const sums = [];
  if (stacked) series.forEach((each) => each.values.forEach((value, i) => { sums[i] = (sums[i] || 0) + (value || 0); }));
  const shown = [...(stacked ? [sums] : series.map((each) => each.values)), ...(band || [])].flat().filter((value) => value !== null && value !== undefined);
  let [low, high] = [Math.min(...shown), Math.max(...shown)];
  if (stacked) low = 0;
  const pad = (high - low) * 0.05 || Math.abs(high) * 0.1 || 1;
  [low, high] = [stacked ? 0 : low - pad, high + pad];
  const all = series.flatMap((each) => [each.steps[0], each.steps[each.steps.length - 1]]);
  const [start, end] = [Math.min(...all), Math.max(...all)];
  const x = (step) => left + (end > start ? (step - start) / (end - start) : 0.5) * (width - left - right);
  const y = (value) => top + (1 - (value - low) / (high - low)) * (HEIGHT - top - bottom);
  for (const tick of ticks(low, high, 4)) {
    svg.append(shape("line", { class: "grid", x1: left, x2: width - right, y1: y(tick), y2: y(tick) }));
    svg.append(shape("text", { x: left - 6, y: y(tick) + 4, "text-anchor": "end" }, number(tick, 3)));
  }
  for (const tick of end > start ? ticks(start, end, Math.max(2, width / 90)) : [start]) {
    const anchor = x(tick) > width - right - 12 ? "end" : "middle";
    if (Number.isInteger(tick)) svg.append(shape("text", { x: anchor === "end" ? width - right : x(tick), y: HEIGHT - 5, "text-anchor": anchor }, tick));
  }
  const path = (steps, values) => {
    let text = "", open = false;
    values.forEach((value, i) => {
      if (value === null || value === undefined) { open = false; return; }
      text += `${open ? "L" : "M"}${x(steps[i]).toFixed(1)},${y(value).toFixed(1)}`;
      open = true;
    });
    return text;
  };
  const between = (steps, lower, upper) => {
    const there = steps.map((_, i) => i).filter((i) => lower[i] !== null && upper[i] !== null && lower[i] !== undefined && upper[i] !== undefined);
    const along = (rows, values) => rows.map((i) => `${x(steps[i]).toFixed(1)},${y(values[i]).toFixed(1)}`).join("L");
    return there.length ? `M${along(there, upper)}L${along([...there].reverse(), lower)}Z` : "";
  };
  if (stacked) {
    let below = series[0].steps.map(() => 0);
    for (const each of series) {
      const above = below.map((value, i) => value + (each.values[i] || 0));
      svg.append(shape("path", { class: "area", d: between(each.steps, below, above), style: `fill:${each.colour}` }));
      below = above;
    }
  } else {
    if (band && band.every(Boolean)) svg.append(shape("path", { class: "band", d: between(series[0].steps, ...band), style: `fill:${series[0].colour}` }));
    for (const each of series) {
      const present = each.values.filter((value) => value !== null).length, sparse = present < each.values.length / 2;
      const even = smooth && !sparse && present > 20;
      if (even) svg.append(shape("path", { class: "raw", d: path(each.steps, each.values), style: `stroke:${each.colour}` }));
      if (sparse) each.values.forEach((value, i) => value === null || svg.append(shape("circle", { class: "dots", cx: x(each.steps[i]), cy: y(value), r: 2.6, style: `fill:${each.colour}` })));
      const values = even ? smoothed(each.values) : each.values;
      const joined = sparse ? each.values.map((value, i) => [each.steps[i], value]).filter(([, value]) => value !== null) : null;
      svg.append(shape("path", { class: "curve", style: `stroke:${each.colour}`,
        d: joined ? path(joined.map(([step]) => step), joined.map(([, value]) => value)) : path(each.steps, values) }));
    }
  }
  const cursor = shape("line", { class: "cursor", y1: top, y2: HEIGHT - bottom, x1: -9, x2: -9 });
  svg.append(cursor);
  const stepAt = (event) => {
    const frame = svg.getBoundingClientRect(), at = (event.clientX - frame.left) * (width / frame.width);
    const wanted = start + ((at - left) / (width - left - right)) * (end - start);
    const steps = series[0].steps;
    return steps.reduce((best, step) => (Math.abs(step - wanted) < Math.abs(best - wanted) ? step : best), steps[0]);
  };
  svg.onpointermove = (event) => {
    const step = stepAt(event);
    cursor.setAttribute("x1", x(step)); cursor.setAttribute("x2", x(step));
    const rows = series.map((each) => [each, each.values[each.steps.indexOf(step)]]).filter(([, value]) => value !== null && value !== undefined);
    showTip(event, element("b", {}, `step ${step}`), ...rows.map(([each, value]) =>
      element("div", { style: `--of:${each.colour}` }, element("span", {}, each.label), element("b", {}, number(value)))));
  };
  svg.onpointerleave = () => { byId("tip").hidden = true; cursor.setAttribute("x1", -9); cursor.setAttribute("x2", -9); };
  svg.onclick = (event) => showStep(stepAt(event));
}

function showTip(event, ...content) {
  const tip = byId("tip");
  tip.replaceChildren(...content);
  tip.hidden = false;
  const beside = event.clientX + 14 + tip.offsetWidth > window.innerWidth ? event.clientX - tip.offsetWidth - 14 : event.clientX + 14;
  tip.style.left = `${Math.max(4, beside)}px`;
  tip.style.top = `${Math.min(event.clientY + 14, window.innerHeight - tip.offsetHeight - 4)}px`;
}

function drawCharts() {
  const extra = byId("metric").value.trim(), charts = [...data.charts];
  if (data.runs.some((run) => extra in run.curves.values)) charts.unshift({ title: extra, metrics: [extra], band: null, kind: "lines" });
  sizes.disconnect();
  byId("charts").replaceChildren(...charts.map((chart) => drawChart(chart, byId("smooth").checked)));
  for (const svg of byId("charts").querySelectorAll("svg")) svg.redraw();
}

// --- samples

const key = (sample) => `${sample.step}.${sample.group}.${sample.member}`;
const groups = new Map();
for (const sample of data.samples) {
  const name = `${sample.step}.${sample.group}`;
  if (!groups.has(name)) groups.set(name, []);
  groups.get(name).push(sample);
}
const groupOf = (sample) => groups.get(`${sample.step}.${sample.group}`);
const scoresOf = (group) => group.map((sample) => sample.score).filter((score) => score !== undefined);
const KINDS = {
  "": () => true,
  failed: (sample) => sample.outcome !== undefined && sample.outcome !== "scored",
  cut: (sample) => sample.finish_reason === "length",
  best: (sample) => sample.score !== undefined && sample === groupOf(sample).reduce((best, each) => ((each.score ?? -Infinity) > (best.score ?? -Infinity) ? each : best)),
  worst: (sample) => sample.score !== undefined && sample === groupOf(sample).reduce((worst, each) => ((each.score ?? Infinity) < (worst.score ?? Infinity) ? each : worst)),
  disagree: (sample) => new Set(scoresOf(groupOf(sample))).size > 1,
};
const ORDERS = {
  "": null,
  high: (a, b) => (b.score ?? -Infinity) - (a.score ?? -Infinity),
  low: (a, b) => (a.score ?? Infinity) - (b.score ?? Infinity),
  long: (a, b) => (b.response_length ?? 0) - (a.response_length ?? 0),
};
const ADVANTAGE_SCALE = Math.max(1e-6, ...data.samples.map((sample) => Math.abs(sample.advantage ?? 0)));
let found = [], listed = LISTED, chosen = null;

const contains = (sample, text) => [sample.prompt, sample.response, sample.ground_truth, sample.failure_detail]
  .some((part) => part && part.toLowerCase().includes(text));

function filter() {
  const step = byId("step").value, text = wantedText();
  const kind = KINDS[byId("kind").value], order = ORDERS[byId("order").value];
  found = data.samples.filter((sample) => (!step || String(sample.step) === step) && kind(sample) && (!text || contains(sample, text)));
  if (order) found = [...found].sort(order);
  listed = LISTED;
  if (!found.includes(chosen)) chosen = found[0] ?? null;
  drawSamples();
}

function drawSamples() {
  const total = data.samples_total, shown = data.samples.length;
  const about = data.samples_estimated ? "about " : "";
  const part = shown < total ? `; this report has ${shown.toLocaleString()} of ${about}${total.toLocaleString()} in ${data.samples_folder}` : "";
  byId("count").textContent = shown ? `${found.length.toLocaleString()} responses${part}` : "No samples were saved: set trainer.rollout_data_dir to keep those of each step.";
  byId("filters").hidden = byId("browser").hidden = !shown;
  const rows = found.slice(0, listed).map((sample) => element("li", { "data-key": key(sample), role: "option", "aria-selected": String(sample === chosen), onclick: () => choose(sample) },
    element("span", { class: "where" }, `step ${sample.step}, group ${sample.group}, response ${sample.member}`), scoreOf(sample),
    element("span", { class: "what" }, sample.response || "(empty)")));
  if (found.length > listed) rows.push(element("li", { class: "more", onclick: () => { listed += LISTED; drawSamples(); } }, `${(found.length - listed).toLocaleString()} more`));
  byId("list").replaceChildren(...rows);
  drawDetail();
}

function scoreOf(sample) {
  if (sample.outcome !== undefined && sample.outcome !== "scored") return element("span", { class: "score failed" }, sample.outcome);
  return element("span", { class: "score" }, number(sample.score));
}

function choose(sample) {
  chosen = sample;
  for (const row of byId("list").children) row.setAttribute("aria-selected", String(row.dataset.key === key(sample)));
  drawDetail();
  remember();
}

const wantedText = () => byId("text").value.trim().toLowerCase();

function marked(text) {
  const wanted = wantedText(), node = element("div", { class: "text" });
  if (!wanted) { node.textContent = text; return node; }
  const lower = text.toLowerCase();
  let at = 0;
  for (let next; (next = lower.indexOf(wanted, at)) >= 0 && lower.length === text.length; at = next + wanted.length) {
    node.append(text.slice(at, next), element("mark", {}, text.slice(next, next + wanted.length)));
  }
  node.append(text.slice(at));
  return node;
}

const asText = (value) => (typeof value === "string" ? value : JSON.stringify(value, null, 1));

function turn(message) {
  const tokens = message.tokens === undefined || message.tokens === null ? "" : `, ${message.tokens} tokens of the policy`;
  const reward = message.reward === undefined || message.reward === null ? "" : `, reward ${number(message.reward)}`;
  const node = element("div", { class: tokens ? "turn written" : "turn" }, element("div", { class: "who" }, `${message.role}${tokens}${reward}`));
  if (message.content) node.append(marked(asText(message.content)));
  for (const call of message.tool_calls || []) node.append(marked(asText(call.function || call)));
  return node;
}

function drawDetail() {
  const sample = chosen, node = byId("detail");
  node.replaceChildren();
  if (!sample) { node.append(element("p", { class: "quiet" }, "No response fits the filters.")); return; }
  const part = (title, ...content) => node.append(element("h2", {}, title), ...content);
  const members = groupOf(sample);
  if (members.length > 1) {
    part("responses to this prompt", element("div", { class: "group" }, ...members.map((each) =>
      element("button", { type: "button", "aria-current": String(each === sample), onclick: () => choose(each) },
        each.outcome !== undefined && each.outcome !== "scored" ? each.outcome : number(each.score)))));
  }
  const images = (sample.images || []).filter((name) => name in data.images);
  if (images.length) {
    part(images.length > 1 ? "images" : "image", element("div", { class: "images" }, ...images.map((name, i) =>
      element("img", { src: `data:image/jpeg;base64,${data.images[name]}`, alt: `image ${i + 1}`, title: name }))));
  }
  const colouring = byId("colour").value, coloured = colouring && sample.tokens;
  if (sample.messages) {
    if (coloured) part("tokens", ...drawTokens(sample, colouring, wantedText()));
    part("conversation", ...sample.messages.map(turn));
  } else {
    part("prompt", marked(sample.prompt || ""));
    part("response", ...(coloured ? drawTokens(sample, colouring, wantedText()) : [marked(sample.response || "")]));
  }
  if (sample.ground_truth !== undefined) part("ground truth", marked(sample.ground_truth));
  if (sample.failure_detail) part("why it failed", marked(sample.failure_detail));
  const components = Object.entries(sample.components || {}).map(([name, value]) => [`score: ${name}`, typeof value === "number" ? number(value) : asText(value)]);
  const rows = [["outcome", sample.outcome], ["score", number(sample.score)], ...components, ["reward after KL", sample.reward], ["advantage, mean over tokens", sample.advantage],
    ["response", `${sample.response_length} tokens, ended by ${{ length: "the length limit", stop: "the model" }[sample.finish_reason] || sample.finish_reason}`],
    ["log-prob, engine", sample.rollout_log_prob_sum], ["log-prob, policy before the update", sample.old_log_prob_sum], ["log-prob, reference", sample.ref_log_prob_sum],
    ["weights", `version ${sample.weights_version}`], ["row", sample.source ? `${sample.source}, row ${sample.row}` : sample.row], ["data source", sample.data_source]];
  part("numbers", element("table", { class: "facts-table" }, element("tbody", {}, ...rows.filter(([, value]) => value !== undefined && value !== null && value !== "")
    .map(([name, value]) => element("tr", {}, element("td", {}, name), element("td", {}, typeof value === "number" ? number(value, 6) : value))))));
}

function move(by) {
  if (!found.length) return;
  const next = found[Math.min(found.length - 1, Math.max(0, found.indexOf(chosen) + by))];
  if (found.indexOf(next) >= listed) { listed += LISTED; drawSamples(); }
  choose(next);
  byId("list").querySelector('[aria-selected="true"]')?.scrollIntoView({ block: "nearest" });
}

function nextColour() {
  const select = byId("colour");
  select.selectedIndex = (select.selectedIndex + 1) % select.options.length;
  drawDetail();
}

function showStep(step) {
  const steps = [...new Set(data.samples.map((sample) => sample.step))];
  if (!steps.length) return;
  const near = steps.reduce((best, each) => (Math.abs(each - step) < Math.abs(best - step) ? each : best));
  byId("step").value = String(near);
  filter();
  show("samples");
}

// --- parts, address and keys

function show(part) {
  for (const id of ["curves", "samples"]) byId(`part-${id}`).hidden = id !== part;
  for (const link of document.querySelectorAll("nav a")) link.classList.toggle("current", link.dataset.part === part);
  remember();
}

function remember() {
  const part = byId("part-samples").hidden ? "curves" : "samples";
  const address = part === "samples" && chosen ? `#samples=${key(chosen)}` : `#${part}`;
  if (location.hash !== address) history.replaceState(null, "", address);
}

function recall() {
  const [part, name] = location.hash.slice(1).split("=");
  const wanted = name && data.samples.find((sample) => key(sample) === name);
  if (wanted) chosen = wanted;
  show(part === "samples" ? "samples" : "curves");
  drawSamples();
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.matches("input, select")) { if (event.key === "Escape") event.target.blur(); return; }
  const actions = { c: () => show("curves"), s: () => show("samples"), j: () => move(1), k: () => move(-1),
    t: () => nextColour(),
    "/": () => { show("samples"); byId("text").focus(); } };
  if (byId("list") === document.activeElement) Object.assign(actions, { ArrowDown: () => move(1), ArrowUp: () => move(-1) });
  if (event.key in actions) { event.preventDefault(); actions[event.key](); }
});
for (const link of document.querySelectorAll("nav a")) link.addEventListener("click", (event) => { event.preventDefault(); show(link.dataset.part); });
for (const id of ["step", "kind", "order"]) byId(id).addEventListener("change", filter);
byId("text").addEventListener("input", filter);
byId("colour").addEventListener("change", drawDetail);
byId("filters").addEventListener("submit", (event) => event.preventDefault());
byId("smooth").addEventListener("change", drawCharts);
byId("metric").addEventListener("input", drawCharts);
window.addEventListener("hashchange", recall);

byId("step").append(element("option", { value: "" }, "all"), ...[...new Set(data.samples.map((sample) => sample.step))].map((step) => element("option", { value: step }, String(step))));
byId("metrics").append(...[...new Set(data.runs.flatMap((run) => Object.keys(run.curves.values)))].sort().map((name) => element("option", { value: name })));
byId("colour").append(...Object.entries(COLOURINGS).map(([value, { name }]) => element("option", { value, selected: value === "advantage" }, name)));
byId("colour").parentElement.hidden = !data.samples.some((sample) => sample.tokens);
drawHead();
drawCharts();
found = data.samples;
chosen = found[0] ?? null;
recall();
