// The explore page. tools/explore.py writes DATA.

const COLOURS = ["#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#994f00", "#44aa99", "#882255",
  "#999933", "#117733", "#332288"]; // for categories
const RAMP = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]]; // viridis
const UNKNOWN = "#c4cad1";

const sids = DATA.sids;
const rowOf = new Map(sids.map((sid, row) => [sid, row]));
const maps = DATA.maps.map((map) => ({ name: map.name, places: unpack(map.places) }));
const labels = DATA.labels.map((label) => ({ ...label, values: unpack(label.values) }));
const nearest = unpack(DATA.nearest);
const perPatient = DATA.nearest.shape[1];
const telling = DATA.telling && { count: DATA.telling.places.shape[1], healthy: DATA.telling.healthy,
  places: unpack(DATA.telling.places), scores: unpack(DATA.telling.scores) };
const importance = new Map(DATA.importance.map((one) => [one.label, unpack(one.values)]));
const sides = DATA.sides.map((side) => ({ ...side, places: unpack(side.places) }));
const pictures = unpack(DATA.pictures.known);
const state = { map: maps[0], label: null, chosen: -1 };

const number = (value) => (Number.isInteger(value) ? String(value) : Number(value.toPrecision(4)).toString());

function ramp(share) {
  const at = Math.min(Math.max(share, 0), 1) * (RAMP.length - 1), low = Math.min(Math.floor(at), RAMP.length - 2);
  const mixed = RAMP[low].map((value, i) => Math.round(value + (RAMP[low + 1][i] - value) * (at - low)));
  return `rgb(${mixed})`;
}

/** The label of a subject as text. */
function text(label, row) {
  const value = label.values[row];
  if (Number.isNaN(value)) return "unknown";
  return label.names ? label.names[value] : number(value);
}

function colour(label, row) {
  if (!label || Number.isNaN(label.values[row])) return label ? UNKNOWN : COLOURS[0];
  if (label.names) return COLOURS[label.values[row] % COLOURS.length];
  return ramp((label.values[row] - label.low) / (label.high - label.low || 1));
}

/** Set a canvas to the resolution of the screen; returns its context and its size in CSS pixels. */
function sharp(canvas, height) {
  const scale = window.devicePixelRatio || 1, width = canvas.clientWidth;
  if (height) canvas.style.height = `${height}px`;
  const tall = canvas.clientHeight;
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(tall * scale);
  const context = canvas.getContext("2d");
  context.scale(scale, scale);
  context.clearRect(0, 0, width, tall);
  return { context, width, height: tall };
}

// ------------------------------------------------------------ the map

const points = { x: new Float32Array(sids.length), y: new Float32Array(sids.length) };

function drawMap() {
  const { context, width, height } = sharp(byId("map"));
  const places = state.map.places, low = [Infinity, Infinity], high = [-Infinity, -Infinity];
  for (let i = 0; i < places.length; i++) {
    low[i % 2] = Math.min(low[i % 2], places[i]);
    high[i % 2] = Math.max(high[i % 2], places[i]);
  }
  const radius = sids.length > 3000 ? 2.2 : sids.length > 500 ? 3 : 4.5, edge = 16;
  context.globalAlpha = sids.length > 3000 ? 0.7 : 0.85;
  // Draw subjects without a label first, below the others.
  const known = (row) => !state.label || !Number.isNaN(state.label.values[row]);
  for (const pass of [false, true]) {
    for (let row = 0; row < sids.length; row++) {
      if (known(row) !== pass) continue;
      points.x[row] = edge + ((places[2 * row] - low[0]) / (high[0] - low[0] || 1)) * (width - 2 * edge);
      points.y[row] = height - edge - ((places[2 * row + 1] - low[1]) / (high[1] - low[1] || 1)) * (height - 2 * edge);
      context.fillStyle = colour(state.label, row);
      context.beginPath();
      context.arc(points.x[row], points.y[row], radius, 0, 7);
      context.fill();
    }
  }
  context.globalAlpha = 1;
  if (state.chosen < 0) return;
  const ring = (row, size, style) => {
    context.strokeStyle = style;
    context.lineWidth = 2;
    context.beginPath();
    context.arc(points.x[row], points.y[row], size, 0, 7);
    context.stroke();
  };
  for (let i = 0; i < perPatient; i++) ring(nearest[state.chosen * perPatient + i], radius + 2, "#1d2733");
  ring(state.chosen, radius + 5, "#c2185b");
}

function drawLegend() {
  const label = state.label, legend = byId("legend");
  if (!label) return legend.replaceChildren();
  const parts = [];
  if (label.names) {
    label.names.forEach((name, i) => {
      const swatch = element("span", { className: "swatch" });
      swatch.style.background = COLOURS[i % COLOURS.length];
      parts.push(element("span", {}, swatch, name));
    });
  } else {
    const bar = element("span", { className: "bar" });
    bar.style.background = `linear-gradient(90deg, ${RAMP.map((rgb) => `rgb(${rgb})`)})`;
    parts.push(`${label.name}: ${number(label.low)}`, bar, number(label.high));
  }
  if (label.values.some(Number.isNaN)) {
    const swatch = element("span", { className: "swatch" });
    swatch.style.background = UNKNOWN;
    parts.push(element("span", {}, swatch, "unknown"));
  }
  legend.replaceChildren(...parts);
}

/** The subject under the pointer, or -1. */
function patientAt(event) {
  const box = byId("map").getBoundingClientRect(), x = event.clientX - box.left, y = event.clientY - box.top;
  let best = -1, least = 14 * 14;
  for (let row = 0; row < sids.length; row++) {
    const distance = (points.x[row] - x) ** 2 + (points.y[row] - y) ** 2;
    if (distance < least) [best, least] = [row, distance];
  }
  return best;
}

// ------------------------------------------------------------ a subject

function picture(row) {
  return element("img", { src: `${DATA.pictures.folder}/${encodeURIComponent(sids[row])}.png`, loading: "lazy",
    alt: `patches of ${sids[row]}`, onerror() { this.remove(); } });
}

function link(row) {
  return element("button", { className: "patient", textContent: sids[row], onclick: () => choose(row) });
}

function table(heads, rows) {
  const cells = (kind, row) => row.map((cell, i) => element(kind, { className: i ? "number" : "" }, cell));
  return element("table", {}, element("tr", {}, ...cells("th", heads)),
    ...rows.map((row) => element("tr", {}, ...cells("td", row))));
}

function choose(row) {
  state.chosen = row;
  byId("chosen").textContent = `Subject ${sids[row]}`;
  byId("picture").replaceChildren(...(pictures[row] ? [picture(row)] : []));
  byId("values").replaceChildren(...(labels.length ? [table(["label", ""],
    labels.map((label) => [label.name, text(label, row)]))] : []));
  const found = [];
  if (telling) {
    const rows = [];
    for (let i = 0; i < telling.count; i++) {
      const at = row * telling.count + i;
      rows.push([`location ${telling.places[at]}`, telling.scores[at].toFixed(2)]);
    }
    found.push(element("h3", {}, `Locations that differ most from ${telling.healthy}`),
      element("p", { className: "soft" }, "A score of 1 is usual. Circles below mark these locations."),
      table(["location", "score"], rows));
  }
  byId("unusual").replaceChildren(...found);
  byId("nearest-title").hidden = false;
  const near = [];
  for (let i = 0; i < perPatient; i++) {
    const other = nearest[row * perPatient + i], shown = element("div", {}, link(other));
    if (state.label) shown.append(element("span", { className: "soft" }, ` ${text(state.label, other)}`));
    if (pictures[other]) shown.append(picture(other));
    near.push(shown);
  }
  byId("nearest").replaceChildren(...near);
  drawMap();
  drawSides();
}

// ------------------------------------------------------------ locations

const backgrounds = sides.map((side) => {
  if (!side.image) return null;
  const image = new Image();
  image.onload = drawSides;
  image.src = side.image;
  return image;
});

function drawSides() {
  const values = state.label && importance.get(state.label.name);
  const most = values ? Math.max(...values.filter((value) => !Number.isNaN(value))) : 0;
  const about = byId("where-text");
  if (!values) {
    about.textContent = importance.size
      ? "Colour the map by a numeric label to see how well each location alone predicts it."
      : DATA.without;
  } else if (most <= 0) {
    about.textContent = `No single location predicts ${state.label.name} better than its mean over the subjects.`;
  } else {
    about.textContent = `How well the features of each location alone predict ${state.label.name}: cross-validated R², ` +
      `from 0 (dark) to ${most.toFixed(2)} (bright).`;
  }
  sides.forEach((side, n) => {
    const canvas = byId("sides").children[n].querySelector("canvas");
    const wide = canvas.clientWidth;
    const { context, width, height } = sharp(canvas, Math.round(wide / side.shape));
    if (backgrounds[n]?.complete) context.drawImage(backgrounds[n], 0, 0, width, height);
    const order = Array.from({ length: side.places.length / 2 }, (_, i) => i);
    if (values) order.sort((a, b) => (values[a] || 0) - (values[b] || 0)); // best predictor on top
    for (const place of order) {
      const x = side.places[2 * place] * width, y = side.places[2 * place + 1] * height;
      const told = values && !Number.isNaN(values[place]) && most > 0;
      context.fillStyle = told ? ramp(values[place] / most) : "#8a97a5";
      context.globalAlpha = told ? 0.9 : 0.5;
      context.beginPath();
      context.arc(x, y, 3.5, 0, 7);
      context.fill();
    }
    context.globalAlpha = 1;
    if (telling && state.chosen >= 0) {
      for (let i = 0; i < telling.count; i++) {
        const place = telling.places[state.chosen * telling.count + i];
        context.strokeStyle = "#c2185b";
        context.lineWidth = 2;
        context.beginPath();
        context.arc(side.places[2 * place] * width, side.places[2 * place + 1] * height, 7, 0, 7);
        context.stroke();
      }
    }
    context.fillStyle = "#5b6876";
    context.font = "13px sans-serif";
    const [left, right, top, bottom] = side.letters || "    ";
    context.fillText(left, 2, height / 2);
    context.fillText(right, width - 12, height / 2);
    context.fillText(top, width / 2, 12);
    context.fillText(bottom, width / 2, height - 3);
  });
}

// ------------------------------------------------------------ start

function start() {
  byId("about").textContent = DATA.about;
  byId("which").append(...maps.map((map) => element("option", { textContent: map.name })));
  byId("colour").append(element("option", { textContent: "none", value: "" }),
    ...labels.map((label) => element("option", { textContent: label.name, value: label.name })));
  byId("sids").append(...sids.slice(0, 2000).map((sid) => element("option", { value: sid })));
  for (const side of sides) {
    byId("sides").append(element("div", {}, element("p", { className: "soft" }, side.name), element("canvas")));
  }
  byId("which").onchange = (event) => {
    state.map = maps.find((map) => map.name === event.target.value);
    drawMap();
  };
  byId("colour").onchange = (event) => {
    state.label = labels.find((label) => label.name === event.target.value) || null;
    drawLegend();
    if (state.chosen >= 0) choose(state.chosen);
    else {
      drawMap();
      drawSides();
    }
  };
  byId("search").onchange = (event) => {
    const row = rowOf.get(event.target.value.trim());
    byId("missing").textContent = row === undefined && event.target.value ? `no subject ${event.target.value}` : "";
    if (row !== undefined) choose(row);
  };
  const map = byId("map"), tip = byId("tip");
  map.onclick = (event) => {
    const row = patientAt(event);
    if (row >= 0) choose(row);
  };
  map.onmousemove = (event) => {
    const row = patientAt(event);
    tip.style.display = row < 0 ? "none" : "block";
    if (row < 0) return;
    tip.textContent = state.label ? `${sids[row]}: ${text(state.label, row)}` : sids[row];
    tip.style.left = `${event.clientX + 12}px`;
    tip.style.top = `${event.clientY + 12}px`;
  };
  map.onmouseleave = () => { tip.style.display = "none"; };
  if (!sides.length) byId("where").hidden = !DATA.without;
  if (labels.length) {
    byId("colour").value = labels[0].name;
    state.label = labels[0];
  }
  drawLegend();
  drawMap();
  drawSides();
  window.onresize = () => {
    drawMap();
    drawSides();
  };
  document.body.dataset.ready = "yes";
}

start();
