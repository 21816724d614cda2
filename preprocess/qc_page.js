// Script of the page of all subjects. preprocess/qc_page.py provides DATA.

const AT_ONCE = 60, BINS = 24;
const sids = DATA.sids, figures = DATA.figures.map((figure) => ({ title: figure.title, values: unpack(figure.values) }));
const scores = unpack(DATA.scores), pictures = unpack(DATA.pictures.known);
const texts = sids.map((sid, row) => `${sid} ${DATA.reasons[row]}`.toLowerCase());
const kind = sids.map((_, row) => {
  if (DATA.status[row] !== "ok") return DATA.status[row];
  return scores[row] > DATA.strange || DATA.reasons[row] ? "odd" : "plain";
});
const state = { order: sids.map((_, row) => row), sorted: "score", down: true, shown: 0, range: null };
const COLUMNS = [
  { title: "subject", key: (row) => sids[row] },
  { title: "status", key: (row) => DATA.status[row] },
  { title: "score", key: (row) => scores[row] },
  { title: "reasons", key: (row) => DATA.reasons[row] },
  ...figures.map((figure) => ({ title: figure.title, key: (row) => figure.values[row], figure })),
];

const number = (value) => (Number.isNaN(value) ? "" : String(Number(value.toPrecision(4))));

// ------------------------------------------------------------ the table

function rowOf(row) {
  const picture = element("td");
  if (pictures[row]) {
    const source = `${DATA.pictures.folder}/${encodeURIComponent(sids[row])}.png`;
    picture.append(element("a", { href: source, target: "_blank" },
      element("img", { src: source, loading: "lazy", alt: `patches of ${sids[row]}` })));
  }
  return element("tr", { className: { failed: "bad", odd: "odd" }[kind[row]] || "" },
    element("td", {}, sids[row]),
    kind[row] === "odd" ? element("td", { className: "look" }, "ok, but check")
      : element("td", { className: DATA.status[row] }, DATA.status[row]),
    element("td", { className: "number" }, scores[row] >= 500 ? "" : scores[row].toFixed(1)),
    element("td", { className: "reasons" }, DATA.reasons[row]),
    picture, ...figures.map((figure) => element("td", { className: "number" }, number(figure.values[row]))));
}

function extend() {
  const next = state.order.slice(state.shown, state.shown + AT_ONCE);
  byId("rows").append(...next.map(rowOf));
  state.shown += next.length;
  byId("more").hidden = state.shown >= state.order.length;
}

function refresh() {
  const wanted = byId("search").value.trim().toLowerCase(), show = byId("show").value, range = state.range;
  const column = COLUMNS.find((one) => one.title === state.sorted), sign = state.down ? -1 : 1;
  const keys = sids.map((_, row) => column.key(row));
  const missing = (key) => key === "" || Number.isNaN(key);
  state.order = sids.map((_, row) => row).filter((row) => (!wanted || texts[row].includes(wanted)) &&
    (!show || kind[row] === show) &&
    (!range || (range.values[row] >= range.low && range.values[row] <= range.high)));
  state.order.sort((a, b) => {
    if (missing(keys[a]) || missing(keys[b])) return missing(keys[a]) - missing(keys[b]) || a - b;
    return sign * (keys[a] > keys[b] ? 1 : keys[a] < keys[b] ? -1 : 0) || a - b;
  });
  for (const head of byId("heads").children) {
    head.className = head.dataset.title === state.sorted ? (state.down ? "down" : "up") : "";
  }
  byId("rows").replaceChildren();
  state.shown = 0;
  byId("count").textContent = `${state.order.length} of ${sids.length} subjects`;
  byId("clear").hidden = !range;
  extend();
}

// ------------------------------------------------------------ distributions

function plot(figure) {
  const known = figure.values.filter((value) => !Number.isNaN(value));
  if (!known.length) return null;
  let low = Infinity, high = -Infinity;
  for (const value of known) {
    low = Math.min(low, value);
    high = Math.max(high, value);
  }
  const counts = new Array(BINS).fill(0), width = (high - low) / BINS || 1;
  for (const value of known) counts[Math.min(BINS - 1, Math.floor((value - low) / width))]++;
  const most = Math.max(...counts), svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", `0 0 ${BINS} 1`);
  svg.setAttribute("preserveAspectRatio", "none");
  counts.forEach((count, bin) => {
    if (!count) return;
    // The plots must show single outliers, so a bar is at least a tenth of the height.
    const tall = Math.max(0.1, count / most), bar = document.createElementNS(svg.namespaceURI, "rect");
    for (const [name, value] of Object.entries({ x: bin + 0.05, y: 1 - tall, width: 0.9, height: tall })) {
      bar.setAttribute(name, value);
    }
    const from = low + bin * width, to = bin === BINS - 1 ? high : from + width;
    const title = document.createElementNS(svg.namespaceURI, "title");
    title.textContent = `${number(from)} to ${number(to)}: ${count}`;
    bar.append(title);
    bar.onclick = () => {
      document.querySelectorAll("rect.on").forEach((other) => other.classList.remove("on"));
      bar.classList.add("on");
      state.range = { values: figure.values, low: from, high: to };
      refresh();
    };
    svg.append(bar);
  });
  return element("figure", {}, svg,
    element("figcaption", {}, element("span", {}, number(low)), element("b", {}, figure.title),
      element("span", {}, number(high))));
}

// ------------------------------------------------------------ start

function start() {
  const count = (one) => kind.filter((other) => other === one).length;
  byId("about").textContent = `${sids.length} subjects: ${count("failed")} failed, ${count("unfinished")} unfinished, ` +
    `${count("odd")} to check (unusual values or a warning), ${count("plain")} usual. The worst subjects come first. ` +
    `The score is the largest distance from the median in robust standard deviations; above ${DATA.strange} is unusual. ` +
    `Click a column heading to sort, or a bar to filter.`;
  byId("plots").append(...figures.map(plot).filter(Boolean));
  const heads = COLUMNS.map((column) => {
    const head = element("th", { textContent: column.title, onclick() {
      state.down = state.sorted === column.title ? !state.down : column.title === "score";
      state.sorted = column.title;
      refresh();
    } });
    head.dataset.title = column.title;
    return head;
  });
  heads.splice(4, 0, element("th", { textContent: "picture" }));
  byId("heads").append(...heads);
  byId("search").oninput = refresh;
  byId("show").onchange = refresh;
  byId("more").onclick = extend;
  byId("clear").onclick = () => {
    document.querySelectorAll("rect.on").forEach((other) => other.classList.remove("on"));
    state.range = null;
    refresh();
  };
  new IntersectionObserver((seen) => {
    if (seen.some((one) => one.isIntersecting) && !byId("more").hidden) extend();
  }, { rootMargin: "400px" }).observe(byId("more"));
  refresh();
  document.body.dataset.ready = "yes";
}

start();
