// Used by every part: elements, formatting of numbers, and the state that all charts share.
const SVG = 'http://www.w3.org/2000/svg';

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith('on')) node.addEventListener(name.slice(2), value);
    else if (name === 'text') node.textContent = value;
    else node.setAttribute(name, value === true ? '' : value);
  }
  for (const child of children) if (child !== null && child !== undefined) node.append(child);
  return node;
}
const el = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);
const byId = (id) => document.getElementById(id);

function number(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return '?';
  const size = Math.abs(value);
  if (size >= 1e6) return compact(value);
  if (size >= 1000) return Math.round(value).toLocaleString('en');
  if (size === 0) return '0';
  const text = size < 1e-3 ? value.toExponential(2) : String(Number(value.toPrecision(4)));
  return text.replace('-', '−');
}

function compact(value) {
  const size = Math.abs(value);
  for (const [unit, letter] of [[1e12, 'T'], [1e9, 'G'], [1e6, 'M'], [1e3, 'k']]) {
    if (size >= unit) return `${Number((value / unit).toPrecision(3))}${letter}`.replace('-', '−');
  }
  if (size !== 0 && size < 1e-3) return value.toExponential(0).replace('-', '−').replace('e+', 'e');
  return String(Number(value.toPrecision(3))).replace('-', '−');
}

function say(text) {
  byId('said').textContent = text;
}

function remembered(key, fallback) {
  try {
    return localStorage.getItem(`topkd.${key}`) || fallback;
  } catch {
    return fallback; // a file:// page may have no storage
  }
}
function remember(key, value) {
  try {
    localStorage.setItem(`topkd.${key}`, value);
  } catch {
    // then the choice is not remembered
  }
}

let data = JSON.parse(byId('data').textContent);
const state = { x: 'step', log: false, smooth: true, prefixes: 'fixed', hidden: new Set(), at: null };
const listeners = [];
const hears = (listener) => listeners.push(listener);
const tell = (what) => listeners.forEach((listener) => listener(what));
const axis = () => data.axes.find((one) => one.key === state.x);
const groupClass = (g) => `g${g % 18}`;

// A shape for each group, so that groups differ by more than colour; later rounds of the colours shift the shapes.
const SHAPES = [
  (x, y, r) => `M${x - r} ${y}a${r} ${r} 0 1 0 ${2 * r} 0a${r} ${r} 0 1 0 ${-2 * r} 0Z`,
  (x, y, r) => `M${x - 0.9 * r} ${y - 0.9 * r}h${1.8 * r}v${1.8 * r}h${-1.8 * r}Z`,
  (x, y, r) => `M${x} ${y - 1.25 * r}l${1.15 * r} ${2.1 * r}h${-2.3 * r}Z`,
  (x, y, r) => `M${x} ${y - 1.35 * r}l${1.35 * r} ${1.35 * r}l${-1.35 * r} ${1.35 * r}l${-1.35 * r} ${-1.35 * r}Z`,
  (x, y, r) => `M${x} ${y + 1.25 * r}l${1.15 * r} ${-2.1 * r}h${-2.3 * r}Z`,
  (x, y, r) => `M${x - 0.45 * r} ${y - 1.3 * r}h${0.9 * r}v${0.85 * r}h${0.85 * r}v${0.9 * r}h${-0.85 * r}v${0.85 * r}h${-0.9 * r}v${-0.85 * r}h${-0.85 * r}v${-0.9 * r}h${0.85 * r}Z`,
];
const marker = (g, x, y, r, kind = 'dot') => svg('path', { d: SHAPES[(g + Math.floor(g / 6)) % 6](Number(x.toFixed(1)), Number(y.toFixed(1)), r), class: `${kind} ${groupClass(g)}` });
const swatch = (g) => svg('svg', { class: `swatch ${groupClass(g)}`, viewBox: '0 0 26 10', 'aria-hidden': 'true' },
  svg('line', { x1: 1, x2: 25, y1: 5, y2: 5, class: 'stroke' }), marker(g, 13, 5, 3.4));
