// What every part uses: elements, numbers in words, and the one state that all charts share.
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
    // nothing is lost but the memory
  }
}

let data = JSON.parse(byId('data').textContent);
const state = { x: 'step', log: false, smooth: true, prefixes: 'fixed', hidden: new Set(), at: null };
const listeners = [];
const hears = (listener) => listeners.push(listener);
const tell = (what) => listeners.forEach((listener) => listener(what));
const axis = () => data.axes.find((one) => one.key === state.x);
const groupClass = (g) => `g${g % 18}`;
const swatch = (g) => svg('svg', { class: `swatch ${groupClass(g)}`, viewBox: '0 0 26 8', 'aria-hidden': 'true' },
  svg('line', { x1: 1, x2: 25, y1: 4, y2: 4, class: 'stroke' }));
