// Draws the charts and answers to the pointer, the keys, the legend and the choice of the axis.
(() => {
  "use strict";
  const page = JSON.parse(document.getElementById("report-data").textContent);
  const charts = [...document.querySelectorAll("[data-chart]")].map(element => ({
    element, panels: page.charts[element.dataset.chart], drawn: null, range: null,
  }));
  const follows = chart => Object.keys(chart.panels).length > 1;  // the choice of the axis
  const curve = charts.find(follows);
  const axes = [...document.querySelectorAll("[name=axis]")];
  const legend = [...document.querySelectorAll("[data-schedule]")];
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const state = {axis: axes.length ? axes[0].value : "", range: null, hidden: new Set()};

  // --- data ---

  const decoded = {};
  function rows(name) {
    if (!(name in decoded)) {
      const columns = Object.entries(page.datasets[name]).map(([key, column]) => [key, Array.isArray(column)
        ? column : column.stretches.flatMap(([value, times]) => Array(times).fill(value))]);
      decoded[name] = columns[0][1].map((_, i) => Object.fromEntries(columns.map(([key, all]) => [key, all[i]])));
    }
    return decoded[name];
  }

  const axisOf = chart => follows(chart) ? state.axis : Object.keys(chart.panels)[0];
  const panelOf = chart => chart.panels[axisOf(chart)];

  // What the pointer can find, and what the vertical axis fits.
  function points(chart) {
    const axis = axisOf(chart);
    return panelOf(chart).data.flatMap(([name, x]) => rows(name)
      .filter(row => (row.axis ?? axis) === axis && row.y !== null && !state.hidden.has(row.schedule))
      .map(row => ({x: row[x], y: row.y, row})));
  }

  // --- drawing ---

  // Domains, ticks and number formats become signals, so that a zoom is a change of values, not a new chart.
  function movable(chart) {
    return vega => {
      const signals = chart.signals = {};
      const signal = (name, value) => { signals[name] = value; return {signal: name}; };
      for (const scale of vega.scales) {
        if (scale.name !== "x" && scale.name !== "y") continue;
        scale.domain = signal(`${scale.name}_domain`, scale.domain);
        scale.zero = false;  // else a part that begins later would begin at 0
      }
      for (const axis of vega.axes) {
        if (Array.isArray(axis.values)) axis.values = signal(`${axis.scale}_ticks`, axis.values);
        if (axis.format) axis.format = signal(`${axis.scale}_format`, axis.format);
      }
      vega.signals = [...(vega.signals ?? []), ...Object.entries(signals).map(([name, value]) => ({name, value}))];
      return vega;
    };
  }

  async function draw(chart, scheme) {
    const {element} = chart;
    if (chart.drawn) chart.drawn.finalize();
    chart.drawn = null;
    try {
      const {spec} = panelOf(chart);
      const names = new Set(spec.layer.map(layer => layer.data.name));
      const title = spec.layer[0].encoding.x.title;
      element.setAttribute("aria-label", `${element.dataset.title} over ${title}. ${element.dataset.words}`);
      chart.drawn = await vegaEmbed(element, {
        ...spec,
        datasets: Object.fromEntries([...names].map(name => [name, rows(name)])),
        width: "container",
        autosize: {type: "fit-x", contains: "padding"},
        params: [{...page.parameter, value: [...state.hidden]}],
        description: element.getAttribute("aria-label"),
      }, {mode: "vega-lite", actions: false, renderer: "svg", config: page.config[scheme], patch: movable(chart)});
      if (rangeOf(chart)) await move(chart);
    } catch (error) {
      console.error(element.dataset.chart, error);
      element.innerHTML = "<p class='failed'>This chart could not be drawn. It is an image in the folder figures.</p>";
    }
  }

  let turn = Promise.resolve();
  function redraw(some) {
    document.body.dataset.charts = "drawing";
    turn = turn.then(async () => {
      const scheme = dark.matches ? "dark" : "light";
      for (const chart of some) {
        await draw(chart, scheme);
        await new Promise(resolve => setTimeout(resolve));  // the page answers in between
      }
      document.body.dataset.drawn = Math.round(performance.now());  // milliseconds since the page was asked for
      document.body.dataset.charts = scheme;
    });
  }

  // --- zoom ---

  const encoding = (chart, channel) => panelOf(chart).spec.layer[0].encoding[channel];
  const isLog = (chart, channel) => encoding(chart, channel).scale.type === "log";
  const whole = (chart, channel) => encoding(chart, channel).scale.domain;
  const rangeOf = chart => follows(chart) ? state.range : chart.range;
  const spaceOf = log => log ? [Math.log, Math.exp] : [Number, Number];

  function setRange(chart, range) {
    if (follows(chart)) state.range = range;
    else chart.range = range;
    (follows(chart) ? charts.filter(follows) : [chart]).forEach(move);
    show();
  }

  async function move(chart) {
    if (!chart.drawn) return;
    const {view} = chart.drawn;
    const range = rangeOf(chart);
    const x = range ?? whole(chart, "x");
    const y = range ? fitted(chart, x) : whole(chart, "y");
    const size = {x: panelOf(chart).size, y: 1};
    for (const [channel, domain] of Object.entries({x, y})) {
      const set = (name, value) => { if (name in chart.signals) view.signal(name, value); };
      set(`${channel}_domain`, domain);
      set(`${channel}_ticks`, range
        ? ticks(chart.signals[`${channel}_ticks`] ?? [], domain, size[channel]) : chart.signals[`${channel}_ticks`]);
      set(`${channel}_format`, range ? `.${decimals(domain[1] - domain[0])}f` : chart.signals[`${channel}_format`]);
    }
    await view.runAsync();
  }

  function fitted(chart, [low, high]) {
    const inside = points(chart).filter(({x}) => low <= x && x <= high).map(({y}) => y);
    if (!inside.length) return whole(chart, "y");
    const log = isLog(chart, "y");
    const [to, from] = spaceOf(log);
    const [least, most] = [Math.min(...inside), Math.max(...inside)].map(to);
    const margin = 0.08 * (most - least) || 0.02 * (log ? 1 : Math.abs(most) || 1);
    return [from(least - margin), from(most + margin)];
  }

  // The given ones inside the domain; where they are too few, round multiples of the axis's unit.
  function ticks(given, [low, high], size) {
    const inside = given.filter(value => low <= value && value <= high);
    if (inside.length > 2) return inside;
    const rough = (high - low) / size / 5;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map(multiple => multiple * power).find(multiple => multiple >= rough) * size;
    const first = Math.ceil(low / step);
    return Array.from({length: Math.floor(high / step) - first + 1}, (_, i) => Number(((first + i) * step).toPrecision(12)));
  }

  const decimals = span => span > 0.5 ? 1 : span > 0.05 ? 2 : span > 0.01 ? 3 : 4;

  // By a factor about its middle, and by a share of itself to the side, inside the whole.
  function stepped(chart, factor, shift) {
    const [to, from] = spaceOf(isLog(chart, "x"));
    const [start, end] = whole(chart, "x").map(to);
    const [low, high] = (rangeOf(chart) ?? whole(chart, "x")).map(to);
    const width = Math.min(Math.max((high - low) * factor, (end - start) / 1000), end - start);
    const middle = (low + high) / 2 + shift * (high - low);
    const left = Math.min(Math.max(middle - width / 2, start), end - width);
    return width >= (end - start) * 0.999 ? null : [from(left), from(left + width)];
  }

  const zooms = {
    in: chart => setRange(chart, stepped(chart, 0.5, 0)),
    out: chart => setRange(chart, stepped(chart, 2, 0)),
    left: chart => setRange(chart, stepped(chart, 1, -0.3)),
    right: chart => setRange(chart, stepped(chart, 1, 0.3)),
    whole: chart => setRange(chart, null),
  };
  const keys = {
    "+": "in", "=": "in", "-": "out", "_": "out", ArrowLeft: "left", ArrowRight: "right", 0: "whole", Escape: "whole",
  };

  // --- pointer ---

  const tip = document.createElement("div");
  const spot = document.createElement("div");
  const brush = document.createElement("div");
  for (const [element, name] of [[tip, "tip"], [spot, "spot"], [brush, "brush"]]) {
    element.className = name;
    element.hidden = true;
    element.ariaHidden = "true";
    document.body.append(element);
  }

  // Where the plot lies in the window.
  function plot(chart) {
    const {view} = chart.drawn;
    const box = chart.element.querySelector("svg").getBoundingClientRect();
    const [left, top] = view.origin();
    const padding = view.padding();
    return {
      x: box.x + left + (padding.left ?? padding), y: box.y + top + (padding.top ?? padding),
      width: view.width(), height: view.height(),
    };
  }

  function place(element, x, y, width = 0, height = 0) {
    element.hidden = false;
    element.style.transform = `translate(${x + scrollX}px, ${y + scrollY}px)`;
    if (width) Object.assign(element.style, {width: `${width}px`, height: `${height}px`});
  }

  const number = value => value.toLocaleString("en", {maximumSignificantDigits: 5});

  function hover(chart, event) {
    const area = plot(chart);
    const [x, y] = ["x", "y"].map(name => chart.drawn.view.scale(name));
    let nearest = null, least = 40 ** 2;  // pixels
    for (const found of points(chart)) {
      const [left, top] = [x(found.x), y(found.y)];
      if (left < -1 || left > area.width + 1 || top < -1 || top > area.height + 1) continue;
      const distance = (area.x + left - event.clientX) ** 2 + (area.y + top - event.clientY) ** 2;
      if (distance < least) [nearest, least] = [{...found, left, top}, distance];
    }
    if (!nearest) return leave();
    const {row} = nearest;
    const panel = panelOf(chart);
    const lines = [[panel.x, number(nearest.x)], [panel.y, number(nearest.y)]];
    if (row.seeds !== undefined) lines.push(["seeds", row.seeds]);
    const head = document.createElement("b");
    head.textContent = row.run ?? row.schedule;
    tip.replaceChildren(head, ...lines.map(([name, value]) => {
      const line = document.createElement("div");
      const label = document.createElement("span");
      label.textContent = name;
      line.append(label, String(value));
      return line;
    }));
    place(spot, area.x + nearest.left, area.y + nearest.top);
    spot.style.background = `var(--c${legend.findIndex(button => button.dataset.schedule === row.schedule)})`;
    place(tip, 0, 0);
    const {offsetWidth: width, offsetHeight: height} = tip;
    const side = event.clientX + 16 + width > innerWidth ? Math.max(event.clientX - 16 - width, 4) : event.clientX + 16;
    place(tip, side, event.clientY + 16 + height > innerHeight ? event.clientY - 16 - height : event.clientY + 16);
  }

  function leave() {
    tip.hidden = spot.hidden = true;
  }

  document.addEventListener("pointerdown", leave, {capture: true});
  for (const chart of charts) {
    const {element} = chart;
    let start = null;
    const inside = event => {
      const area = plot(chart);
      return Math.min(Math.max(event.clientX - area.x, 0), area.width);
    };
    element.addEventListener("pointerdown", event => {
      if (!chart.drawn || event.button !== 0) return;
      start = inside(event);
      element.setPointerCapture(event.pointerId);
      hover(chart, event);
    });
    element.addEventListener("pointermove", event => {
      if (!chart.drawn) return;
      if (start === null) return hover(chart, event);
      const area = plot(chart), end = inside(event);
      if (Math.abs(end - start) < 6) return;
      leave();
      place(brush, area.x + Math.min(start, end), area.y, Math.abs(end - start), area.height);
    });
    element.addEventListener("pointerup", event => {
      if (start !== null && !brush.hidden) {
        const scale = chart.drawn.view.scale("x");
        const ends = [start, inside(event)].sort((a, b) => a - b).map(pixel => scale.invert(pixel));
        if (ends[0] < ends[1]) setRange(chart, ends);
      }
      start = null;
      brush.hidden = true;
    });
    element.addEventListener("pointercancel", () => { start = null; brush.hidden = true; leave(); });
    element.addEventListener("pointerleave", event => {
      if (event.pointerType !== "touch") leave();  // a finger leaves at once: what it tapped stays until the next tap
    });
    element.addEventListener("dblclick", () => setRange(chart, null));
    element.parentElement.addEventListener("keydown", event => {
      const zoom = zooms[keys[event.key]];
      if (zoom && !event.ctrlKey && !event.metaKey && !event.altKey) zoom(chart);
    });
  }

  // --- controls and address ---

  // The controls say what is shown, and so does the address, which can be passed on.
  function show() {
    for (const radio of axes) radio.checked = radio.value === state.axis;
    for (const button of legend) button.ariaPressed = String(!state.hidden.has(button.dataset.schedule));
    for (const button of document.querySelectorAll("[data-zoom]:not([data-zoom=in])")) {
      button.ariaDisabled = String(state.range === null);
    }
    const said = new URLSearchParams();
    if (axes.length && state.axis !== axes[0].value) said.set("axis", state.axis);
    if (state.range) state.range.forEach((end, i) => said.set(["from", "to"][i], end.toPrecision(6)));
    for (const name of state.hidden) said.append("hide", name);
    if (String(said) || location.hash.includes("=")) history.replaceState(null, "", `#${said}`);
  }

  function read() {
    const said = new URLSearchParams(location.hash.slice(1));
    if (axes.some(radio => radio.value === said.get("axis"))) state.axis = said.get("axis");
    state.hidden = new Set(said.getAll("hide").filter(name => legend.some(button => button.dataset.schedule === name)));
    const range = ["from", "to"].map(name => Number(said.get(name)));
    if (curve && said.has("to") && 0 <= range[0] && range[0] < range[1] && range[1] <= whole(curve, "x")[1]) state.range = range;
  }

  function refilter() {
    show();
    for (const chart of charts.filter(chart => chart.drawn)) {
      chart.drawn.view.signal(page.parameter.name, [...state.hidden]);
      move(chart);
    }
  }

  for (const radio of axes) {
    radio.addEventListener("change", () => {
      [state.axis, state.range] = [radio.value, null];
      show();
      redraw(charts.filter(follows));
    });
  }
  for (const button of document.querySelectorAll("[data-zoom]")) {
    button.addEventListener("click", () => zooms[button.dataset.zoom](curve));
  }
  for (const button of legend) {
    button.addEventListener("click", () => {
      if (!state.hidden.delete(button.dataset.schedule)) state.hidden.add(button.dataset.schedule);
      refilter();
    });
  }
  for (const button of document.querySelectorAll("[data-every]")) {
    button.addEventListener("click", () => {
      state.hidden = new Set(button.dataset.every === "hide" ? legend.map(one => one.dataset.schedule) : []);
      refilter();
    });
  }
  dark.addEventListener("change", () => redraw(charts));
  read();
  document.querySelector(".controls").hidden = false;
  show();
  redraw(charts);
})();
