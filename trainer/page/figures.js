"use strict";
// Figures of a run. Every function takes what the reader chose (step, layer) and draws anew.

const ARRAYS = {
  uint8: Uint8Array, uint16: Uint16Array, uint32: Uint32Array,
  float32: Float32Array, float64: Float64Array,
};
const OPTIONS = {displayModeBar: false, displaylogo: false, responsive: true};
const LINES = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#c08000", "#4a9bd1", "#8a6fd1", "#7f8790"];
const MOST_DOUBLINGS = 3;  // of the mean, at the ends of the load's colours

function unpacked(packed, index) {
  if (!packed.cache) packed.cache = [];
  if (!packed.cache[index]) {
    const text = atob(packed.data[index]), bytes = new Uint8Array(text.length);
    for (let at = 0; at < text.length; at++) bytes[at] = text.charCodeAt(at);
    packed.cache[index] = new ARRAYS[packed.dtype](bytes.buffer);
  }
  return packed.cache[index];
}

function rowsOf(array, width) {
  const rows = [];
  for (let at = 0; at < array.length; at += width) rows.push(array.subarray(at, at + width));
  return rows;
}

const sum = array => array.reduce((total, value) => total + value, 0);
const most = array => array.reduce((largest, value) => Math.max(largest, value), 0);
const count = value => value.toLocaleString("en");
const range = length => [...Array(length).keys()];
const whole = length => ({tick0: 0, dtick: Math.ceil(length / 16)});  // ticks at whole numbers
const colour = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function draw(element, traces, layout, label) {
  element.setAttribute("role", "img");
  element.setAttribute("aria-label", label);
  const axis = {gridcolor: colour("--line"), zerolinecolor: colour("--line"), automargin: true};
  Plotly.react(element, traces, {
    paper_bgcolor: colour("--paper"), plot_bgcolor: colour("--paper"), height: 320,
    font: {family: "system-ui, sans-serif", size: 12, color: colour("--ink")},
    margin: {l: 56, r: 16, t: 40, b: 44}, hoverlabel: {align: "left"},
    legend: {orientation: "h", x: 0, y: 1.02, yanchor: "bottom"},
    ...layout, xaxis: {...axis, ...layout.xaxis}, yaxis: {...axis, ...layout.yaxis},
  }, OPTIONS);
}

const few_many = () => [[0, colour("--few")], [1, colour("--many")]];
const bar = (title, more = {}) => ({title: {text: title, side: "right"}, thickness: 12, ...more});

function drawLoad(element, run) {
  const rows_LE = rowsOf(unpacked(run.load, run.at), run.experts);
  const ratios_LE = rows_LE.map(rows_E => {
    const mean = sum(rows_E) / run.experts || 1;
    return Float64Array.from(rows_E, rows => rows / mean);
  });
  const ends = 2 ** MOST_DOUBLINGS, labels = [-3, -2, -1, 0, 1, 2, 3];
  const colours = [[0, colour("--low")], [0.5, colour("--middle")], [1, colour("--high")]];
  draw(element, [{
    type: "heatmap", colorscale: colours, zmin: -MOST_DOUBLINGS, zmax: MOST_DOUBLINGS,
    z: ratios_LE.map(row => Array.from(
      row, value => value ? Math.log2(Math.min(ends, Math.max(1 / ends, value))) : null)),
    customdata: ratios_LE.map((row, layer) => Array.from(
      row, (value, expert) => [count(rows_LE[layer][expert]), value.toFixed(2)])),
    hovertemplate: "layer %{y}, expert %{x}<br>%{customdata[0]} rows, " +
      "%{customdata[1]} of the layer's mean<extra></extra>",
    colorbar: bar("rows / mean", {
      tickvals: labels, ticktext: labels.map(at => at < 0 ? `1/${2 ** -at}` : String(2 ** at)),
    }),
  }], {
    height: Math.max(320, Math.min(620, 120 + 9 * run.layers)), plot_bgcolor: colour("--dead"),
    xaxis: {title: {text: "expert"}, showgrid: false, zeroline: false, ...whole(run.experts)},
    yaxis: {title: {text: "layer"}, ...whole(run.layers), autorange: "reversed", showgrid: false, zeroline: false},
    shapes: [{
      type: "rect", x0: -0.5, x1: run.experts - 0.5, y0: run.layer - 0.5, y1: run.layer + 0.5,
      line: {color: colour("--ink"), width: 1.5},
    }],
  }, `Rows of every expert in every layer at step ${run.steps[run.at]}`);
}

function loadText(run) {
  const rows_LE = rowsOf(unpacked(run.load, run.at), run.experts);
  let fullest = {ratio: 0, layer: 0, expert: 0}, dead = 0, violation = 0;
  rows_LE.forEach((rows_E, layer) => {
    const mean = sum(rows_E) / run.experts || 1, ratio = most(rows_E) / mean;
    if (ratio > fullest.ratio) fullest = {ratio, layer, expert: rows_E.indexOf(most(rows_E))};
    dead += rows_E.filter(rows => rows === 0).length;
    violation += (ratio - 1) / run.layers;
  });
  return `Step ${count(run.steps[run.at])}: expert ${fullest.expert} of layer ${fullest.layer} is ` +
    `the fullest, ${fullest.ratio.toFixed(2)} times its layer's mean. Experts without rows: ` +
    `${count(dead)}. MaxVio, mean over layers: ${violation.toFixed(3)}.`;
}

// The newest point of a run, at or before its step, that has the rows of ranks; or the first.
function rankPoint(run) {
  const before = run.ranks.at.filter(at => at <= run.at).length;
  return Math.max(0, before - 1);
}

function rankRatio(packed, point, run) {
  return rowsOf(unpacked(packed, point), run.ranks.ranks).map(
    rows_R => most(rows_R) * run.ranks.ranks / (sum(rows_R) || 1) || 1);
}

const NAMES = {home: "at home (before planning)", planned: "as planned"};

function drawRanks(element, run, state) {
  const point = rankPoint(run), ranks = run.ranks.ranks;
  const traces = Object.entries(NAMES).map(([key, name]) => {
    const rows_R = rowsOf(unpacked(run.ranks[key], point), ranks)[run.layer];
    const mean = sum(rows_R) / ranks || 1;
    return {
      type: "bar", name, x: range(ranks), y: Array.from(rows_R, rows => rows / mean),
      customdata: Array.from(rows_R, count),
      marker: {color: colour(key === "home" ? "--second" : "--first")},
      hovertemplate: `rank %{x}, ${name}<br>%{customdata} rows, %{y:.3f} of the mean<extra></extra>`,
    };
  });
  draw(element, traces, {
    barmode: "group", xaxis: {title: {text: "rank"}, ...whole(ranks)},
    yaxis: {title: {text: "rows / mean"}, range: [0, 1.05 * state.most_rank_ratio]},
  }, `Rows of every rank in layer ${run.layer}, at home and as planned`);
}

function drawRankRatios(element, run, state) {
  const point = rankPoint(run);
  const traces = Object.entries(NAMES).map(([key, name]) => ({
    type: "scatter", mode: "lines+markers", name, x: range(run.layers),
    y: rankRatio(run.ranks[key], point, run),
    line: {color: colour(key === "home" ? "--second" : "--first")},
    hovertemplate: "layer %{x}: %{y:.3f}<extra></extra>",
  }));
  draw(element, traces, {
    xaxis: {title: {text: "layer"}, ...whole(run.layers)},
    yaxis: {title: {text: "max / mean rows of ranks"}, range: [0.95, 1.05 * state.most_rank_ratio]},
  }, "Load ratio of ranks in every layer, at home and as planned");
}

function drawCurves(element, run, chart) {
  const marks = ["--first", "--second"];
  const mine = run.curves.find(each => each.title === chart.title);
  const traces = mine.lines.map((line, at) => ({
    type: "scatter", mode: line.steps.length > 1 ? "lines" : "markers", name: line.name,
    x: line.steps, y: line.values,
    line: {color: colour(marks[at]), width: 2, dash: at ? "dash" : "solid"}, showlegend: true,
    hovertemplate: "step %{x}: %{y:.4g}<extra></extra>",
  }));
  draw(element, traces, {
    height: 270, title: {text: chart.title, font: {size: 13}, x: 0, y: 0.98, yref: "container"},
    margin: {l: 56, r: 16, t: 62, b: 40}, xaxis: {title: {text: "step"}, range: chart.x},
    yaxis: {range: chart.y},
  }, `${chart.title} over steps`);
}

function drawViolations(element, run, state) {
  draw(element, [{
    type: "heatmap", x: run.steps, z: range(run.layers).map(layer => unpacked(run.violation, layer)),
    zmin: 0, zmax: state.most_violation, colorscale: few_many(), colorbar: bar("MaxVio"),
    hovertemplate: "layer %{y}, step %{x}<br>MaxVio %{z:.3f}<extra></extra>",
  }], {
    height: Math.max(300, Math.min(520, 120 + 7 * run.layers)),
    xaxis: {title: {text: "step"}, range: state.step_range, showgrid: false, zeroline: false},
    yaxis: {
      title: {text: "layer"}, ...whole(run.layers), autorange: "reversed", showgrid: false,
      zeroline: false,
    },
  }, "MaxVio of every layer over steps");
}

// Experts that share a colour are one line with gaps: quicker to draw than a line for each.
function drawBias(element, run, state) {
  const bias_PE = rowsOf(unpacked(run.bias, run.layer), run.experts);
  const traces = LINES.map((line, group) => {
    const trace = {
      type: "scatter", mode: bias_PE.length > 1 ? "lines" : "markers", x: [], y: [], customdata: [],
      line: {width: 1.2, color: line}, marker: {color: line},
      hovertemplate: "expert %{customdata}, step %{x}: %{y:.5f}<extra></extra>",
    };
    for (let expert = group; expert < run.experts; expert += LINES.length) {
      run.steps.forEach((step, at) => {
        trace.x.push(step);
        trace.y.push(bias_PE[at][expert]);
        trace.customdata.push(expert);
      });
      for (const values of [trace.x, trace.y, trace.customdata]) values.push(null);
    }
    return trace;
  });
  draw(element, traces, {
    height: 380, showlegend: false, hovermode: "closest",
    xaxis: {title: {text: "step"}, range: state.step_range},
    yaxis: {title: {text: "bias"}, range: state.bias_range(run.layer)},
  }, `Selection bias of every expert of layer ${run.layer} over steps`);
}

function deadTable(run) {
  const table = document.createElement("table");
  table.innerHTML = "<thead><tr><th scope=col>layer</th><th scope=col class=number>number</th>" +
    "<th scope=col>experts without rows, and the recorded step since which</th></tr></thead>";
  const body = table.createTBody();
  for (const layer of range(run.layers)) {
    const found = range(run.experts).map(expert => layer * run.experts + expert)
      .filter(at => unpacked(run.load, run.at)[at] === 0);
    if (!found.length) continue;
    const row = body.insertRow(), named = found.slice(0, 40).map(at => {
      let first = run.at;
      while (first > 0 && unpacked(run.load, first - 1)[at] === 0) first--;
      return `${at % run.experts} (${count(run.steps[first])})`;
    });
    row.insertCell().textContent = layer;
    row.insertCell().textContent = found.length;
    row.cells[1].className = "number";
    const left = found.length - named.length;
    row.insertCell().textContent = named.join(", ") + (left ? ` and ${count(left)} more` : "");
  }
  return body.rows.length ? table : null;
}

function drawMatrix(element, run, state, kind) {
  const layer = Math.min(run.layer, run.routing[kind].data.length - 1);
  const scale = run.routing[kind].largest[layer] / 255;
  const levels_EE = rowsOf(unpacked(run.routing[kind], layer), run.experts);
  const next = kind === "affinity";
  const size = next ? `expert of layer ${layer + 1}` : "also chosen";
  draw(element, [{
    type: "heatmap", z: levels_EE.map(row => Float32Array.from(row, level => level * scale)),
    zmin: 0, zmax: state.most_share(kind, layer), colorscale: few_many(), colorbar: bar("share"),
    hovertemplate: next
      ? `expert %{y} of layer ${layer}, then %{x}: %{z:.1%}<extra></extra>`
      : "expert %{y} with %{x}: %{z:.1%}<extra></extra>",
  }], {
    height: 460, xaxis: {title: {text: size}, showgrid: false, zeroline: false},
    yaxis: {title: {text: `expert of layer ${layer}`}, autorange: "reversed", showgrid: false, zeroline: false},
  }, next ? `Shares of the experts of layer ${layer + 1} after those of layer ${layer}`
    : `Shares of tokens that chose two experts of layer ${layer}`);
}

function domainTable(run) {
  const {names, tokens} = run.routing.domains, shares = unpacked(run.routing.domains, run.layer);
  const table = document.createElement("table"), head = table.createTHead().insertRow();
  const largest = most(shares) || 1;
  for (const [at, text] of ["expert", ...names].entries()) {
    const cell = document.createElement("th");
    cell.scope = "col";
    cell.textContent = at ? `${text} (${count(Math.round(tokens[at - 1]))} tokens)` : text;
    if (at) cell.className = "number";
    head.append(cell);
  }
  const body = table.createTBody();
  for (const expert of range(run.experts)) {
    const row = body.insertRow(), name = document.createElement("th");
    name.scope = "row";
    name.textContent = expert;
    row.append(name);
    for (const domain of range(names.length)) {
      const share = shares[domain * run.experts + expert], cell = row.insertCell();
      cell.className = "number";
      cell.textContent = `${(100 * share).toFixed(1)} %`;
      const part = Math.round(45 * share / largest);
      cell.style.background = `color-mix(in srgb, var(--first) ${part}%, transparent)`;
    }
  }
  return table;
}
