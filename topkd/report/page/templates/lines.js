// One line chart: it fits its width, and shows values for pointer, touch and keyboard.
class LineChart {
  constructor(panel) {
    this.panel = panel;
    this.title = el('h3', { id: `title-${panel.key}` });
    this.wide = el('button', { type: 'button', class: 'plain wide', 'aria-pressed': 'false', title: 'Larger', text: '⤢' });
    this.wide.setAttribute('aria-label', `Larger: ${panel.title}`);
    this.wide.addEventListener('click', () => this.enlarge());
    this.unit = el('p', { class: 'unit' });
    this.plot = el('div', { class: 'plot' });
    this.tip = el('div', { class: 'tip', hidden: true });
    this.note = el('p', { class: 'note' });
    this.node = el('figure', { class: 'chart', id: `panel-${panel.key}`, 'data-panel': panel.key },
      el('figcaption', null, this.title, this.wide, this.unit), this.plot, this.note);
    this.plot.append(this.tip);
    this.width = 0;
    new ResizeObserver(([entry]) => {
      const width = Math.round(entry.contentRect.width);
      if (width && width !== this.width) {
        this.width = width;
        this.draw();
      }
    }).observe(this.plot);
    hears((what) => (what === 'hover' ? this.follow() : this.draw()));
  }

  enlarge() {
    const on = this.node.classList.toggle('large');
    this.wide.setAttribute('aria-pressed', String(on));
    this.draw();
    if (on) this.node.scrollIntoView({ block: 'start' });
  }

  update(panel) {
    this.panel = panel;
    this.draw();
  }

  // The lines to draw now: of the chosen prefixes, of groups that are not hidden, with the x axis that is chosen.
  chosen() {
    const sets = this.panel.lines;
    const lines = sets[state.prefixes] || sets[''] || sets[Object.keys(sets)[0]];
    const smoothed = new Set(lines.filter((line) => line.role === 'raw').map((line) => line.g));
    return lines
      .filter((line) => !state.hidden.has(line.g) && line.x[state.x])
      .filter((line) => state.smooth || !(line.role === 'main' && smoothed.has(line.g)))
      .map((line) => (!state.smooth && line.role === 'raw' ? { ...line, role: 'main' } : line));
  }

  draw() {
    if (!this.width) return;
    const { panel } = this;
    this.title.textContent = panel.title;
    this.lines = this.chosen();
    this.log = state.log && panel.log;
    this.svg?.remove();
    const values = this.lines.flatMap((line) => [line.y, line.lo || [], line.hi || []].flat()).filter((v) => v !== null);
    const shown = this.log ? values.filter((value) => value > 0) : values;
    const xs = this.lines.flatMap((line) => line.x[state.x]).filter((x) => x !== null);
    this.unit.textContent = [panel.unit, this.log ? 'log scale' : ''].filter(Boolean).join(', ');
    const left = values.length - shown.length;
    this.note.textContent = [panel.note, left ? `${left} values ≤ 0 cannot be shown on a log scale.` : ''].filter(Boolean).join(' ');
    if (!shown.length || !xs.length) {
      this.svg = el('p', { class: 'empty', text: this.lines.length ? 'nothing to draw yet' : 'hidden, or not on this axis' });
      this.plot.prepend(this.svg);
      return;
    }
    this.layout(xs, shown);
    this.svg = svg('svg', {
      width: this.width, height: this.height, viewBox: `0 0 ${this.width} ${this.height}`, tabindex: 0, role: 'img',
      class: 'lines', 'aria-label': this.spoken(),
      onpointermove: (event) => this.point(event), onpointerdown: (event) => this.point(event),
      onpointerleave: () => this.leave(), onblur: () => this.leave(), onkeydown: (event) => this.key(event),
    });
    this.axes();
    for (const role of ['raw', 'seed', 'main']) for (const line of this.lines) if (line.role === role) this.line(line);
    this.labels();
    this.cross = svg('g', { class: 'cross', visibility: 'hidden' });
    this.svg.append(this.cross);
    this.plot.prepend(this.svg);
  }

  layout(xs, shown) {
    this.height = this.node.classList.contains('large') ? this.largeHeight() : this.width < 300 ? 190 : 210;
    const mains = this.lines.filter((line) => line.role === 'main');
    const room = () => Math.max(0, ...mains.map((line) => textWidth(this.label(line)) + 16));
    this.named = data.groups.length > 1;
    this.named = this.named && room() <= this.width * 0.36; // if not all names fit, only the legend has them
    const right = mains.length <= 6 ? room() : 8;
    this.domain = yDomain(Math.min(...shown), Math.max(...shown), this.log, this.panel.unit.startsWith('%'), this.panel.zero);
    this.cut = !this.log && this.domain[0] > 0; // shown by a zigzag and in the text: the bottom of the chart is not zero
    const rows = Math.max(2, Math.floor(this.height / 38));
    this.yTicks = this.log ? logTicks(...this.domain, rows) : linearTicks(...this.domain, rows);
    const left = Math.max(...this.yTicks.map((tick) => textWidth(tickText(tick, this.yTicks), 11))) + 12;
    this.box = { left, right: this.width - right - 6, top: 10, bottom: this.height - 24 };
    const low = Math.min(0, ...xs); // counts begin at zero in every panel
    const high = Math.max(...xs);
    this.x = scale([low, high > low ? high : low + 1], [this.box.left, this.box.right]);
    this.y = scale(this.domain, [this.box.bottom, this.box.top], this.log);
    this.xTicks = linearTicks(low, high, Math.max(1, Math.floor((this.box.right - this.box.left) / 64)));
  }

  // An enlarged chart fits the window, with its title and note, below the controls that stay at the top.
  largeHeight() {
    const around = this.node.offsetHeight - this.plot.offsetHeight;
    const controls = byId('controls');
    const above = getComputedStyle(controls).position === 'sticky' ? controls.offsetHeight : 0;
    this.node.style.scrollMarginTop = `${above + 10}px`;
    return Math.max(200, Math.min(this.width * 0.55, innerHeight - above - around - 30));
  }

  axes() {
    const { left, right, bottom } = this.box;
    for (const tick of this.yTicks) {
      const y = this.y(tick);
      this.svg.append(
        svg('line', { x1: left, x2: right, y1: y, y2: y, class: tick === 0 ? 'zero' : 'rule' }),
        svg('text', { x: left - 7, y: y + 4, class: 'tick end', text: tickText(tick, this.yTicks) }));
    }
    this.svg.append(svg('line', { x1: left, x2: right, y1: bottom, y2: bottom, class: 'axis' }));
    if (this.cut) {
      const zigzag = `M${left} ${this.box.top}V${bottom - 14}l4 2l-8 4l8 4l-4 2V${bottom}`;
      const mark = svg('path', { d: zigzag, class: 'cut' });
      mark.append(svg('title', { text: 'this axis does not begin at zero' }));
      this.svg.append(mark);
    }
    for (const tick of this.xTicks) {
      const x = this.x(tick);
      this.svg.append(
        svg('line', { x1: x, x2: x, y1: bottom, y2: bottom + 4, class: 'axis' }),
        svg('text', { x, y: bottom + 17, class: 'tick middle', text: tickText(tick, this.xTicks) }));
    }
  }

  line(line) {
    const xs = line.x[state.x];
    const place = (i, values) => (xs[i] === null || values[i] === null || (this.log && values[i] <= 0) ? null : [this.x(xs[i]), this.y(values[i])]);
    if (line.lo) {
      const ups = line.hi.map((_, i) => place(i, line.hi)).filter(Boolean);
      const downs = line.lo.map((_, i) => place(i, line.lo)).filter(Boolean).reverse();
      const ring = [...ups, ...downs].map(([x, y]) => `${x.toFixed(1)},${y.toFixed(1)}`).join(' ');
      this.svg.append(svg('polygon', { points: ring, class: `span ${groupClass(line.g)}` }));
    }
    let path = '';
    let pen = false;
    const dots = [];
    line.y.forEach((_, i) => {
      const at = place(i, line.y);
      if (at) {
        path += `${pen ? 'L' : 'M'}${at[0].toFixed(1)} ${at[1].toFixed(1)}`;
        dots.push({ at, lone: !pen && !place(i + 1, line.y) });
      }
      pen = Boolean(at); // no line is drawn across a hole
    });
    this.svg.append(svg('path', { d: path || 'M0 0', class: `${line.role} stroke ${groupClass(line.g)}` }));
    // In a long line, only some values have the group's shape; each group's are shifted a little.
    const main = line.role === 'main';
    const few = main && dots.length <= 24;
    const every = main && data.groups.length > 1 ? Math.ceil(dots.length / 5) : Infinity;
    const offset = Math.round(((2 * line.g + 1) * every) / (2 * data.groups.length));
    dots.forEach((dot, i) => {
      if (few || dot.lone || i % every === offset) this.svg.append(marker(line.g, ...dot.at, 2.9));
    });
  }

  label(line) {
    const last = number(line.y.findLast((value) => value !== null));
    return this.named ? `${data.groups[line.g].label} ${last}` : last;
  }

  labels() {
    const mains = this.lines.filter((line) => line.role === 'main');
    if (mains.length > 6) return;
    const labels = mains.flatMap((line) => {
      const last = line.y.findLastIndex((value, i) => value !== null && line.x[state.x][i] !== null && (!this.log || value > 0));
      return last < 0 ? [] : [{ line, x: this.x(line.x[state.x][last]), y: this.y(line.y[last]) }];
    });
    for (const label of apart(labels, 15, this.box.top, this.box.bottom)) {
      const g = groupClass(label.line.g);
      if (Math.abs(label.at - label.y) > 4 || this.box.right - label.x > 12) {
        this.svg.append(svg('line', { x1: label.x + 3, y1: label.y, x2: this.box.right + 9, y2: label.at, class: `lead stroke ${g}` }));
      }
      // A mark beside the name would look like one more value, so the last value has the mark.
      this.svg.append(
        marker(label.line.g, label.x, label.y, 2.9),
        svg('text', { x: this.box.right + 11, y: label.at + 4, class: 'label', text: this.label(label.line) }));
    }
  }

  spoken() {
    const parts = this.lines.filter((line) => line.role === 'main').map((line) => {
      const known = line.y.filter((value) => value !== null);
      return `${data.groups[line.g].label} from ${number(known[0])} to ${number(known.at(-1))}`;
    });
    return `${this.panel.title}, ${this.panel.unit}, against ${axis().label}${this.cut ? ', on an axis that does not begin at zero' : ''}: ${parts.join('; ')}. Arrow keys read single values.`;
  }

  point(event) {
    const bounds = this.svg.getBoundingClientRect();
    const at = this.x.invert(((event.clientX - bounds.left) / bounds.width) * this.width);
    this.read(at, false);
  }

  leave() {
    state.at = null;
    tell('hover');
  }

  key(event) {
    const line = this.lines.find((one) => one.role === 'main') || this.lines[0];
    const xs = line.x[state.x].filter((x) => x !== null);
    if (event.key === 'Escape') return this.leave();
    const now = state.at && state.at.chart === this ? nearest(xs, state.at.x) : -1;
    const jump = Math.max(1, Math.round(xs.length / 10));
    const next = { ArrowRight: now + 1, ArrowLeft: now < 0 ? xs.length - 1 : now - 1, Home: 0, End: xs.length - 1, PageDown: now + jump, PageUp: now - jump }[event.key];
    if (next === undefined) return undefined;
    event.preventDefault();
    return this.read(xs[Math.min(xs.length - 1, Math.max(0, next))], true);
  }

  read(at, aloud) {
    state.at = { x: at, chart: this, aloud };
    tell('hover');
  }

  // The crosshair: a table of values in the chart under the pointer, a thin line in the others.
  follow() {
    if (!this.cross || !this.svg.isConnected || !(this.lines || []).length) return;
    this.cross.replaceChildren();
    this.tip.hidden = true;
    this.cross.setAttribute('visibility', state.at ? 'visible' : 'hidden');
    if (!state.at) return;
    const rows = this.lines.filter((line) => line.role === 'main').map((line) => {
      const i = nearest(line.x[state.x], state.at.x);
      return { line, i, x: line.x[state.x][i], y: line.y[i] };
    }).filter((row) => row.i >= 0);
    if (!rows.length) return;
    const [anchor] = rows.slice().sort((a, b) => Math.abs(a.x - state.at.x) - Math.abs(b.x - state.at.x));
    const x = Math.min(this.box.right, Math.max(this.box.left, this.x(anchor.x)));
    this.cross.append(svg('line', { x1: x, x2: x, y1: this.box.top, y2: this.box.bottom, class: 'hair' }));
    for (const row of rows) {
      if (row.y === null || (this.log && row.y <= 0)) continue;
      this.cross.append(marker(row.line.g, this.x(row.x), this.y(row.y), 4.2, 'dot big'));
    }
    if (state.at.chart === this) this.table(rows, anchor, x);
  }

  table(rows, anchor, x) {
    const head = `${axis().label}: ${number(anchor.x)}`;
    const body = rows.map((row) => {
      const span = row.line.lo && row.line.lo[row.i] !== null ? ` (${number(row.line.lo[row.i])} to ${number(row.line.hi[row.i])})` : '';
      return { g: row.line.g, name: data.groups[row.line.g].label, value: `${number(row.y)}${span}` };
    });
    this.tip.replaceChildren(el('p', { text: head }), ...body.map((row) => el('p', null, swatch(row.g), el('span', { text: row.name }), el('b', { text: row.value }))));
    this.tip.hidden = false;
    const wide = this.tip.offsetWidth;
    const start = x + 12 + wide > this.width ? x - wide - 12 : x + 12;
    this.tip.style.left = `${Math.max(0, Math.min(start, this.width - wide))}px`;
    if (state.at.aloud) say(`${head}. ${body.map((row) => `${row.name} ${row.value}`).join('. ')}`);
  }
}
