// The transcript browser: search, filters, sorting, pages; its whole state is in the address, so a view can be linked.
const PAGE_ROWS = 50;
const [STAGE, STEP, PROMPT_INDEX, SAMPLE, PROMPT, COMPLETION, STOP, TOKENS, REWARD, ADVANTAGE, VALUES, ERRORS] = Array.from({ length: 12 }, (_, i) => i);
const data = readJson('transcripts-data');
const FIELDS = { q: '', stage: '', steps: '', reward: '', criterion: '', is: '', stop: '', prompt: '', sort: '', page: '1', open: '' };
const state = { ...FIELDS };
const opened = () => new Set(state.open.split('-').filter((part) => part !== '').map(Number));
let found = [];
let lowered = null;

const ranges = data.criteria.map((_, c) => data.rows.reduce(([low, high], row) => {
  const value = row[VALUES][c];
  return known(value) ? [Math.min(low, value), Math.max(high, value)] : [low, high];
}, [0, 0]));

function readAddress() {
  const given = new URLSearchParams(location.hash.slice(1));
  const ours = Object.keys(FIELDS).some((name) => given.has(name));
  if (ours || !location.hash) for (const name of Object.keys(FIELDS)) state[name] = given.get(name) ?? FIELDS[name];
  return ours;
}

function writeAddress() {
  const set = Object.entries(state).filter(([name, value]) => value !== FIELDS[name]);
  const hash = new URLSearchParams(set).toString();
  history.replaceState(null, '', hash ? `#${hash}` : '#transcripts');
}

// "10..20", "10..", "..20" or "15"; null where nothing is asked.
function parseRange(text) {
  if (!text.trim()) return null;
  const [from, to] = text.includes('..') ? text.split('..') : [text, text];
  const number = (part, otherwise) => (part.trim() === '' || Number.isNaN(Number(part)) ? otherwise : Number(part));
  return [number(from, -Infinity), number(to, Infinity)];
}
const inside = (value, range) => !range || (known(value) && value >= range[0] && value <= range[1]);

// Every word has to appear, in the prompt or in the completion; "quoted words" are one.
const wordsOf = (text) => [...text.toLowerCase().matchAll(/"([^"]+)"|(\S+)/g)].map((match) => match[1] ?? match[2]);

function criterionMatches(row, c, is) {
  const value = row[VALUES][c];
  const failed = Object.hasOwn(row[ERRORS], data.criteria[c]);
  return { failed, zero: value === 0, positive: value > 0, negative: value < 0, none: !known(value) && !failed }[is] ?? true;
}

function search() {
  const words = wordsOf(state.q);
  if (words.length && !lowered) lowered = data.rows.map((row) => `${data.prompts[row[PROMPT]]}\n${row[COMPLETION]}`.toLowerCase());
  const [steps, rewards] = [parseRange(state.steps), state.reward === 'none' ? null : parseRange(state.reward)];
  const criterion = data.criteria.indexOf(state.criterion);
  found = [];
  data.rows.forEach((row, i) => {
    if (state.stage && data.stages[row[STAGE]] !== state.stage) return;
    if (state.stop && (data.stops[row[STOP]] || 'none') !== state.stop) return;
    if (state.prompt && String(row[PROMPT_INDEX]) !== state.prompt) return;
    if (!inside(row[STEP], steps) || !inside(row[REWARD], rewards)) return;
    if (state.reward === 'none' && known(row[REWARD])) return;
    if (state.is && criterion >= 0 && !criterionMatches(row, criterion, state.is)) return;
    if (state.is === 'failed' && criterion < 0 && !Object.keys(row[ERRORS]).length) return;
    if (words.every((word) => lowered[i].includes(word))) found.push(i);
  });
  sortFound();
}

const columns = [
  { key: 'stage', title: 'Stage', left: true, value: (row) => row[STAGE] },
  { key: 'step', title: 'Step', value: (row) => row[STEP] },
  { key: 'problem', title: 'Prompt', extra: true, value: (row) => row[PROMPT_INDEX] },
  { key: 'sample', title: 'Sample', extra: true, value: (row) => row[SAMPLE] },
  { key: 'reward', title: 'Reward', value: (row) => row[REWARD] },
  { key: 'advantage', title: 'Advantage', extra: true, value: (row) => row[ADVANTAGE] },
  ...data.criteria.map((name, c) => ({ key: `criterion:${name}`, title: name, extra: true, criterion: c, value: (row) => row[VALUES][c] })),
  { key: 'tokens', title: 'Tokens', value: (row) => row[TOKENS] },
  { key: 'stop', title: 'Stop', extra: true, left: true, value: (row) => data.stops[row[STOP]] },
];

function sortFound() {
  const down = state.sort.startsWith('-');
  const column = columns.find((each) => each.key === state.sort.replace(/^-/, ''));
  if (!column) return;
  const compare = (a, b) => (a < b ? -1 : a > b ? 1 : 0);
  found.sort((i, j) => {
    const [a, b] = [column.value(data.rows[i]), column.value(data.rows[j])];
    if (!known(a) || !known(b)) return Number(!known(a)) - Number(!known(b)) || i - j;
    return (down ? compare(b, a) : compare(a, b)) || i - j;
  });
}

function meter(value, c, className = 'meter') {
  const [low, high] = ranges[c];
  const size = high - low || 1;
  const [from, to] = [Math.min(0, value), Math.max(0, value)].map((end) => ((end - low) / size) * 100);
  return svg('svg', { class: className, viewBox: '0 0 100 10', preserveAspectRatio: 'none', 'aria-hidden': 'true' },
    svg('rect', { class: 'track', width: 100, height: 10 }), svg('rect', { class: 'fill', x: from, width: Math.max(value ? 2 : 0, to - from), height: 10 }));
}

function criterionCell(row, c) {
  const value = row[VALUES][c];
  const error = Object.hasOwn(row[ERRORS], data.criteria[c]) ? row[ERRORS][data.criteria[c]] : null;
  if (known(error)) return [el('span', { class: 'failed', title: error }, 'failed')];
  return known(value) ? [short(value), meter(value, c)] : [el('span', { class: 'none' }, '–')];
}

// Text with its tags and the searched words marked; never parsed as HTML.
function marked(text, words) {
  const escaped = words.map((word) => word.replace(/[.*+?^${}()|[\]\\]/g, '\\$&'));
  const hit = escaped.length ? new RegExp(`(${escaped.join('|')})`, 'gi') : null;
  const hits = (part) => (hit ? part.split(hit).map((piece, i) => (i % 2 ? el('mark', {}, piece) : piece)) : [part]);
  return text.split(/(<\|?\/?[A-Za-z][\w-]{0,40}\|?>)/).flatMap((part, i) => (i % 2 ? [el('span', { class: 'tag' }, ...hits(part))] : hits(part)));
}

function detail(row, width) {
  const words = wordsOf(state.q);
  const scores = el('div', { class: 'scores' });
  data.criteria.forEach((name, c) => {
    const value = row[VALUES][c];
    const error = Object.hasOwn(row[ERRORS], name) ? row[ERRORS][name] : null;
    const says = known(error) ? el('span', { class: 'why failed' }, `failed: ${error}`) : el('span', {}, known(value) ? String(value) : 'no value');
    scores.append(el('span', {}, name), known(value) ? meter(value, c, 'breakdown') : el('span', { class: 'none' }, '–'), says);
  });
  const group = el('button', {
    type: 'button',
    onclick: () => change({ ...FIELDS, stage: data.stages[row[STAGE]], steps: String(row[STEP]), prompt: String(row[PROMPT_INDEX]) }),
  }, 'All samples of this prompt at this step');
  const side = (title, text) => el('div', {}, el('h4', {}, title), el('pre', { tabindex: 0, dir: 'auto' }, ...marked(text, words)));
  const facts = [['reward', row[REWARD]], ['advantage', row[ADVANTAGE]], ['tokens', row[TOKENS]], ['stopped by', data.stops[row[STOP]] || null]]
    .map(([name, value]) => `${name} ${typeof value === 'number' ? Number(value.toPrecision(6)) : value ?? '–'}`).join(' · ');
  return el('tr', { class: 'detail' }, el('td', { colspan: width },
    el('div', { class: 'sides' }, side('Prompt', data.prompts[row[PROMPT]]), side('Completion', row[COMPLETION])),
    el('h4', {}, `Criteria (${facts})`), scores, known(row[PROMPT_INDEX]) ? el('div', { class: 'actions' }, group) : null));
}

function cells(row, i, isOpen) {
  const toggle = el('button', { type: 'button', class: 'expand', 'aria-expanded': String(isOpen), 'aria-label': `Completion ${row[SAMPLE] ?? ''} of step ${row[STEP]}` }, isOpen ? '▾' : '▸');
  const content = columns.map((column) => {
    const value = column.value(row);
    const shown = column.key === 'stage' ? [stageName(data.stages[value])] : column.criterion !== undefined ? criterionCell(row, column.criterion)
      : column.left ? [value || '–'] : column.key === 'reward' && !known(value) ? [el('span', { class: 'failed' }, 'none')]
        : [Number.isInteger(value) ? String(value) : short(value)];
    return el('td', { class: [column.extra ? 'extra' : '', column.left ? 'left' : ''].join(' ').trim() || null }, ...shown);
  });
  const preview = row[COMPLETION].slice(0, 240).replace(/\s+/g, ' ');
  return el('tr', { class: isOpen ? 'row open' : 'row', 'data-row': i }, el('td', {}, toggle), ...content, el('td', { class: 'text' }, ...marked(preview, wordsOf(state.q))));
}

function header() {
  const heads = columns.map((column) => {
    const active = state.sort.replace(/^-/, '') === column.key;
    const down = active && state.sort.startsWith('-');
    // First ascending, then descending, then the order of the run.
    const next = !active ? column.key : down ? '' : `-${column.key}`;
    return el('th', { scope: 'col', class: [column.extra ? 'extra' : '', column.left ? 'left' : ''].join(' ').trim() || null, 'aria-sort': active ? (down ? 'descending' : 'ascending') : null },
      el('button', { type: 'button', 'data-sort': column.key, title: `Sort by ${column.title}`, onclick: () => { change({ sort: next }); table.querySelector(`[data-sort="${CSS.escape(column.key)}"]`).focus(); } }, column.title, active ? (down ? ' ↓' : ' ↑') : ''));
  });
  return el('thead', {}, el('tr', {}, el('td'), ...heads, el('th', { scope: 'col', class: 'left plain' }, 'Completion')));
}

const table = el('table', { class: 'rows' });
const count = el('span', { role: 'status' });
const pages = el('span', {});

function render() {
  const numPages = Math.max(1, Math.ceil(found.length / PAGE_ROWS));
  const page = Math.min(numPages, Math.max(1, Number.parseInt(state.page, 10) || 1));
  const shown = found.slice((page - 1) * PAGE_ROWS, page * PAGE_ROWS);
  const open = opened();
  const body = el('tbody', {});
  for (const i of shown) {
    body.append(cells(data.rows[i], i, open.has(i)));
    if (open.has(i)) body.append(detail(data.rows[i], columns.length + 2));
  }
  if (!shown.length) body.append(el('tr', {}, el('td', { class: 'left none', colspan: columns.length + 2 }, data.rows.length ? 'No completion matches these filters.' : 'There is no completion to show.')));
  table.replaceChildren(header(), body);
  const rewards = found.map((i) => data.rows[i][REWARD]).filter(known);
  const mean = rewards.length ? `, mean reward ${short(rewards.reduce((sum, value) => sum + value, 0) / rewards.length)}` : '';
  count.textContent = `${found.length.toLocaleString('en')} of ${data.rows.length.toLocaleString('en')} match${mean}`;
  const turn = (name, target) => el('button', { type: 'button', disabled: target < 1 || target > numPages, onclick: () => change({ page: String(target) }) }, name);
  pages.replaceChildren(turn('Previous', page - 1), `page ${page} of ${numPages}`, turn('Next', page + 1));
}

const controls = {};
function change(wanted) {
  Object.assign(state, { page: '1', open: '' }, wanted);
  for (const [name, show] of Object.entries(controls)) show(state[name]);
  search();
  writeAddress();
  render();
}

function input(name, label, attributes = {}, className = null) {
  let timer = 0;
  const box = el('input', { name, autocomplete: 'off', ...attributes, oninput: () => {
    clearTimeout(timer);
    timer = setTimeout(() => change({ [name]: box.value }), 140);
  } });
  controls[name] = (value) => { if (box.value !== value) box.value = value; };
  return el('label', { class: className }, label, box);
}

function select(name, label, options) {
  const box = el('select', { name, onchange: () => change({ [name]: box.value }) }, ...options.map(([value, text]) => el('option', { value }, text)));
  controls[name] = (value) => { box.value = value; };
  return el('label', {}, label, box);
}

function range(name, label) {
  const bound = (which) => el('input', { type: 'number', step: 'any', 'aria-label': `${label}, ${which}`, placeholder: which, onchange: () => change({ [name]: low.value || high.value ? `${low.value}..${high.value}` : '' }) });
  const [low, high] = [bound('from'), bound('to')];
  controls[name] = (value) => {
    const [from, to] = parseRange(value) ?? ['', ''];
    low.value = Number.isFinite(from) ? from : '';
    high.value = Number.isFinite(to) ? to : '';
  };
  return el('div', { class: 'range', role: 'group', 'aria-label': label }, label, el('span', { class: 'pair' }, low, high));
}

function setUpBrowser() {
  const any = ['', 'any'];
  const filters = el('form', { class: 'filters', role: 'search', 'aria-label': 'Filter the transcripts', onsubmit: (event) => event.preventDefault() },
    input('q', 'Search prompts and completions', { type: 'search', placeholder: 'words, or "an exact phrase"' }, 'wide'),
    select('stage', 'Stage', [any, ...data.stages.map((stage) => [stage, stageName(stage)])]),
    range('steps', 'Steps'), range('reward', 'Reward'),
    select('criterion', 'Criterion', [any, ...data.criteria.map((name) => [name, name])]),
    select('is', 'is', [any, ['zero', 'zero'], ['positive', 'above zero'], ['negative', 'below zero'], ['failed', 'failed'], ['none', 'without value']]),
    select('stop', 'Stopped by', [any, ...data.stops.map((stop) => [stop || 'none', stop || 'none'])]),
    el('button', { type: 'button', onclick: () => change({ ...FIELDS }) }, 'Clear'));
  table.addEventListener('click', (event) => {
    const row = event.target.closest('tr.row');
    if (!row || String(getSelection())) return;
    const i = Number(row.dataset.row);
    const open = opened();
    if (!open.delete(i)) open.add(i);
    change({ page: state.page, open: [...open].join('-') });
    table.querySelector(`tr[data-row="${i}"] .expand`)?.focus();
  });
  byId('browser').append(filters, el('div', { class: 'bar' }, count, pages), el('div', { class: 'scroll' }, table));
  openStep = (stage, step) => {
    if (!data.rows.some((row) => row[STEP] === step && data.stages[row[STAGE]] === stage)) return;
    change({ ...FIELDS, stage, steps: String(step) });
    byId('transcripts').scrollIntoView();
  };
  const arrive = () => {
    const ours = readAddress();
    for (const [name, show] of Object.entries(controls)) show(state[name]);
    search();
    render();
    if (ours) byId('transcripts').scrollIntoView({ behavior: 'instant' });
  };
  addEventListener('hashchange', arrive);
  arrive();
}
setUpBrowser();
