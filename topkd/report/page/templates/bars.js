// Importance ratios as a histogram.
class Histogram extends LineChart {
  chosen() {
    const { edges } = this.panel;
    const log2 = edges.map((edge) => (edge > 0 ? Math.log2(edge) : null));
    const known = log2.filter((edge) => edge !== null && Number.isFinite(edge));
    const step = known.length > 1 ? known[1] - known[0] : 1;
    return this.panel.lines.filter((line) => !state.hidden.has(line.g)).map((line) => {
      // There is one more count than edges: the first and the last bin are open, and are drawn one bin wide.
      const open = line.y.length > edges.length - 1;
      const centres = line.y.map((_, i) => (open ? known[0] + (i - 0.5) * step : known[0] + (i + 0.5) * step));
      return { ...line, role: 'main', y: line.y.map((share) => 100 * share), x: { [state.x]: centres } };
    });
  }

  layout(xs, shown) {
    super.layout(xs, shown);
    this.domain = [0, Math.max(...shown) * 1.2];
    this.y = scale(this.domain, [this.box.bottom, this.box.top]);
    this.yTicks = linearTicks(...this.domain, 4);
    this.box.right = this.width - 10;
    this.x = scale([Math.min(...xs), Math.max(...xs)], [this.box.left + 8, this.box.right - 8]);
    const step = Math.max(1, Math.ceil((Math.max(...xs) - Math.min(...xs)) / Math.max(2, Math.floor(this.width / 56))));
    this.xTicks = linearTicks(Math.ceil(Math.min(...xs)), Math.floor(Math.max(...xs)), 40).filter((tick) => Number.isInteger(tick) && tick % step === 0);
  }

  axes() {
    super.axes();
    this.svg.querySelectorAll('text.middle').forEach((text, i) => {
      text.textContent = ratio(this.xTicks[i]);
    });
  }

  line(line) {
    const xs = line.x[state.x];
    const half = (this.x(xs[1]) - this.x(xs[0])) / 2;
    const one = this.lines.length === 1;
    let path = `M${this.x(xs[0]) - half} ${this.box.bottom}`;
    line.y.forEach((y, i) => {
      path += `V${this.y(y).toFixed(1)}H${(this.x(xs[i]) + half).toFixed(1)}`;
    });
    path += `V${this.box.bottom}`;
    this.svg.append(svg('path', { d: path, class: `bars stroke ${one ? 'filled' : ''} ${groupClass(line.g)}` }));
  }

  labels() {
    const x = this.x(0);
    this.svg.append(svg('line', { x1: x, x2: x, y1: this.box.top, y2: this.box.bottom, class: 'reference' }),
      svg('text', { x: x + 5, y: this.box.top + 9, class: 'tick', text: 'on-policy' }));
  }

  label() {
    return '';
  }

  spoken() {
    return `${this.panel.title}: ${this.lines.map((line) => `${data.groups[line.g].label}, ${line.n} tokens, most in the bin at ratio ${ratio(line.x[state.x][line.y.indexOf(Math.max(...line.y))])}`).join('; ')}.`;
  }

  read(at, aloud) {
    this.show(at, aloud);
  }

  leave() {
    this.tip.hidden = true;
    this.cross?.replaceChildren();
  }

  follow() {
    // Ratios are not an x axis like time: this chart does not use the crosshair of the others.
  }

  key(event) {
    const xs = this.lines[0].x[state.x];
    const now = this.tip.hidden ? -1 : this.now;
    const next = { ArrowRight: now + 1, ArrowLeft: now < 0 ? xs.length - 1 : now - 1, Home: 0, End: xs.length - 1 }[event.key];
    if (event.key === 'Escape') this.leave();
    if (next === undefined) return;
    event.preventDefault();
    this.show(xs[Math.min(xs.length - 1, Math.max(0, next))], true);
  }

  show(at, aloud) {
    const xs = this.lines[0].x[state.x];
    const i = nearest(xs, at);
    this.now = i;
    const x = this.x(xs[i]);
    const half = (xs[1] - xs[0]) / 2;
    const head = `ratio ${ratio(xs[i] - half)} to ${ratio(xs[i] + half)}`;
    this.cross.setAttribute('visibility', 'visible');
    this.cross.replaceChildren(svg('line', { x1: x, x2: x, y1: this.box.top, y2: this.box.bottom, class: 'hair' }));
    const body = this.lines.map((line) => [line.g, data.groups[line.g].label, `${number(line.y[i])} %`]);
    this.tip.replaceChildren(el('p', { text: head }), ...body.map(([g, name, value]) => el('p', null, swatch(g), el('span', { text: name }), el('b', { text: value }))));
    this.tip.hidden = false;
    const wide = this.tip.offsetWidth;
    this.tip.style.left = `${Math.max(0, Math.min(x + 12 + wide > this.width ? x - wide - 12 : x + 12, this.width - wide))}px`;
    if (aloud) say(`${head}. ${body.map(([, name, value]) => `${name} ${value}`).join('. ')}`);
  }
}

const ratio = (log2) => String(Number((2 ** log2).toPrecision(2)));
