// A rollout token by token: coloured by advantage or divergence, with the top-K lists of teacher and student side by side.
const explorer = { at: 0, colour: 'a', body: null, token: 0, pinned: false };

const VISIBLE = { '\n': '↵', '\t': '⇥', '\r': '␍' };
const legible = (text) => (text === '' ? '∅' : text.replace(/[\n\t\r]/g, (sign) => VISIBLE[sign]).replace(/[\u0000-\u0008\u000b-\u001f\u202a-\u202e\u2066-\u2069]/g, '␦'));
const chance = (logp) => (logp === null || logp === undefined ? '?' : percent(Math.exp(logp)));
const percent = (p) => (p >= 0.0995 ? `${(100 * p).toFixed(0)} %` : p >= 1e-5 ? `${Number((100 * p).toPrecision(p >= 0.001 ? 2 : 1))} %` : p > 0 ? '< 0.001 %' : '0 %');
const named = (text) => (/^ +$/.test(text) ? '␣'.repeat(text.length) : legible(text)); // make spaces visible
const inline = (text) => legible(text).replaceAll('↵', '↵\n');
const signed = (value) => (value === null ? '?' : `${value > 0 ? '+' : ''}${number(value)}`);

async function rolloutBody(index) {
  const embedded = byId(`rollout-${index}`);
  if (embedded) return JSON.parse(embedded.textContent);
  const reply = await fetch(`rollout/${index}.json`);
  if (!reply.ok) throw new Error(`rollout ${index}: ${reply.status}`);
  return reply.json();
}

function buildExplorer(host) {
  const menu = el('select', { id: 'rollout', onchange: () => openRollout(menu.selectedIndex) });
  const step = (by) => () => openRollout(Math.min(data.rollouts.length - 1, Math.max(0, explorer.at + by)));
  const colours = segmented('Colour by', [['a', 'advantage'], ['d', 'divergence']], () => explorer.colour, (key) => {
    explorer.colour = key;
    paintTokens();
  });
  host.replaceChildren(
    el('div', { class: 'tools' },
      el('label', { for: 'rollout', text: 'Rollout' }), menu,
      el('button', { type: 'button', 'aria-label': 'Earlier rollout', text: '←', onclick: step(-1) }),
      el('button', { type: 'button', 'aria-label': 'Later rollout', text: '→', onclick: step(1) }),
      colours),
    el('div', { id: 'ramp', class: 'ramp' }),
    el('div', { class: 'reader' },
      el('div', { class: 'text' },
        el('p', { class: 'prompt', id: 'prompt', tabindex: 0, role: 'group', 'aria-label': 'Prompt' }),
        el('div', { id: 'tokens', class: 'tokens', role: 'group', 'aria-label': 'Tokens of the completion; arrow keys move', onkeydown: tokenKey }),
        el('p', { class: 'soft', id: 'rollout-note' })),
      el('div', { id: 'token', class: 'token-card' })));
}

function updateExplorer() {
  const section = byId('explorer');
  const none = !data.rollouts.length;
  section.hidden = none;
  byId('explorer-absent').hidden = !none;
  byId('explorer-absent').textContent = data.state.steps
    ? 'No rollouts were recorded: a run that writes tokens.jsonl shows them here, token by token.'
    : 'Rollouts appear here, token by token, once the first step has recorded some.';
  if (none) return;
  const first = !byId('rollout');
  if (first) buildExplorer(byId('explorer-body'));
  const menu = byId('rollout');
  if (menu.options.length !== data.rollouts.length) {
    menu.replaceChildren(...data.rollouts.map((head) => el('option', { text: `${head.label} · ${head.n} tokens` })));
    menu.selectedIndex = Math.min(explorer.at, data.rollouts.length - 1);
  }
  if (first) openRollout(data.rollouts.length - 1);
}

async function openRollout(index) {
  explorer.at = index;
  byId('rollout').selectedIndex = index;
  try {
    explorer.body = await rolloutBody(index);
  } catch {
    byId('rollout-note').textContent = 'This rollout cannot be loaded: the run’s server has ended.';
    return;
  }
  explorer.token = 0;
  const { body } = explorer;
  const prompt = byId('prompt');
  prompt.replaceChildren(el('span', { class: 'tag', text: 'prompt' }), body.prompt.length > 600 ? `… ${body.prompt.slice(-600)}` : body.prompt);
  const tokens = body.tokens.map((token, i) => el('span', {
    class: `token${token.m ? '' : ' untrained'}`, role: 'button', tabindex: i ? -1 : 0, 'data-i': i, text: inline(token.text),
      onpointerenter: () => showToken(i), onclick: () => showToken(i, true), onfocus: () => showToken(i),
    }));
  byId('tokens').replaceChildren(...tokens);
  byId('rollout-note').textContent = [
    body.tokens.every((token) => token.a === null) ? 'This objective is a direct loss: tokens have no advantage.' : '',
    body.divergence ? `Divergence: ${body.divergence}.` : '',
    body.cut ? `${body.cut} more tokens were not recorded.` : '',
    body.tokens.some((token) => !token.m) ? 'Dashed tokens do not train.' : '',
  ].filter(Boolean).join(' ');
  if (body.tokens.every((token) => token.a === null)) explorer.colour = 'd';
  paintTokens();
  showToken(0);
}

// Colours saturate at the 95th percentile, so that one extreme token does not make all others pale.
function reach(values) {
  const sizes = values.map(Math.abs).sort((a, b) => a - b);
  return sizes.length ? sizes[Math.floor(0.95 * (sizes.length - 1))] || sizes.at(-1) || 1 : 1;
}

function paintTokens() {
  const { body, colour } = explorer;
  if (!body) return;
  const values = body.tokens.map((token) => token[colour]);
  const full = reach(values.filter((value) => value !== null));
  byId('tokens').querySelectorAll('.token').forEach((node, i) => {
    const value = values[i];
    node.className = `token${body.tokens[i].m ? '' : ' untrained'}${i === explorer.token ? ' now' : ''}`;
    if (value === null) node.classList.add('unknown');
    else node.classList.add(`${colour === 'd' ? 'much' : value < 0 ? 'below' : 'above'}${Math.min(4, Math.round((4 * Math.abs(value)) / full))}`);
    node.setAttribute('aria-label', `${legible(body.tokens[i].text)}, ${colour === 'a' ? 'advantage' : 'divergence'} ${colour === 'a' ? signed(value) : number(value)}`);
  });
  const cells = (end, order) => order.map((i) => el('i', { class: `${end}${i}` }));
  byId('ramp').replaceChildren(...(colour === 'a'
    ? [el('span', { text: `≤ −${number(full)}` }), ...cells('below', [4, 3, 2, 1]), ...cells('above', [0, 1, 2, 3, 4]), el('span', { text: `≥ +${number(full)}` }), el('span', { class: 'soft', text: 'advantage: blue tokens become likelier, orange ones less likely' })]
    : [el('span', { text: '0' }), ...cells('much', [0, 1, 2, 3, 4]), el('span', { text: `≥ ${number(full)}` }), el('span', { class: 'soft', text: 'divergence of the two distributions at this position, nats' })]));
  document.querySelectorAll('[data-segment="Colour by"] button').forEach((button) => button.setAttribute('aria-pressed', String(button.value === colour)));
}

function showToken(index, focus) {
  const { body } = explorer;
  const token = body?.tokens[index];
  if (!token) return;
  const nodes = byId('tokens').querySelectorAll('.token');
  nodes[explorer.token]?.classList.remove('now');
  nodes[explorer.token]?.setAttribute('tabindex', -1);
  explorer.token = index;
  nodes[index].classList.add('now');
  nodes[index].setAttribute('tabindex', 0);
  if (focus) nodes[index].focus({ preventScroll: true });
  const shared = (side, other) => new Set((token[side] || []).map(([id]) => id).filter((id) => (token[other] || []).some(([twin]) => twin === id)));
  const both = shared('T', 'S');
  byId('token').replaceChildren(
    el('p', { class: 'which' }, el('b', { class: 'piece', text: named(token.text) }), ` id ${token.id}, ${index + 1} of ${body.tokens.length}${token.m ? '' : ', does not train'}`),
    el('dl', { class: 'numbers' }, ...[
      ['teacher', chance(token.t), 'probability that the teacher gives this token'],
      ['student', chance(token.s), 'probability that the student gives it now'],
      ['at rollout', chance(token.b), 'probability it was drawn with'],
      ['advantage', signed(token.a), 'under the run’s objective'],
      ['divergence', number(token.d), body.divergence],
    ].map(([name, value, title]) => el('div', { title }, el('dt', { text: name }), el('dd', { text: value })))),
    el('div', { class: 'sides', tabindex: 0, role: 'group', 'aria-label': 'Both lists' }, list('Teacher', token.T, token, both), list('Student', token.S, token, both)),
    el('p', { class: 'soft', text: `● in both lists (${both.size}), ○ in one; the sampled token is framed.` }));
}

function list(name, entries, token, both) {
  if (!entries) return el('div', null, el('h3', { text: name }), el('p', { class: 'soft', text: 'not recorded' }));
  const rows = entries.map(([id, logp], rank) => {
    const p = logp === null ? 0 : Math.exp(logp);
    return el('tr', { class: id === token.id ? 'drawn' : null },
      el('td', { class: 'num', text: String(rank + 1) }),
      el('td', { class: 'piece', title: `id ${id}: ${legible(explorer.body.texts[id] ?? '')}` }, el('span', { 'aria-hidden': 'true', text: both.has(id) ? '● ' : '○ ' }), named(explorer.body.texts[id] ?? `#${id}`)),
      el('td', { class: 'num', text: chance(logp) }),
      el('td', { class: 'bar-cell' }, svg('svg', { viewBox: '0 0 100 8', preserveAspectRatio: 'none', 'aria-hidden': 'true' }, svg('rect', { width: Math.max(1, 100 * p), height: 8 }))));
  });
  const rest = entries.reduce((sum, [, logp]) => sum - (logp === null ? 0 : Math.exp(logp)), 1);
  return el('div', null, el('h3', { text: `${name}, top ${entries.length}` }),
    el('table', { class: 'list' }, el('caption', { class: 'unseen', text: `${name}'s most likely tokens here` }),
      el('colgroup', null, el('col'), el('col'), el('col'), el('col')),
      el('thead', { class: 'unseen' }, el('tr', null, ...['rank', 'token', 'probability', 'bar'].map((text) => el('th', { scope: 'col', text })))),
      el('tbody', null, ...rows, el('tr', { class: 'rest' }, el('td'), el('td', { text: 'all others' }), el('td', { class: 'num', text: percent(Math.max(0, rest)) }), el('td')))));
}

function tokenKey(event) {
  const nodes = [...byId('tokens').querySelectorAll('.token')];
  const now = explorer.token;
  let next = { ArrowRight: now + 1, ArrowLeft: now - 1, Home: 0, End: nodes.length - 1 }[event.key];
  if (event.key === 'ArrowDown' || event.key === 'ArrowUp') next = lineAway(nodes, now, event.key === 'ArrowDown' ? 1 : -1);
  if (event.key === 'Enter' || event.key === ' ') next = now;
  if (next === undefined) return;
  event.preventDefault();
  showToken(Math.min(nodes.length - 1, Math.max(0, next)), true);
}

// The token above or below: on the next line of text, the one nearest in x.
function lineAway(nodes, now, way) {
  const here = nodes[now].getBoundingClientRect();
  let best = now;
  let score = Infinity;
  nodes.forEach((node, i) => {
    const box = node.getBoundingClientRect();
    const rows = way * (box.top - here.top);
    const cost = rows * 4 + Math.abs(box.left - here.left);
    if (rows > 4 && cost < score) [best, score] = [i, cost];
  });
  return best;
}
