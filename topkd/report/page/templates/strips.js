// Strip charts: a row per setting, a mark per seed, a bar for the mean and its interval; below, the pairs with the best setting.
function drawDots(host) {
  const section = host.closest('section');
  section.hidden = !data.seeds.length;
  if (section.hidden) return;
  const blocks = data.seeds.map((measure) => el('div', { class: 'measure', 'data-measure': measure.key }, el('h3', { text: measure.title })));
  host.replaceChildren(...blocks); // insert them first, so that each has a width
  blocks.forEach((block, i) => {
    for (const one of data.seeds[i].strips) block.append(el('p', { class: 'soft', text: one.note }), strip(one, block.clientWidth || 640));
  });
}

function strip({ rows, even, ratio: ratios }, space) {
  const width = Math.max(250, space);
  const narrow = width < 620;
  const row = narrow ? 46 : 34;
  const names = narrow ? 8 : Math.min(0.42 * width, Math.max(...rows.map((one) => textWidth(one.label, 13, 600))) + 18);
  const beside = Math.max(...rows.map((one) => textWidth(one.text))) + 14;
  const height = rows.length * row + 30;
  const values = rows.flatMap((one) => [...one.dots.map((dot) => dot.value), one.low, one.high, one.mean]).concat(even).filter((value) => value !== null);
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const pad = ratios ? (high / low) ** 0.06 : 0.05 * (high - low || Math.abs(high) || 1);
  const ends = ratios ? [low / Math.max(1.01, pad), high * Math.max(1.01, pad)] : [low - pad, high + pad];
  const x = scale(ends, [names + 8, width - beside - 8], ratios);
  const said = rows.map((one) => `${one.label}: ${one.text}${one.low === null ? '' : `, 95 % interval ${number(one.low)} to ${number(one.high)}`}, ${one.dots.length} seeds`);
  const graph = svg('svg', { width, height, viewBox: `0 0 ${width} ${height}`, class: 'strip', role: 'img', 'aria-label': said.join('; ') });
  const bottom = height - 26;
  const wanted = Math.max(2, Math.floor((width - names - beside) / 64));
  const ticks = (ratios ? logTicks(...ends, wanted) : linearTicks(...ends, wanted));
  // On a narrow strip the names are above their rows, where the line would cross them.
  const rule = (value, kind) => (narrow ? rows.map((_, i) => [i * row + 22, Math.min(bottom, i * row + 46)]) : [[4, bottom]])
    .map(([y1, y2]) => svg('line', { x1: x(value), x2: x(value), y1, y2, class: kind }));
  for (const tick of ticks) {
    graph.append(...rule(tick, tick === even ? 'zero' : 'rule'),
      svg('text', { x: x(tick), y: bottom + 16, class: 'tick middle', text: tickText(tick, ticks) }));
  }
  if (even !== null && !ticks.includes(even)) graph.append(...rule(even, 'zero'));
  rows.forEach((one, i) => {
    const y = narrow ? i * row + 32 : i * row + 20;
    const g = groupClass(one.group);
    graph.append(svg('text', { x: 4, y: narrow ? y - 14 : y + 4, class: 'name', text: shortened(one.label, narrow ? width - 8 : names - 8) }));
    if (one.low !== null) graph.append(svg('line', { x1: x(one.low), x2: x(one.high), y1: y, y2: y, class: `interval stroke ${g}` }));
    for (const dot of one.dots) graph.append(mark(one.group, dot, x(dot.value), y));
    if (one.mean !== null) graph.append(svg('line', { x1: x(one.mean), x2: x(one.mean), y1: y - 9, y2: y + 9, class: `mean stroke ${g}` }));
    graph.append(svg('text', { x: width - 4, y: y + 4, class: 'label end', text: one.text }));
  });
  return graph;
}

function mark(g, dot, x, y) {
  const node = dot.late
    ? svg('path', { d: `M${x - 4} ${y - 5.5}L${x + 6} ${y}L${x - 4} ${y + 5.5}Z`, class: `late ${groupClass(g)}` })
    : marker(g, x, y, 4.5, 'seed-dot');
  node.append(svg('title', { text: `seed ${dot.seed}: ${dot.late ? `not within ${number(dot.value)}` : number(dot.value)}` }));
  return node;
}

// Cuts a name to its space.
function shortened(text, room) {
  let kept = text;
  while (kept.length > 4 && textWidth(kept === text ? kept : `${kept}…`, 13, 600) > room) kept = kept.slice(0, -1);
  return kept === text ? text : `${kept.trimEnd()}…`;
}
