// Before/after dots, reward histograms and curve panels, drawn at the width they have.
const SERIES_COLOURS = ['--stage', '--teal', '--plum', '--olive', '--grey', '--blue', '--rose', '--sand'];
const OTHER = 'Other metrics';
const MOST_UNGROUPED = 8; // a stage with no more panels than this has one grid without headings
const LOG_FROM = 30; // a positive series whose maximum is this many times its median has a logarithmic axis

function legend(entries) {
  return el('p', { class: 'legend' }, ...entries.map(([name, colour]) => el('span', {}, tint(el('i'), '--series', colour), name)));
}

// Dots with intervals: one row per metric, one dot per model.
function dotChart(host, title, field, percent) {
  const models = charts.evaluations.filter((model) => Object.keys(model[field]).length);
  const names = [...new Set(models.flatMap((model) => Object.keys(model[field])))];
  if (!names.length) return;
  const width = Math.max(280, host.clientWidth);
  const rowHeight = 16 + 13 * models.length;
  const height = names.length * rowHeight + 24;
  const widest = Math.min(14, Math.max(...names.map((name) => (percent ? 6 : name.length))));
  const left = 14 + widest * 7;
  const all = models.flatMap((model) => Object.values(model[field]).flat()).filter(known);
  let [low, high] = [Math.min(0, ...all), Math.max(...all)];
  if (low === 0 && high <= 1) high = 1;
  if (low === high) high = low + 1;
  const x = (value) => left + ((value - low) / (high - low)) * (width - left - 18);
  const chart = svg('svg', { viewBox: `0 0 ${width} ${height}`, role: 'img', 'aria-label': `${title}: the table below holds the numbers` });
  for (const tick of ticks(low, high, width < 420 ? 4 : 5)) {
    chart.append(
      svg('line', { class: tick === 0 ? 'axis' : 'gridline', x1: x(tick), x2: x(tick), y1: 0, y2: height - 20 }),
      svg('text', { x: x(tick), y: height - 5, 'text-anchor': 'middle' }, percent ? `${Math.round(tick * 100)}%` : short(tick)),
    );
  }
  names.forEach((name, row) => {
    const top = row * rowHeight;
    const text = percent ? `pass@${name}` : name;
    const label = svg('text', { class: 'label', x: 0, y: top + rowHeight / 2 + 4 }, text.length > 14 ? `${text.slice(0, 13)}…` : text, svg('title', {}, text));
    chart.append(label);
    if (row) chart.append(svg('line', { class: 'gridline', x1: 0, x2: width, y1: top, y2: top }));
    models.forEach((model, place) => {
      const value = Object.hasOwn(model[field], name) ? model[field][name] : null;
      if (!value) return;
      const [mean, from, to] = value;
      const y = top + 8 + 6.5 + 13 * place;
      const scale = (number) => (percent ? `${(100 * number).toFixed(1)}%` : number.toFixed(3));
      const tip = `${stageName(model.name)}, ${text}: ${scale(mean)}${known(from) && known(to) ? `\n95% CI ${scale(from)} to ${scale(to)}` : ''}`;
      const mark = svg('g', {
        onpointermove: (event) => showTip(tip, { x: event.clientX, y: event.clientY }), onpointerleave: hideTip,
      });
      mark.append(svg('rect', { x: left, y: y - 6.5, width: width - left, height: 13, fill: 'transparent' }));
      if (known(from) && known(to)) mark.append(svg('line', { class: 'ci', x1: x(from), x2: x(to), y1: y, y2: y }));
      mark.append(svg('circle', { class: 'dot', cx: x(mean), cy: y, r: 4.5 }));
      chart.append(tint(mark, '--stage', stageColour(model.name)));
    });
  });
  const key = legend(models.map((model) => [stageName(model.name), stageColour(model.name)]));
  host.replaceChildren(el('h3', {}, title), key, chart);
}

// Averages of the parts of a whole on top of each other: [lower, upper] of every part at every step.
function layersOf(panel) {
  const sums = panel.series[0].ema.map(() => 0);
  return panel.series.map((line) => line.ema.map((value, i) => {
    const lower = sums[i];
    sums[i] += value ?? 0;
    return [lower, sums[i]];
  }));
}

function scaleOf(panel) {
  if (panel.stacked) return { log: false, low: 0, high: 1.06 * Math.max(...layersOf(panel).at(-1).map(([, upper]) => upper)) || 1 };
  const values = panel.series.flatMap((line) => line.raw).filter(known);
  let low = Math.min(...values);
  let high = Math.max(...values);
  const median = [...values].sort((a, b) => a - b)[values.length >> 1];
  const log = low > 0 && high > LOG_FROM * median;
  if (log) return { log, low: 10 ** Math.floor(Math.log10(low)), high: 10 ** Math.ceil(Math.log10(high)) };
  if (low > 0 && low < 0.35 * high) low = 0;
  if (panel.unit === 'fraction' && low >= 0 && high <= 1) [low, high] = [high < 0.5 || low < 0.5 ? 0 : low, high < 0.5 ? high : 1];
  const pad = (high - low || Math.abs(high) || 1) * 0.06;
  return { log, low: low === 0 ? 0 : low - pad, high: high === 1 && panel.unit === 'fraction' ? 1 : high + pad };
}

function yTicks({ log, low, high }) {
  if (!log) return ticks(low, high, 5);
  const first = Math.round(Math.log10(low));
  const count = Math.round(Math.log10(high)) - first;
  const every = Math.ceil(count / 4);
  return Array.from({ length: Math.floor(count / every) + 1 }, (_, i) => 10 ** (first + i * every));
}

function describe(stage, panel) {
  const lines = panel.series.map((line) => {
    const name = panel.series.length > 1 ? `${line.label}: ` : '';
    if (!line.count) return `${name}no finite value`;
    return `${name}${short(line.first)} at first, ${short(line.last)} at last, lowest ${short(line.min[0])} at step ${line.min[1]}, highest ${short(line.max[0])} at step ${line.max[1]}`;
  });
  return `${panel.title}${panel.unit ? `, ${panel.unit}` : ''}, ${stageName(stage.name)}. ${lines.join('. ')}. Arrow keys read single steps.`;
}

// Draw one panel into its figure; returns what the shared cursor of the stage needs.
function drawPanel(stage, panel, figure, link) {
  const width = Math.max(220, figure.clientWidth || 300);
  const height = 158;
  const box = { left: 44, right: width - 8, top: 8, bottom: height - 20 };
  const steps = stage.steps;
  const span = Math.max(1, steps[steps.length - 1] - steps[0]);
  const scale = scaleOf(panel);
  const project = scale.log ? Math.log10 : (value) => value;
  const x = (step) => (steps.length === 1 ? (box.left + box.right) / 2 : box.left + ((step - steps[0]) / span) * (box.right - box.left));
  const y = (value) => box.bottom - ((project(value) - project(scale.low)) / (project(scale.high) - project(scale.low))) * (box.bottom - box.top);
  const chart = svg('svg', { viewBox: `0 0 ${width} ${height}`, tabindex: 0, role: 'img', 'aria-label': describe(stage, panel) });
  for (const tick of yTicks(scale)) {
    chart.append(
      svg('line', { class: 'gridline', x1: box.left, x2: box.right, y1: y(tick), y2: y(tick) }),
      svg('text', { x: box.left - 6, y: y(tick) + 4, 'text-anchor': 'end' }, short(tick)),
    );
  }
  chart.append(svg('line', { class: 'axis', x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom }));
  const marks = steps.length === 1 ? steps : ticks(steps[0], steps[steps.length - 1], 4).filter(Number.isInteger);
  marks.forEach((step, place) => {
    const last = place === marks.length - 1;
    const attributes = { x: Math.min(x(step), box.right), y: height - 5, 'text-anchor': last && x(step) > box.right - 30 ? 'end' : 'middle' };
    chart.append(svg('text', attributes, last ? `step ${step}` : String(step)));
  });
  const radius = steps.length > 400 ? 1.1 : 1.7;
  // A single step is drawn as a bar.
  const places = steps.length === 1 ? [box.left, box.right] : steps.map(x);
  const values = (layer) => (steps.length === 1 ? [layer[0], layer[0]] : layer);
  if (panel.stacked) layersOf(panel).forEach((layer, place) => {
    const edge = (side) => values(layer).map((ends, i) => `${places[i].toFixed(1)},${y(ends[side]).toFixed(1)}`);
    const area = svg('polygon', { class: 'layer', points: [...edge(1), ...edge(0).reverse()].join(' ') });
    chart.append(tint(area, '--series', `var(${SERIES_COLOURS[place % SERIES_COLOURS.length]})`));
  });
  else panel.series.forEach((line, place) => {
    const group = tint(svg('g'), '--series', `var(${SERIES_COLOURS[place % SERIES_COLOURS.length]})`);
    const points = line.raw.map((value, i) => (known(value) ? `M${x(steps[i]).toFixed(1)} ${y(value).toFixed(1)}m-${radius} 0a${radius} ${radius} 0 1 0 ${2 * radius} 0a${radius} ${radius} 0 1 0 -${2 * radius} 0` : '')).join('');
    group.append(svg('path', { class: 'raw', d: points }));
    const path = line.ema.map((value, i) => (known(value) ? `${x(steps[i]).toFixed(1)},${y(value).toFixed(1)}` : null)).filter(known);
    group.append(svg('polyline', { class: 'ema', points: path.join(' ') }));
    for (const step of line.bad) group.append(svg('path', { class: 'bad', d: `M${x(step) - 3} ${box.top}l6 6m0 -6l-6 6` }, svg('title', {}, `not finite at step ${step}`)));
    chart.append(group);
  });
  const cursor = svg('g', { visibility: 'hidden' });
  chart.append(cursor);
  const at = (i) => {
    cursor.setAttribute('visibility', i === null ? 'hidden' : 'visible');
    if (i === null) return;
    const dots = panel.stacked ? [] : panel.series.map((line, place) => (known(line.raw[i]) ? tint(svg('circle', { class: 'at', cx: x(steps[i]), cy: y(line.raw[i]), r: 3.2 }), '--series', `var(${SERIES_COLOURS[place % SERIES_COLOURS.length]})`) : null));
    cursor.replaceChildren(svg('line', { class: 'cursor', x1: x(steps[i]), x2: x(steps[i]), y1: box.top, y2: box.bottom }), ...dots.filter(known));
  };
  listen(chart, stage, panel, link, { x, width });
  figure.querySelector('svg')?.remove();
  figure.append(chart);
  return at;
}

function listen(chart, stage, panel, link, { x, width }) {
  const { steps } = stage;
  let current = null;
  const show = (i, place) => {
    current = i;
    link.move(i);
    const lines = panel.series.map((line) => {
      const name = panel.series.length > 1 ? `${line.label}  ` : '';
      return `${name}${line.raw[i] ?? 'no value'}${known(line.ema[i]) ? `   average ${short(line.ema[i])}` : ''}`;
    });
    showTip(`step ${steps[i]}\n${lines.join('\n')}`, place);
  };
  const hide = () => { current = null; link.move(null); hideTip(); };
  chart.addEventListener('pointermove', (event) => {
    const bounds = chart.getBoundingClientRect();
    const place = ((event.clientX - bounds.left) / bounds.width) * width;
    let nearest = 0;
    steps.forEach((step, i) => { if (Math.abs(x(step) - place) < Math.abs(x(steps[nearest]) - place)) nearest = i; });
    show(nearest, { x: event.clientX, y: event.clientY });
  });
  chart.addEventListener('pointerleave', hide);
  chart.addEventListener('blur', hide);
  chart.addEventListener('click', () => { if (current !== null) openStep(stage.name, steps[current]); });
  chart.addEventListener('keydown', (event) => {
    const last = steps.length - 1;
    const from = current ?? last;
    const target = { ArrowLeft: Math.max(0, from - 1), ArrowRight: Math.min(last, from + 1), Home: 0, End: last }[event.key];
    if (event.key === 'Escape') hide();
    if (event.key === 'Enter' && current !== null) openStep(stage.name, steps[current]);
    if (target === undefined) return;
    event.preventDefault();
    const bounds = chart.getBoundingClientRect();
    show(target, { x: bounds.left + (x(steps[target]) / width) * bounds.width, y: bounds.top + 20 });
  });
}

function histogram(data, figure) {
  const width = Math.max(220, figure.clientWidth || 300);
  const height = 158;
  const box = { left: 44, right: width - 8, top: 8, bottom: height - 20 };
  const top = Math.max(...data.early.shares, ...data.late.shares) * 1.06;
  const bins = data.early.shares.length;
  const x = (value) => box.left + ((value - data.low) / (data.high - data.low)) * (box.right - box.left);
  const edge = (i) => box.left + (i / bins) * (box.right - box.left);
  const y = (share) => box.bottom - (share / top) * (box.bottom - box.top);
  const outline = (shares) => `M${edge(0)} ${box.bottom}${shares.map((share, i) => `V${y(share).toFixed(1)}H${edge(i + 1).toFixed(1)}`).join('')}V${box.bottom}`;
  const steps = ({ first, last }) => (first === last ? `step ${first}` : `steps ${first}–${last}`);
  const part = (side) => `${steps(side)} (${side.count.toLocaleString('en')} completions)`;
  const chart = svg('svg', { viewBox: `0 0 ${width} ${height}`, role: 'img', 'aria-label': `Distribution of rewards: ${part(data.early)} against ${part(data.late)}` });
  for (const tick of ticks(0, top, 3)) {
    chart.append(
      svg('line', { class: 'gridline', x1: box.left, x2: box.right, y1: y(tick), y2: y(tick) }),
      svg('text', { x: box.left - 6, y: y(tick) + 4, 'text-anchor': 'end' }, `${Math.round(tick * 100)}%`),
    );
  }
  for (const tick of ticks(data.low, data.high, 4)) chart.append(svg('text', { x: x(tick), y: height - 5, 'text-anchor': 'middle' }, short(tick)));
  chart.append(svg('path', { class: 'early', d: outline(data.early.shares) }), svg('path', { class: 'late', d: outline(data.late.shares) }));
  chart.append(svg('line', { class: 'axis', x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom }));
  const caption = el('figcaption', {}, el('span', {}, el('b', {}, 'Rewards, early and late'), ' ', el('small', {}, 'share')));
  const key = legend([[steps(data.early), 'var(--grey)'], [steps(data.late), 'var(--stage)']]);
  figure.replaceChildren(caption, key, chart);
}

function panelFigure(panel) {
  const [line] = panel.series;
  const single = panel.series.length === 1;
  const last = single ? line.ema[line.ema.length - 1] : null;
  const title = el('span', { title: panel.metric }, el('b', {}, panel.title), panel.unit ? ' ' : null, panel.unit ? el('small', {}, panel.unit) : null);
  const figure = el('figure', { class: 'panel' }, el('figcaption', {}, title, known(last) ? el('span', { class: 'now' }, short(last)) : null));
  const bad = panel.series.reduce((sum, each) => sum + each.bad.length, 0);
  if (bad) figure.append(el('p', { class: 'warn' }, `${bad} ${bad === 1 ? 'value is' : 'values are'} not finite`));
  if (!single) figure.append(legend(panel.series.map((each, i) => [each.label, `var(${SERIES_COLOURS[i % SERIES_COLOURS.length]})`])));
  return figure;
}

// One stage: panels under the headings of their groups, with one cursor for all.
function stageSection(stage, draws) {
  const thinned = stage.stride > 1 ? `, every ${stage.stride}th drawn; averages and extremes over all` : '';
  const heading = el('h3', {}, stageName(stage.name), ' ', el('small', {}, `${stage.num_steps.toLocaleString('en')} steps logged${thinned}`));
  const section = tint(el('div', { class: 'stage' }, heading), '--stage', stageColour(stage.name));
  const cursors = new Map();
  const link = { move: (i) => cursors.forEach((at) => at(i)) };
  const grouped = stage.panels.filter((panel) => panel.group !== OTHER).length > MOST_UNGROUPED;
  const groupOf = (panel) => (grouped || panel.group === OTHER ? panel.group : stage.panels[0].group);
  for (const group of new Set(stage.panels.map(groupOf))) {
    const grid = el('div', { class: 'grid' });
    for (const panel of stage.panels.filter((each) => groupOf(each) === group)) {
      const figure = panelFigure(panel);
      grid.append(figure);
      if (panel.series.some((line) => line.count)) draws.push(() => cursors.set(panel, drawPanel(stage, panel, figure, link)));
      else figure.append(el('p', { class: 'empty' }, 'No finite value was logged.'));
    }
    const bins = group === stage.panels[0].group && charts.histograms.find((each) => each.stage === stage.name);
    if (bins) {
      const figure = el('figure', { class: 'panel' });
      grid.append(figure);
      draws.push(() => histogram(bins, figure));
    }
    if (group !== OTHER) section.append(...(grouped ? [el('h4', {}, group)] : []), grid);
    else section.append(el('details', { ontoggle: redraw }, el('summary', {}, `${group} `, el('small', {}, String(grid.childElementCount))), grid));
  }
  return section;
}

const draws = [];
function redraw() { for (const draw of draws) draw(); }
function setUpCharts() {
  const host = byId('panels');
  host.append(...charts.curves.map((stage) => stageSection(stage, draws)));
  if (!charts.curves.length) host.append(el('p', { class: 'empty' }, 'No metric was logged.'));
  const fields = [['Solved problems', 'pass', true], ['Criteria, mean', 'criteria', false]];
  for (const [title, field, percent] of fields) {
    if (!charts.evaluations.some((model) => Object.keys(model[field]).length)) continue;
    const box = el('figure', {});
    byId('dots').append(box);
    draws.push(() => dotChart(box, title, field, percent));
  }
  redraw();
  let width = innerWidth;
  let timer = 0;
  addEventListener('resize', () => {
    if (innerWidth === width) return;
    width = innerWidth;
    clearTimeout(timer);
    timer = setTimeout(redraw, 120);
  });
}
setUpCharts();
