"use strict";
// Draws the figures, curves, memory and bars of a page, and follows runs that are still under way.
const DATA = JSON.parse(document.getElementById("page-data").textContent), {runs, look: LOOK} = DATA, isOne = runs.length === 1;
const GREY = "#8c959f", PLAN = "#bf3989", HELD = "#1f883d", LEFT = 56, RIGHT = 8, TOP = 8, BOTTOM = 22, MAX_PLAIN = 4000;
const view = {axis: "step", isLog: false, range: null, cursor: null, off: new Set(), place: null}, charts = [], smoothed = new WeakMap();
const byId = name => document.getElementById(name), lastOf = values => values.findLast(v => v != null) ?? null;
const put = (tag, props = {}, ...kids) => { const node = Object.assign(document.createElement(tag), props); node.append(...kids); return node; };
const shape = (tag, attrs, text = "") => {
  const node = Object.assign(document.createElementNS("http://www.w3.org/2000/svg", tag), {textContent: text});
  for (const name in attrs) node.setAttribute(name, attrs[name]);
  return node;
};
const number = (v, digits = 4) => {
  if (v == null) return "–";
  const size = Math.abs(v), whole = Math.trunc(size).toString().length;
  if (v && (size < 1e-3 || size >= 1e15)) return (+v.toPrecision(digits)).toExponential();
  return size >= 1e6 ? v.toLocaleString("en", {notation: "compact", maximumSignificantDigits: digits})
    : v.toLocaleString("en", {maximumSignificantDigits: Math.max(digits, whole)});
};
const duration = s => s < 60 ? `${Math.round(s)} s` : s < 3600 ? `${Math.floor(s / 60)} min ${Math.round(s % 60)} s`
  : `${Math.floor(s / 3600)} h ${Math.floor(s % 3600 / 60)} min`;

// First index whose value is at least `v`, of rising values; the index of the nearest one.
const find = (values, v) => {
  let low = 0, high = values.length;
  for (let middle = high >> 1; low < high; middle = (low + high) >> 1) if (values[middle] < v) low = middle + 1; else high = middle;
  return low;
};
const nearest = (values, v, i = find(values, v)) => i && (i === values.length || v - values[i - 1] < values[i] - v) ? i - 1 : i;

// Each value with its neighbours, over 1/20 of the line; gaps only where none is known.
function smooth(ys) {
  if (smoothed.get(ys)?.length === ys.length) return smoothed.get(ys);
  const reach = Math.max(Math.floor(ys.length / 40), 1), sums = [0], counts = [0];
  ys.forEach((y, i) => { sums.push(sums[i] + (y ?? 0)); counts.push(counts[i] + (y !== null)); });
  return smoothed.set(ys, ys.map((_, i) => {
    const low = Math.max(i - reach, 0), high = Math.min(i + reach + 1, ys.length), known = counts[high] - counts[low];
    return known ? (sums[high] - sums[low]) / known : null;
  })).get(ys);
}

// Round numbers, 1, 2 or 5 times a power of ten apart, that span a range; one that is hardly a range is widened.
function ticks(low, high, most = 5) {
  if (!(high - low > 1e-4 * Math.max(Math.abs(low), Math.abs(high)))) {
    const half = 0.1 * Math.abs(high);
    [low, high] = half ? [low - half, high + half] : [0, 1];
  }
  const raw = (high - low) / most, power = Math.floor(Math.log10(raw)), step = [1, 2, 5, 10].find(m => m * 10 ** power >= raw * 0.999), found = [];
  for (let i = Math.floor(low / step / 10 ** power + 1e-9); i <= Math.ceil(high / step / 10 ** power - 1e-9); i++) found.push(Number(`${i * step}e${power}`));
  return found;
}

// Where a step stands on the chosen axis.
function xOf({columns}, step) {
  const steps = columns.step, i = Math.min(find(steps, step), steps.length - 1);
  return view.axis === "step" || i < 0 ? step : step < steps[0] ? 0 : columns[view.axis][i];
}

// A curve of every run: measured values, and beside them their mean.
function curve([field, title, unit, isNoisy, hasZero]) {
  const lines = runs.flatMap((run, i) => {
    const colour = LOOK.colours[i % LOOK.colours.length], ys = run.columns[field] ?? [], xs = run.columns[view.axis], label = isOne ? title.toLowerCase() : run.name;
    const place = {loss: 1, accuracy: 2}[field], evals = place ? run.evals.filter(e => e[place] != null) : [];
    const hasAny = field === "loss" || ys.some(y => y !== null), hasMean = isNoisy && ys.length >= 10 && hasAny;
    return [
      hasAny && ys.length && {label, colour, xs, ys, style: hasMean ? "faint" : "line"},
      hasMean && {label, colour, xs, ys: smooth(ys), style: "line"},
      evals.length && {label: `${label}, held out`, colour: isOne ? LOOK.colours[1] : colour, xs: evals.map(e => xOf(run, e[0])), ys: evals.map(e => e[place]), style: "dots"},
      field === "grad_norm" && run.clip && {label: isOne ? "clipped to" : `${run.name}, clipped to`, colour: GREY, level: run.clip, style: "dash"},
    ];
  });
  return {title, unit, lines: lines.filter(Boolean), hasZero};
}

// One GPU or host: areas by row, a line of what was held, dashes of plan and limit.
function memory() {
  const {run, title} = view.place, {names, bins, label, levels} = run.memory[title], order = Object.keys(LOOK.rows), peak = Math.max(...bins.map(bin => bin[1]));
  const rank = i => (order.indexOf(names[i]) + 1 || order.length + 1), rows = [...names.keys()].sort((a, b) => rank(a) - rank(b));
  const xs = bins.map(bin => xOf(run, bin[0])), lines = [];
  let floor = bins.map(() => 0), unit = "GiB; of neighbouring steps the one that held most";
  for (const row of rows) {
    const values = bins.map(bin => bin[3 + row] ?? 0), ys = values.map((v, i) => floor[i] + v);
    if (!(Math.max(...values) > 0.002 * peak)) continue;
    lines.unshift({label: names[row], colour: LOOK.rows[names[row]] ?? GREY, xs, ys, floor, values, style: "area"});
    if (!view.off.has(names[row])) floor = ys;
  }
  if (bins.some(bin => bin[2])) lines.push({label, colour: HELD, xs, ys: bins.map(bin => bin[2]), style: "line"});
  for (const [name, level] of Object.entries(levels)) {
    if (level > 4 * peak) unit += `; ${name} ${number(level)}, far above`;
    else lines.push({label: name, colour: name.startsWith("plan") ? PLAN : GREY, level, style: "dash"});
  }
  return {title: isOne ? title : `${run.name}, ${title}`, unit, lines, hasZero: true};
}

// Indices to draw: all, or of each pixel the first, the least, the greatest and the last.
function thin({xs, ys}, low, high, px) {
  if (high - low < MAX_PLAIN) return Array.from({length: Math.max(high - low, 0)}, (_, i) => low + i);
  let at = null, group = [];
  const kept = [], flush = () => { kept.push(...new Set(group.sort((a, b) => a - b))); group = []; };
  for (let i = low; i < high; i++) {
    const column = ys[i] === null ? null : Math.round(px(xs[i]));
    if (column !== at || column === null) { flush(); at = column; group = [i, i, i, i]; }
    if (ys[i] < ys[group[1]]) group[1] = i;
    if (ys[i] > ys[group[2]]) group[2] = i;
    group[3] = i;
  }
  flush();
  return kept;
}

class Chart {
  constructor(place, build, height = 230) {
    Object.assign(this, {build, height, caption: put("figcaption"), box: put("div", {className: "view"}), key: put("ul", {className: "key"})});
    this.figure = put("figure", {className: height > 300 ? "plot tall" : "plot"}, this.caption, this.box, this.key);
    place.append(this.figure);
    const ended = act => event => { const from = this.from; this.from = null; act(from, event); };
    Object.assign(this.box, {ondblclick: () => zoom(null), onpointermove: event => this.move(event), onpointercancel: ended(draw)});
    this.box.onpointerleave = () => { if (this.from == null) point(null); };
    this.box.onpointerdown = event => { this.box.setPointerCapture(event.pointerId); this.from = this.valueAt(event); };
    this.box.onpointerup = ended((from, event) => {
      const ends = [from, this.valueAt(event)].sort((a, b) => a - b);
      if (!event.shiftKey && this.px(ends[1]) - this.px(ends[0]) > 6) zoom(ends); else point(view.cursor);
    });
  }

  draw() {
    const {title, unit, lines, hasZero} = this.build(), isLog = view.isLog && this.height < 300, [x0, x1] = this.range = view.range ?? [0, extent()];
    if (this.figure.hidden = !lines.length) return this.box.replaceChildren();
    const width = this.width = this.box.clientWidth || 560, scaled = this.scaled = y => y === null || (isLog && y <= 0) ? null : isLog ? Math.log10(y) : y;
    this.px = x => LEFT + (x - x0) / (x1 - x0) * (width - LEFT - RIGHT);
    const seen = lines.filter(line => !view.off.has(line.label)), known = [];
    for (const {xs, ys} of seen.filter(line => line.ys)) {
      let low = Infinity, high = -Infinity;
      for (let i = find(xs, x0); i < ys.length && xs[i] <= x1; i++) if (scaled(ys[i]) !== null) { low = Math.min(low, ys[i]); high = Math.max(high, ys[i]); }
      if (low <= high) known.push(scaled(low), scaled(high));
    }
    const levels = known.length ? seen.flatMap(line => line.level ?? []).map(scaled) : [], all = known.length ? [...known, ...levels] : [0, 1];
    const margin = (Math.max(...all) - Math.min(...all)) * 0.04, low = hasZero && !isLog ? Math.min(...all, 0) : Math.min(...all) - margin;
    const high = Math.max(...all) + margin, marks = !isLog ? ticks(low, high) : high - low > 1.5 ? ticks(Math.floor(low), Math.ceil(high)).filter(Number.isInteger)
      : ticks(10 ** low, 10 ** high).filter(v => v > 0).map(Math.log10), [least, most] = [Math.min(low, marks[0]), Math.max(high, marks.at(-1))];
    const isTiny = !isLog && marks.some(mark => mark && Math.abs(mark) < 1e-3);  // one notation on an axis
    const place = this.place = v => TOP + (most - v) / (most - least) * (this.height - TOP - BOTTOM);
    const image = shape("svg", {viewBox: `0 0 ${width} ${this.height}`, role: "img"});
    for (const mark of marks) image.append(shape("path", {class: "grid", d: `M${LEFT} ${place(mark)}H${width - RIGHT}`}),
      shape("text", {x: LEFT - 8, y: place(mark) + 4, "text-anchor": "end"}, isTiny && mark ? mark.toExponential() : number(isLog ? +(10 ** mark).toPrecision(9) : mark)));
    const [size, word] = view.axis !== "time" ? [1, view.axis === "step" ? "optimizer step" : "tokens"]
      : [[3600, "hours of training"], [60, "minutes of training"], [1, "seconds of training"]].find(row => x1 - x0 > 2 * row[0] || row[0] === 1);
    for (const mark of ticks(x0 / size, x1 / size, Math.max(Math.min(width / 90, 8), 2))) {
      const x = mark * size, at = this.px(x), anchor = at > width - 40 ? "end" : at < LEFT + 10 ? "start" : "middle";
      if (x >= x0 && x <= x1 * 1.001 && (view.axis !== "step" || Number.isInteger(x))) image.append(shape("text", {x: at, y: this.height - 4, "text-anchor": anchor}, number(mark)));
    }
    const plot = shape("svg", {x: LEFT - 4, y: 0, width: width - LEFT, height: this.height, viewBox: `${LEFT - 4} 0 ${width - LEFT} ${this.height}`});
    this.over = shape("g", {});
    plot.append(...seen.flatMap(line => this.paths(line)), this.over);
    image.append(plot);
    this.named = lines.filter((line, i) => lines.findIndex(other => other.label === line.label) === i);
    image.setAttribute("aria-label", `${title}: ${this.named.map(line => `${line.label} ${this.figureOf(line)}`).join(", ")}`);
    this.box.replaceChildren(image);
    this.caption.replaceChildren(put("b", {}, title), " ", put("span", {}, known.length ? unit : "no finite value was recorded"), put("span", {className: "axis"}, word));
    this.keys = this.named.map(line => {
      const mark = put("i", {className: line.style}), isOn = !view.off.has(line.label), toggle = () => { if (!view.off.delete(line.label)) view.off.add(line.label); draw(); };
      mark.style.color = line.colour;
      return put("button", {type: "button", ariaPressed: isOn, onclick: toggle}, mark, `${line.label} `, put("b", {}, this.figureOf(line)));
    });
    this.key.replaceChildren(...this.keys.map(key => put("li", {}, key)));
  }

  figureOf(line) { return number(line.level ?? lastOf(line.values ?? line.ys)); }

  // A line with its gaps, values between two of them as dots; or an area above the one below it.
  paths(line) {
    const attrs = {class: line.style, stroke: line.colour, "data-name": line.label}, {xs, ys, floor, level} = line, [x0, x1] = this.range;
    const spot = (x, y) => `${this.px(x).toFixed(1)} ${this.place(this.scaled(y)).toFixed(1)}`;
    if (level != null) return [shape("path", {...attrs, d: `M${spot(x0, level)}L${spot(x1, level)}`})];
    const kept = thin(line, Math.max(find(xs, x0) - 1, 0), Math.min(find(xs, x1) + 1, ys.length), this.px);
    if (floor) {
      const edge = kept.length === 1 ? this.range.map(x => [x, kept[0]]) : kept.map(i => [xs[i], i]), way = edge.map(([x, i]) => spot(x, ys[i]));
      return [shape("path", {...attrs, fill: line.colour, d: `M${[...way, ...edge.reverse().map(([x, i]) => spot(x, floor[i]))].join("L")}Z`})];
    }
    let part = [], d = "", dots = "";
    const flush = () => { if (part.length > 1) d += `M${part.join("L")}`; else if (part.length) dots += `M${part[0]}h0`; part = []; };
    for (const i of kept) if (this.scaled(ys[i]) === null) flush(); else part.push(spot(xs[i], ys[i]));
    flush();
    if (line.style === "dots") dots = kept.map(i => `M${spot(xs[i], ys[i])}h0`).join("");
    return [shape("path", {...attrs, d}), shape("path", {...attrs, class: "dot", d: dots})];
  }

  // Marks the measured points at the cursor; there is nothing to read between them.
  show(x) {
    if (this.figure.hidden) return;
    this.over.replaceChildren();
    this.named.forEach((line, i) => {
      let text = this.figureOf(line);
      if (x !== null && line.ys) {
        const at = nearest(line.xs, x), isNear = line.floor || Math.abs(this.px(line.xs[at]) - this.px(x)) < 8, y = isNear ? (line.values ?? line.ys)[at] : null;
        text = number(y);
        if (this.scaled(y ?? null) !== null && !line.floor && !view.off.has(line.label)) this.over.append(shape("path",
          {class: "dot", stroke: line.colour, d: `M${this.px(line.xs[at])} ${this.place(this.scaled(y))}h0`}));
      }
      this.keys[i].lastChild.textContent = text;
    });
    if (x === null) return;
    const at = this.px(x), isLate = at > this.width - 120, ground = this.height - BOTTOM, words = view.axis === "time" ? duration(x) : `${view.axis} ${number(x)}`;
    this.over.prepend(shape("path", {class: "rule", d: `M${at} 0V${ground}`}), shape("text", {class: "at", x: at + (isLate ? -6 : 6), y: 18, "text-anchor": isLate ? "end" : "start"}, words));
    if (this.from != null) this.over.append(shape("rect", {class: "chosen", x: Math.min(at, this.px(this.from)), width: Math.abs(at - this.px(this.from)), height: ground}));
  }

  valueAt(event) {
    const share = (event.clientX - this.box.getBoundingClientRect().left - LEFT) / (this.width - LEFT - RIGHT), [x0, x1] = this.range;
    return x0 + Math.min(Math.max(share, 0), 1) * (x1 - x0);
  }

  move(event) {
    const x = this.valueAt(event), [x0, x1] = this.range, all = runs.map(run => run.columns[view.axis]).filter(xs => xs.length);
    const measured = all.map(xs => xs[nearest(xs, x)]), isMoved = this.from != null && event.shiftKey, by = Math.max(Math.min(this.from - x, extent() - x1), -x0);
    if (isMoved) zoom([x0 + by, x1 + by]); else point(this.from != null || !all.length ? x : measured.reduce((a, b) => Math.abs(b - x) < Math.abs(a - x) ? b : a));
  }
}

const extent = () => Math.max(0, ...runs.flatMap(run => [run.columns[view.axis].at(-1) ?? 0, ...run.evals.slice(-1).map(e => xOf(run, e[0]))])) || 1;
const point = x => { view.cursor = x; for (const chart of charts) if (chart.over) chart.show(x); };
const zoom = range => { view.range = range; draw(); };

// The figures on top: a row of tiles for each run.
function tiles() {
  byId("tiles").replaceChildren(...runs.map((run, i) => {
    const {columns: {step, time, tokens, loss, tokens_per_s: speed}, planned} = run, done = step.at(-1) ?? 0, trained = time.at(-1) ?? 0;
    const recent = time.slice(-50).map((t, j, some) => t - (some[j - 1] ?? time.at(-51) ?? 0)).sort((a, b) => a - b), evals = run.evals.map(e => e[1]).filter(e => e !== null);
    const left = planned && run.state === "running" && done ? (planned - done) * recent[recent.length >> 1] : null;
    const held = (place, name) => Object.values(run.memory).filter(m => m.place === place).map(m => [Math.max(...m.bins.map(b => b[2] ?? b[1])), m]).sort((a, b) => b[0] - a[0])
      .slice(0, 1).map(([gib, m]) => [name, `${number(gib, 3)} GiB`, Object.entries(m.levels).map(([word, level]) => `${word.replace(": peak", "")} ${number(level, 3)}`).join(", ")])[0];
    const found = [
      ["Step", number(done), planned ? `of ${number(planned)}` : ""], ["Loss", number(lastOf(smooth(loss))), done ? `first ${number(loss[0])}` : ""],
      evals.length && ["Held-out loss", number(evals.at(-1)), evals.length > 1 ? `first ${number(evals[0])}, lowest ${number(Math.min(...evals))}` : ""],
      ["Speed", number(lastOf(smooth(speed)), 3), "tokens/s"], left !== null && ["Time left", duration(left), "at the speed of now"],
      ["Trained for", duration(trained), `${number(tokens.at(-1) ?? 0, 3)} tokens`], held("device", "GPU memory"), held("host", "Host memory")].filter(Boolean);
    const dot = put("i", {className: "mark"}), state = put("span", {className: `state ${run.state.split(" ")[0]}`}, run.state);
    dot.style.background = LOOK.colours[i % LOOK.colours.length];
    return put("div", {}, put("div", {className: "run"}, dot, put("b", {}, run.name), " ", state, " ", put("span", {className: "sub"}, run.about)),
      put("progress", {max: planned || done || 1, value: done, ariaLabel: "steps"}),
      put("div", {className: "cards"}, ...found.map(([name, value, note]) => put("div", {className: "tile"}, put("span", {}, name), put("b", {}, value), put("small", {}, note)))),
      ...(run.waits ?? []).map(line => put("p", {className: "waits"}, line)));
  }));
}

// Of a live page: what models answered, and the last lines of their logs.
function words() {
  const asked = {}, entry = (title, text) => put("div", {}, put("small", {}, title), put("p", {}, text));
  for (const run of runs) for (const s of run.samples) (asked[`?${s.prompt}`] ??= [put("p", {className: "prompt"}, s.prompt ?? ""), ...(s.expected ? [entry("the data", s.expected)] : [])]).push(
    entry(`${isOne ? "" : `${run.name}, `}${s.when}${s.step ? `, step ${s.step}` : ""}`, s.answer ?? ""));
  byId("live-answers").replaceChildren(...Object.values(asked).map(parts => put("div", {className: "asked"}, ...parts)));
  byId("live-log").replaceChildren(...runs.filter(run => run.log.length).flatMap(run => [put("h3", {}, run.name), put("pre", {}, run.log.join("\n"))]));
  const isEmpty = {answers: !byId("live-answers").firstChild, memory: !view.place, log: !byId("live-log").firstChild};
  for (const name in isEmpty) for (const e of [byId(name).parentNode, document.querySelector(`[href="#${name}"]`)]) e.hidden = isEmpty[name];
}

function refresh() {
  const known = runs.flatMap(run => Object.entries(run.memory).map(([title, m]) => ({run, title, peak: Math.max(0, ...m.bins.map(b => b[1])), isGpu: m.place === "device"})));
  const old = view.isChosen && known.find(k => k.run === view.place.run && k.title === view.place.title);
  view.place = old || known.reduce((a, b) => !a || b.isGpu > a.isGpu || (b.isGpu === a.isGpu && b.peak > a.peak) ? b : a, null);
  byId("memory-part").hidden = !view.place;
  byId("place").replaceChildren(...known.map((k, i) => put("option", {value: i, selected: k === view.place}, isOne ? k.title : `${k.run.name}, ${k.title}`)));
  byId("place").onchange = event => { Object.assign(view, {place: known[event.target.value], isChosen: true}); draw(); };
  tiles();
  draw();
  if (DATA.live) words();
}

function draw() {
  for (const chart of charts) if (chart.build !== memory || view.place) chart.draw();
  point(view.cursor);
  const isOn = ({axis, log}) => axis ? axis === view.axis : log ? (log === "1") === view.isLog : !view.range;
  for (const button of byId("tools").querySelectorAll("button")) button.ariaPressed = isOn(button.dataset);
}

// Bars that lie beside each other, for what is measured once.
function bars({title, unit, values}) {
  const max = Math.max(...values.map(v => v[1]), 0) || 1;
  return put("figure", {className: "plot"}, put("figcaption", {}, put("b", {}, title), " ", put("span", {}, unit)), ...values.map(([name, value]) =>
    put("div", {className: "bar"}, put("span", {}, name), put("progress", {max, value, ariaLabel: name}), put("b", {}, number(value)))));
}

// Asks for what is new; what a resumed run does again comes with everything else.
async function follow() {
  let wait = 5000;
  try {
    const answer = await fetch(`data?${runs.map(run => `at=${run.token}`).join("&")}`), news = await answer.json();
    news.runs.forEach((fresh, i) => {
      const run = runs[i], [steps, evals, samples, bins] = fresh.starts, join = (old, start, list) => list.length || start !== old.length ? [...old.slice(0, start), ...list] : old;
      const columns = Object.fromEntries(Object.entries(fresh.columns).map(([name, list]) => [name, join(run.columns[name] ?? [], steps, list)]));
      const held = Object.fromEntries(Object.entries(fresh.memory).map(([title, m]) => [title, {...m, bins: join(run.memory[title]?.bins ?? [], bins, m.bins)}]));
      Object.assign(run, fresh, {columns, memory: held, evals: join(run.evals, evals, fresh.evals), samples: join(run.samples, samples, fresh.samples)});
    });
    byId("link").textContent = news.isBehind ? "reading the record …" : "";
    wait = news.isBehind ? 300 : document.hidden ? 10000 : 2000;
    if (!charts.some(chart => chart.from != null)) refresh();
  } catch (error) {
    byId("link").textContent = `The server does not answer; with train --watch it ends with the run (${error.message})`;
  }
  setTimeout(follow, wait);
}

byId("bars").replaceChildren(...DATA.bars.map(bars));
if (runs.length) {
  charts.push(...LOOK.curves.map(row => new Chart(byId("curves"), () => curve(row))), new Chart(byId("memory-chart"), memory, 340));
  byId("tools").onclick = ({target: {dataset: {axis, log, whole}}}) => {
    Object.assign(view, axis && {axis, range: null, cursor: null}, log && {isLog: log === "1"}, whole && {range: null});
    draw();
  };
  onresize = draw;
  refresh();
}
if (DATA.live) follow();
