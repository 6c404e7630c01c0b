"use strict";
// The page: sections, the two sliders, scales that all runs share.

const {runs, stats_hint} = JSON.parse(document.getElementById("data").textContent);
const stepInput = document.getElementById("step"), layerInput = document.getElementById("layer");
const steps = [...new Set(runs.flatMap(run => run.steps))].sort((a, b) => a - b);
const routed = runs.filter(run => run.routing), ranked = runs.filter(run => run.ranks);

const state = {
  step_range: [steps[0] - 0.5, steps[steps.length - 1] + 0.5],
  most_rank_ratio: most(ranked.flatMap(run => run.ranks.at.flatMap((_, point) => [
    ...rankRatio(run.ranks.home, point, run), ...rankRatio(run.ranks.planned, point, run)]))),
  most_violation: most(runs.flatMap(
    run => range(run.layers).map(layer => most(unpacked(run.violation, layer))))) || 1,
  bias_range(layer) {
    let low = 0, high = 0;
    for (const run of runs.filter(each => each.bias)) {
      for (const bias of unpacked(run.bias, Math.min(layer, run.layers - 1))) {
        low = Math.min(low, bias);
        high = Math.max(high, bias);
      }
    }
    const edge = 0.05 * (high - low) || 0.001;
    return [low - edge, high + edge];
  },
  most_share(kind, layer) {
    return most(routed.map(run => run.routing[kind].largest[layer] || 0)) || 1;
  },
};

// A chart of metrics, with the ranges of all runs that have it.
function charts() {
  const titles = [...new Set(runs.flatMap(run => run.curves.map(chart => chart.title)))];
  return titles.map(title => {
    const lines = runs.flatMap(run => run.curves.filter(chart => chart.title === title))
      .flatMap(chart => chart.lines);
    const values = lines.flatMap(line => line.values).filter(value => value !== null);
    const low = values.reduce((a, b) => Math.min(a, b), Infinity);
    const high = values.reduce((a, b) => Math.max(a, b), -Infinity);
    const edge = 0.05 * (high - low) || 0.05 * Math.abs(high) || 1;
    const last = most(lines.map(line => most(line.steps)));
    return {title, x: [0, last * 1.02 || 1], y: values.length ? [low - edge, high + edge] : [0, 1]};
  });
}

function make(tag, text, className = "") {
  const element = document.createElement(tag);
  element.textContent = text;
  element.className = className;
  return element;
}

// A box for a figure that is drawn now and whenever one of the sliders in `needs` moves.
const figures = [];
function figure(parent, id, needs, drawn) {
  const element = parent.appendChild(make("div", ""));
  element.id = id;
  figures.push({needs, draw: () => drawn(element)});
}

const need = (has, missing) => run => has(run) ? "" : missing;
const ROUTING = need(run => run.routing, stats_hint);

// id, heading, text, why a run has nothing to show here, content of one run's column
const SECTIONS = [
  ["load", "Load of experts",
    "Rows of every expert against the mean of its layer, in doublings; an expert without rows is " +
    "pink. The step slider above goes through the recorded steps: focus it and use the arrow " +
    "keys. The outlined row is the layer of the layer slider.",
    () => "",
    (box, run, at) => {
      figure(box, `load-${at}`, "step layer", element => drawLoad(element, run));
      const text = box.appendChild(make("p", ""));
      text.id = `load-text-${at}`;
      text.setAttribute("role", "status");
      figures.push({needs: "step", draw: () => { text.textContent = loadText(run); }});
    }],
  ["ranks", "Load of ranks, before and after planning",
    "Rows of the ranks of the first expert-parallel group, summed over the micro-batches of the " +
    "chosen step: of the chosen layer rank by rank, and max / mean of every layer.",
    need(run => run.ranks, "One rank has all experts, so there is nothing to plan."),
    (box, run, at) => {
      const grid = box.appendChild(make("div", "", "charts"));
      figure(grid, `ranks-${at}`, "step layer", element => drawRanks(element, run, state));
      figure(grid, `ratios-${at}`, "step", element => drawRankRatios(element, run, state));
    }],
  ["curves", "Curves", "Metrics of the run; docs/metrics.md says what they mean.",
    need(run => run.curves.length, "No curves: the run has no metrics.jsonl."),
    (box, run, at) => {
      const grid = box.appendChild(make("div", "", "charts"));
      for (const [number, chart] of charts().entries()) {
        if (!run.curves.some(each => each.title === chart.title)) continue;
        figure(grid, `curve-${at}-${number}`, "", element => drawCurves(element, run, chart));
      }
    }],
  ["violation", "MaxVio of every layer", "max / mean - 1 rows per expert, of the global batch.",
    () => "",
    (box, run, at) =>
      figure(box, `violation-${at}`, "", element => drawViolations(element, run, state))],
  ["bias", "Selection biases",
    "A line for every expert of the chosen layer, after each recorded step.",
    need(run => run.bias, "The routers of this run have no selection bias."),
    (box, run, at) => figure(box, `bias-${at}`, "layer", element => drawBias(element, run, state))],
  ["dead", "Dead experts", "Experts without a row at the chosen step.", () => "",
    (box, run, at) => table(box, `dead-${at}`, "step", `Dead experts of ${run.name}`,
      () => deadTable(run) || make("p", "Every expert has rows at this step."))],
  ["coactive", "Experts chosen together",
    "Of the tokens of an expert (row), the share that also chose another (column) of the layer.",
    ROUTING,
    (box, run, at) => figure(box, `coactive-${at}`, "layer",
      element => drawMatrix(element, run, state, "coactive"))],
  ["affinity", "Affinity between consecutive layers",
    "Of the rows that an expert's tokens (row) have in the next layer, the share of each expert " +
    "(column). The last layer shows its predecessor's.",
    run => ROUTING(run) || (run.layers > 1 ? "" : "There is one MoE layer."),
    (box, run, at) => figure(box, `affinity-${at}`, "layer",
      element => drawMatrix(element, run, state, "affinity"))],
  ["domains", "Domains and experts",
    "Share of a domain's rows that each expert of the chosen layer takes; a column adds up to 100 %.",
    run => ROUTING(run) || (run.routing.domains ? "" : "These statistics have no domains."),
    (box, run, at) => table(box, `domains-${at}`, "layer", `Domains and experts of ${run.name}`,
      () => domainTable(run))],
];

function table(box, id, needs, label, made) {
  figure(box, id, needs, element => element.replaceChildren(made()));
  const element = box.lastElementChild;
  element.className = "scroll";
  element.tabIndex = 0;
  element.setAttribute("role", "region");
  element.setAttribute("aria-label", label);
}

function build() {
  for (const [id, heading, text, missing, fill] of SECTIONS) {
    const section = document.getElementById("sections").appendChild(make("section", ""));
    section.append(make("h2", heading), make("p", text, "quiet"));
    section.firstElementChild.id = id;
    section.firstElementChild.tabIndex = -1;
    const columns = section.appendChild(make("div", "", "runs"));
    for (const [at, run] of runs.entries()) {
      const box = columns.appendChild(make("figure", ""));
      if (runs.length > 1) box.append(make("figcaption", run.name));
      const why = missing(run);
      if (why) box.append(make("p", why));
      else fill(box, run, at);
    }
  }
}

function facts() {
  const table = document.createElement("table"), head = table.createTHead().insertRow();
  for (const text of ["", ...runs.map(run => run.name)]) {
    const cell = head.appendChild(make("th", text));
    cell.scope = "col";
  }
  const own = run => ({
    "MoE layers x experts": `${run.layers} x ${run.experts}`,
    "recorded steps": `${run.steps.length}, ${count(run.steps[0])} to ` +
      count(run.steps[run.steps.length - 1]) + (run.torn ? `; ${run.torn} torn, passed over` : ""),
    "routing statistics": run.routing
      ? `${run.routing.file}, ${count(Math.round(run.routing.tokens))} tokens` : "none",
    ...run.facts,
  });
  const columns = runs.map(own), body = table.createTBody();
  for (const key of new Set(columns.flatMap(column => Object.keys(column)))) {
    const row = body.insertRow(), name = row.appendChild(make("th", key));
    name.scope = "row";
    for (const column of columns) row.insertCell().textContent = column[key] || "none yet";
  }
  document.getElementById("facts").append(table);
}

// Read both sliders: a run shows its newest step at or before the chosen one.
function choose() {
  const step = steps[Number(stepInput.value)], layer = Number(layerInput.value);
  for (const run of runs) {
    run.at = Math.max(0, run.steps.filter(each => each <= step).length - 1);
    run.layer = Math.min(layer, run.layers - 1);
  }
  const place = `${count(step)} (${Number(stepInput.value) + 1} of ${steps.length})`;
  document.getElementById("step-text").textContent = place;
  document.getElementById("layer-text").textContent = String(layer);
  stepInput.setAttribute("aria-valuetext", `step ${place}`);
  layerInput.setAttribute("aria-valuetext", `layer ${layer}`);
}

const waiting = new Set();
function redraw(what) {
  choose();
  if (!waiting.size) requestAnimationFrame(() => {
    const moved = [...waiting];
    waiting.clear();
    for (const each of figures) {
      if (moved.some(name => name === "all" || each.needs.includes(name))) each.draw();
    }
  });
  waiting.add(what);
}

// The first drawing, figure by figure, so that the page answers meanwhile.
function open(left) {
  if (!left.length) {
    document.documentElement.dataset.ready = String(Math.round(performance.now()));
    return;
  }
  left[0].draw();
  document.documentElement.dataset.opened ??= String(Math.round(performance.now()));
  setTimeout(() => open(left.slice(1)));
}

stepInput.max = steps.length - 1;
stepInput.value = steps.length - 1;
layerInput.max = most(runs.map(run => run.layers)) - 1;
layerInput.value = 0;
stepInput.addEventListener("input", () => redraw("step"));
layerInput.addEventListener("input", () => redraw("layer"));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => redraw("all"));
if (runs.length > 1) document.querySelector("h1").textContent = `${runs.length} training runs`;
document.documentElement.style.setProperty("--columns", runs.length);
facts();
choose();
build();
open(figures);
