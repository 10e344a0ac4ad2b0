// Elements, numbers, colours and the tooltip. Text of a run enters the page through text nodes and attributes only.
const SVG = 'http://www.w3.org/2000/svg';

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith('on')) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? '' : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}
const el = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes = {}, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);
const byId = (id) => document.getElementById(id);
const readJson = (id) => JSON.parse(byId(id).textContent);
const known = (value) => value !== null && value !== undefined;

const charts = readJson('charts-data');
const stageName = (stage) => (Object.hasOwn(charts.names, stage) ? charts.names[stage] : stage);
const STAGE_COLOURS = ['--blue', '--copper', '--teal', '--plum', '--olive'];
const stageOrder = [...new Set([
  ...charts.curves.map((stage) => stage.name),
  ...charts.evaluations.map((evaluation) => evaluation.name).filter((name) => name !== 'raw'),
])];
function stageColour(stage) {
  const place = stageOrder.indexOf(stage);
  // A lone stage has the accent; otherwise the last of two stages (the RL one) does.
  const shift = stageOrder.length === 1 ? 1 : 0;
  return place < 0 ? 'var(--grey)' : `var(${STAGE_COLOURS[(place + shift) % STAGE_COLOURS.length]})`;
}
function tint(node, property, colour) {
  node.style.setProperty(property, colour);
  return node;
}

function short(value) {
  if (!known(value)) return '–';
  const size = Math.abs(value);
  if (size === 0) return '0';
  if (size >= 1e6 || size < 1e-3) return value.toExponential(1).replace('.0e', 'e').replace('e+', 'e').replace('-', '−').replace('e-', 'e−');
  if (size >= 1000) return Math.round(value).toLocaleString('en');
  return String(Number(value.toPrecision(3))).replace('-', '−');
}

function ticks(low, high, count) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((size) => size >= rough * 0.999);
  const result = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i += 1) result.push(Number((i * step).toPrecision(12)));
  return result;
}

function showTip(text, box) {
  const tip = byId('tip');
  tip.textContent = text;
  tip.hidden = false;
  const left = Math.min(Math.max(8, box.x + 14), innerWidth - tip.offsetWidth - 8);
  const top = box.y + 16 + tip.offsetHeight > innerHeight ? box.y - tip.offsetHeight - 10 : box.y + 16;
  tip.style.transform = `translate(${Math.round(left)}px, ${Math.round(Math.max(4, top))}px)`;
}
const hideTip = () => { byId('tip').hidden = true; };

const theme = byId('theme');
const isDark = () => (document.documentElement.dataset.theme ?? (matchMedia('(prefers-color-scheme: dark)').matches ? 'dark' : 'light')) === 'dark';
const nameTheme = () => { theme.textContent = isDark() ? 'Light mode' : 'Dark mode'; };
theme.addEventListener('click', () => {
  document.documentElement.dataset.theme = isDark() ? 'light' : 'dark';
  nameTheme();
});
theme.hidden = false;
nameTheme();

for (const tile of document.querySelectorAll('.tile')) tint(tile, '--stage', stageColour(tile.dataset.stage));

// Set by the transcript browser: shows the completions of one step.
let openStep = () => {};
