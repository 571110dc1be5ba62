// Scales and ticks: round numbers, as many as fit, without overlap.
function niceStep(span, count) {
  const rough = span / Math.max(1, count);
  const power = 10 ** Math.floor(Math.log10(rough));
  const lead = rough / power;
  return (lead <= 1.1 ? 1 : lead <= 2.1 ? 2 : lead <= 2.6 ? 2.5 : lead <= 5.4 ? 5 : 10) * power;
}

function linearTicks(low, high, count) {
  if (!(high > low)) return [low];
  const step = niceStep(high - low, count);
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i += 1) ticks.push(Number((i * step).toPrecision(12)));
  return ticks;
}

function logTicks(low, high, count) {
  const decades = Math.log10(high / low);
  if (decades < 0.7) return linearTicks(low, high, count).filter((tick) => tick > 0);
  const leads = decades < 2.2 ? [1, 2, 5] : [1];
  const skip = Math.max(1, Math.ceil(decades / count));
  const ticks = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power += 1) {
    if (leads.length === 1 && power % skip !== 0) continue;
    for (const lead of leads) {
      const tick = lead * 10 ** power;
      if (tick >= low * (1 - 1e-9) && tick <= high * (1 + 1e-9)) ticks.push(Number(tick.toPrecision(12)));
    }
  }
  return ticks;
}

// The label of a tick, with enough digits to differ from its neighbours.
function tickText(tick, ticks) {
  const step = ticks.length > 1 ? Math.min(...ticks.slice(1).map((next, i) => next - ticks[i])) : 0;
  if (tick === 0) return '0';
  if (step > 0 && step < 1e-4) return tick.toExponential(Math.max(0, Math.ceil(Math.log10(Math.abs(tick) / step) - 1e-9))).replaceAll('-', '−');
  if (Math.max(...ticks.map(Math.abs)) >= 1e4 || !step) return compact(tick);
  const decimals = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
  const exact = Math.abs(step * 10 ** decimals - Math.round(step * 10 ** decimals)) > 1e-6 ? decimals + 1 : decimals;
  return String(Number(tick.toFixed(exact))).replace('-', '−');
}

// The ends of y: zero is included if the values are not far from it; a flat line gets space above and below.
// ``zero`` (true or false) decides this for panels that are compared with one another.
function yDomain(low, high, log, shares, zero = null) {
  if (shares && !log && low >= 0 && high <= 100) {
    const [bottom, top] = yDomain(low, high, false, false);
    return low === high ? [Math.max(0, low - 5), Math.min(100, low + 5)] : [Math.max(0, bottom), Math.min(100, top)];
  }
  if (log) {
    const pad = high > low ? (high / low) ** 0.06 : 1.5;
    return [low / pad, high * pad];
  }
  if (low === high) {
    const pad = low === 0 ? 1 : Math.abs(low) * 0.1;
    return low === 0 ? [0, 1] : [Math.min(low - pad, low > 0 ? Math.max(0, low - pad) : low - pad), high + pad];
  }
  const span = high - low;
  const bottom = low >= 0 && (zero ?? low < 0.6 * high) ? 0 : low - 0.06 * span;
  const top = high <= 0 && -high < 0.6 * -low ? 0 : high + 0.06 * span;
  return [bottom, top];
}

function scale(domain, range, log) {
  const forward = log ? Math.log : (value) => value;
  const [low, high] = domain.map(forward);
  const width = high - low || 1;
  const map = (value) => range[0] + ((forward(value) - low) / width) * (range[1] - range[0]);
  map.invert = (pixel) => {
    const value = low + ((pixel - range[0]) / (range[1] - range[0])) * width;
    return log ? Math.exp(value) : value;
  };
  return map;
}

// The entry of an ascending list that is nearest to a value; holes (null) are skipped.
function nearest(values, wanted) {
  let best = -1;
  let distance = Infinity;
  let low = 0;
  let high = values.length - 1;
  if (!values.includes(null)) {
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (values[middle] < wanted) low = middle; else high = middle;
    }
  }
  for (let i = low; i <= high; i += 1) {
    if (values[i] === null) continue;
    const gap = Math.abs(values[i] - wanted);
    if (gap < distance) [best, distance] = [i, gap];
  }
  return best;
}

// Moves labels until none overlaps another, each as near as possible to its own position.
function apart(labels, gap, low, high) {
  labels.sort((a, b) => a.y - b.y);
  let last = low - gap;
  for (const label of labels) {
    label.at = Math.max(label.y, last + gap);
    last = label.at;
  }
  let next = high + gap;
  for (const label of labels.slice().reverse()) {
    label.at = Math.min(label.at, next - gap);
    next = label.at;
  }
  return labels;
}

const textWidth = (() => {
  const context = document.createElement('canvas').getContext('2d');
  return (text, size = 12, weight = 400) => {
    context.font = `${weight} ${size}px system-ui, sans-serif`;
    return context.measureText(text).width;
  };
})();
