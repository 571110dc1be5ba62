// Copies of the data: tables as Markdown, for a spreadsheet, or as LaTeX; the curves as CSV; everything as JSON.
function cells(table) {
  return [...table.rows].map((row) => [...row.cells].map((cell) => cell.textContent.trim()));
}

const WRITERS = {
  markdown(rows) {
    const line = (row) => `| ${row.map((cell) => cell.replaceAll('|', '\\|')).join(' | ')} |`;
    return [line(rows[0]), `|${rows[0].map((_, i) => (i ? '--:' : ':--')).join('|')}|`, ...rows.slice(1).map(line)].join('\n');
  },
  tsv: (rows) => rows.map((row) => row.map((cell) => cell.replace(/[\t\n]/g, ' ')).join('\t')).join('\n'),
  latex(rows) {
    const safe = (cell) => cell.replace(/[\\&%$#_{}~^]/g, (sign) => ({ '\\': '\\textbackslash{}', '~': '\\textasciitilde{}', '^': '\\textasciicircum{}' }[sign] || `\\${sign}`))
      .replaceAll('‖', '$\\|$').replaceAll('−', '$-$');
    const line = (row) => `${row.map(safe).join(' & ')} \\\\`;
    return [`\\begin{tabular}{l${'r'.repeat(rows[0].length - 1)}}`, '\\toprule', line(rows[0]), '\\midrule', ...rows.slice(1).map(line), '\\bottomrule', '\\end{tabular}'].join('\n');
  },
};

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const area = el('textarea', { class: 'unseen', 'aria-hidden': 'true' });
    area.value = text;
    document.body.append(area);
    area.select();
    const done = document.execCommand('copy'); // for pages that may not use the clipboard
    area.remove();
    return done;
  }
}

// One row per point of a curve, as drawn on this page.
function curvesCsv() {
  const quote = (value) => (value === null || value === undefined ? '' : /[",\n]/.test(String(value)) ? `"${String(value).replaceAll('"', '""')}"` : String(value));
  const keys = data.axes.map((one) => one.key);
  const rows = [['panel', 'prefixes', 'setting', 'role', 'run', ...keys, 'value', 'low', 'high']];
  for (const section of data.sections) {
    for (const panel of section.panels.filter((one) => one.kind === 'line')) {
      for (const [prefixes, lines] of Object.entries(panel.lines)) {
        for (const line of lines) {
          line.y.forEach((value, i) => rows.push([panel.key, prefixes, data.groups[line.g].label, line.role, line.name, ...keys.map((key) => line.x[key]?.[i]), value, line.lo?.[i], line.hi?.[i]]));
        }
      }
    }
  }
  return rows.map((row) => row.map(quote).join(',')).join('\r\n');
}

function save(name, text, type) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  el('a', { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}

document.addEventListener('click', async (event) => {
  const button = event.target.closest('button[data-copy], button[data-save]');
  if (!button) return;
  const name = data.title.replace(/[^\w.-]+/g, '-');
  if (button.dataset.save === 'csv') return save(`${name}.csv`, curvesCsv(), 'text/csv');
  if (button.dataset.save === 'json') return save(`${name}.json`, JSON.stringify(data, null, 1), 'application/json');
  const done = await copy(WRITERS[button.dataset.copy](cells(byId(button.closest('[data-table]').dataset.table))));
  const was = button.dataset.was || (button.dataset.was = button.textContent);
  button.textContent = done ? 'Copied' : 'Copying is not allowed here';
  say(button.textContent);
  setTimeout(() => { button.textContent = was; }, 1600);
  return undefined;
});
document.addEventListener('change', (event) => {
  if (event.target.id === 'only-differing') byId('settings-table').classList.toggle('only', event.target.checked);
});
