// The whole page: its controls, its sections, and (if a running run serves it) its updates.
const charts = new Map();

function segmented(name, choices, chosen, choose) {
  const buttons = choices.map(([key, label, why]) => el('button', {
    type: 'button', value: key, text: label, disabled: Boolean(why), title: why || null, 'aria-pressed': String(key === chosen()),
    onclick: () => {
      choose(key);
      buttons.forEach((button) => button.setAttribute('aria-pressed', String(button.value === chosen())));
    },
  }));
  return el('div', { class: 'segmented', role: 'group', 'aria-label': name, 'data-segment': name }, el('span', { text: name }), ...buttons);
}

function toggle(label, on, flip, why) {
  const button = el('button', { type: 'button', class: 'toggle', 'aria-pressed': String(on), text: label, title: why || null,
    onclick: () => button.setAttribute('aria-pressed', String(flip())) });
  return button;
}

const SHORT = { tokens: 'tokens', step: 'steps', seconds: 'seconds', cost: 'teacher tokens', requests: 'requests', bytes: 'bytes' };

function controls() {
  const set = (key) => (value) => {
    state[key] = value;
    tell('draw');
  };
  const offered = data.axes.filter((one) => one.ok || ['tokens', 'step', 'seconds', 'cost'].includes(one.key));
  const legend = el('div', { class: 'legend', role: 'group', 'aria-label': 'Settings shown' }, ...data.groups.map((group, g) => {
    const button = el('button', { type: 'button', class: 'toggle', 'aria-pressed': String(!state.hidden.has(g)), title: `Show or hide ${group.label}`,
      onclick: () => {
        if (!state.hidden.delete(g)) state.hidden.add(g);
        button.setAttribute('aria-pressed', String(!state.hidden.has(g)));
        tell('draw');
      } }, swatch(g), group.n > 1 ? `${group.label} (${group.n} runs)` : group.label);
    return button;
  }));
  byId('controls').replaceChildren(...[
    data.groups.length > 1 ? legend : null,
    segmented('Against', offered.map((one) => [one.key, SHORT[one.key], one.ok ? '' : `some run logs do not have ${one.label}`]), () => state.x, (key) => {
      state.chosen = true;
      set('x')(key);
    }),
    data.prefixes.length > 1 ? segmented('Prefixes', data.prefixes.map((kind) => [kind, kind]), () => state.prefixes, set('prefixes')) : null,
    toggle('log KL', state.log, () => {
      set('log')(!state.log);
      return state.log;
    }, 'Divergences and noise on a logarithmic axis'),
    data.sections.some((section) => section.panels.some((panel) => Object.values(panel.lines || {}).flat().some((line) => line.role === 'raw')))
      ? toggle('smooth', state.smooth, () => {
        set('smooth')(!state.smooth);
        return state.smooth;
      }, 'Rolling means over noisy series') : null,
  ].filter(Boolean));
}

function sections() {
  const host = byId('charts');
  for (const section of data.sections) {
    let node = byId(`section-${section.key}`);
    if (!node) {
      node = el('section', { class: 'card', id: `section-${section.key}`, 'aria-labelledby': `heading-${section.key}` },
        el('h2', { id: `heading-${section.key}`, text: section.title }), el('p', { class: 'soft lead-in', text: section.text }),
        el('div', { class: 'grid' }),
        el('details', { class: 'folded' }, el('summary'), el('div', { class: 'grid' }), el('p', { class: 'soft absent' })));
      host.append(node);
    }
    const [grid, foldedGrid] = node.querySelectorAll('.grid');
    const folded = section.panels.filter((panel) => panel.constant);
    for (const [panels, place] of [[section.panels.filter((panel) => !panel.constant), grid], [folded, foldedGrid]]) {
      panels.forEach((panel, i) => {
        let chart = charts.get(panel.key);
        if (!chart) {
          chart = panel.kind === 'hist' ? new Histogram(panel) : new LineChart(panel);
          charts.set(panel.key, chart);
        } else chart.update(panel);
        if (place.children[i] !== chart.node) place.insertBefore(chart.node, place.children[i] || null);
      });
    }
    const logs = data.groups.length > 1 ? 'these run logs' : 'this run log';
    const { absent } = section;
    node.querySelector('.folded').hidden = !folded.length && !absent.length;
    node.querySelector('.folded summary').textContent = [
      folded.length ? `The same at every step: ${folded.map((panel) => panel.title).join(', ')}` : '',
      absent.length ? `${absent.length} ${absent.length > 1 ? 'charts' : 'chart'} not in ${logs}` : '',
    ].filter(Boolean).join('; ');
    node.querySelector('.absent').textContent = absent.length ? `Not in ${logs}: ${absent.join(', ')}.` : '';
    node.hidden = !section.panels.length;
  }
}

// Links to the parts that the page has now.
function contents() {
  const parts = [...document.querySelectorAll('main section.card[id]')].filter((node) => !node.hidden);
  byId('contents').replaceChildren(...parts.map((node) => el('a', { href: `#${node.id}`, text: node.querySelector('h2').textContent })));
}

function themes() {
  const order = ['system', 'light', 'dark'];
  const button = byId('theme');
  const apply = (theme) => {
    if (theme === 'system') delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    button.textContent = `Theme: ${theme}`;
  };
  let theme = remembered('theme', 'system');
  apply(theme);
  button.addEventListener('click', () => {
    theme = order[(order.indexOf(theme) + 1) % 3];
    remember('theme', theme);
    apply(theme);
  });
}

function everything() {
  const possible = ['tokens', 'step'].find((key) => data.axes.find((one) => one.key === key).ok) || 'step';
  if (!state.chosen || !axis()?.ok) state.x = possible; // a run without a step has no tokens yet
  if (!data.prefixes.includes(state.prefixes)) [state.prefixes] = data.prefixes;
  controls();
  sections();
  drawDots(byId('dots'));
  updateExplorer();
  contents();
  byId('state').textContent = data.state.text;
  byId('state').classList.toggle('running', data.state.running > 0 && data.live);
}

// A live page requests updates every second; if nothing has changed, the reply is short. The page shows if the server has ended.
async function follow() {
  let version = '';
  let quiet = 0;
  for (;;) {
    await new Promise((done) => { setTimeout(done, document.hidden ? 4000 : 1000); });
    try {
      const reply = await fetch(`data.json?since=${encodeURIComponent(version)}`, { cache: 'no-store' });
      if (reply.status === 204) {
        if (quiet) byId('state').textContent = data.state.text;
        quiet = 0;
        continue;
      }
      const news = await reply.json();
      ({ version } = news);
      quiet = 0;
      const focused = document.activeElement?.closest?.('#controls') ? document.activeElement.value : null;
      const open = [...document.querySelectorAll('details')].map((one) => one.open);
      data = news.data;
      for (const [id, html] of Object.entries(news.html)) byId(id).innerHTML = html; // written and escaped by our server
      document.querySelectorAll('details').forEach((one, i) => { one.open = open[i] || false; });
      everything();
      if (focused) document.querySelector(`#controls button[value="${CSS.escape(focused)}"]`)?.focus();
    } catch {
      quiet += 1;
      if (quiet > 2) byId('state').textContent = 'the run’s server is gone; this is the last it said';
    }
  }
}

themes();
data.groups.forEach((group, g) => { if (group.apart) state.hidden.add(g); }); // replays are hidden until the reader shows them
everything();
let shownWidth = innerWidth;
addEventListener('resize', () => {
  if (innerWidth !== shownWidth) drawDots(byId('dots'));
  shownWidth = innerWidth;
});
if (data.live) follow();
document.documentElement.dataset.ready = 'true';
