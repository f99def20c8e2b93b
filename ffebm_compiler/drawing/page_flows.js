// Conversions as a Sankey diagram, and latency as a timeline.

const FLOW = { width: 440, bar: 9, least: 1.2, rank: 46 };

// Every arrow of the first view is as wide as the values that it converts; all widths add up to the plan's conversions.
function conversions(panel, stages) {
  const { items, edges } = stages.folded(panel.tree.root.items, panel.tree.arrows);
  const flows = edges.map((edge) => ({ edge, values: edge.adc + edge.dac })).filter(({ values }) => values);
  const shown = flows.reduce((sum, flow) => sum + flow.values, 0);
  const total = panel.tree.arrows.reduce((sum, edge) => sum + edge.adc + edge.dac, 0);
  const head = el('header', {}, el('h2', {}, 'Conversions'), el('p', {}, total
    ? `${count(total)} values per sample cross a converter. An arrow is as wide as the values that it converts, in the DAC before a block or the ADC behind it.${shown < total ? ` ${count(total - shown)} of them are inside of folded stages.` : ''}`
    : 'No value crosses a converter.'));
  if (!total) {
    return [head];
  }
  const sum = (list) => list.reduce((all, flow) => all + flow.values, 0);
  const used = items.filter((item) => flows.some(({ edge }) => edge.from === item || edge.to === item));
  const peak = Math.max(...used.map((item) => Math.max(sum(flows.filter(({ edge }) => edge.from === item)), sum(flows.filter(({ edge }) => edge.to === item)))));
  const wide = (values) => Math.max(FLOW.least, (170 * values) / peak);
  const widthOf = (list) => list.reduce((all, flow) => all + wide(flow.values), 0);
  const ends = new Map(used.map((item) => [item, { out: flows.filter(({ edge }) => edge.from === item), into: flows.filter(({ edge }) => edge.to === item) }]));
  const nodes = used.map((item) => ({ v: item.id, item, width: Math.max(4, widthOf(ends.get(item).out), widthOf(ends.get(item).into)), height: FLOW.bar }));
  const byId = new Map(nodes.map((node) => [node.v, node]));
  const links = flows.map((flow) => ({ v: flow.edge.from.id, w: flow.edge.to.id, minlen: 1, weight: 1, labelpos: 'r', labeloffset: 1, width: wide(flow.values), height: 1, flow }));
  layout(nodes, links, { nodesep: 96, ranksep: FLOW.rank, edgesep: 8, rankdir: 'TB' }, {});
  // Flows leave and enter side by side, in the order of where they come from and go to.
  const starts = new Map();
  const stops = new Map();
  for (const node of nodes) {
    for (const [list, other, offsets] of [[links.filter((link) => link.v === node.v), 'w', starts], [links.filter((link) => link.w === node.v), 'v', stops]]) {
      const order = [...list].sort((a, b) => byId.get(a[other]).x - byId.get(b[other]).x);
      let x = node.x - order.reduce((all, link) => all + link.width, 0) / 2;
      for (const link of order) {
        offsets.set(link, x + link.width / 2);
        x += link.width;
      }
    }
  }
  const svg = mark('svg', { class: 'flows', role: 'img', 'aria-label': `conversions: ${flows.length} arrows, ${count(total)} values per sample` });
  const box = { left: 0, right: 0, bottom: 0 };
  for (const link of links) {
    const [from, to] = [byId.get(link.v), byId.get(link.w)];
    const through = link.points.slice(1, -1).filter((point) => point.y > from.y + 20 && point.y < to.y - 20);
    const points = [{ x: starts.get(link), y: from.y + FLOW.bar / 2 }, ...through, { x: stops.get(link), y: to.y - FLOW.bar / 2 }];
    let path = `M${points[0].x.toFixed(1)},${points[0].y.toFixed(1)}`;
    points.slice(1).forEach((b, index) => {
      const a = points[index];
      const middle = ((a.y + b.y) / 2).toFixed(1);
      path += `C${a.x.toFixed(1)},${middle} ${b.x.toFixed(1)},${middle} ${b.x.toFixed(1)},${b.y.toFixed(1)}`;
      box.right = Math.max(box.right, b.x + link.width / 2);
    });
    const { edge } = link.flow;
    const words = [edge.dac ? `DAC ${count(edge.dac)}` : '', edge.adc ? `ADC ${count(edge.adc)}` : ''].filter(Boolean).join(', ');
    const ribbon = mark('path', { d: path, class: `flow ${edge.dac && edge.adc ? 'both' : edge.dac ? 'dac' : 'adc'}`, 'stroke-width': link.width.toFixed(2) }, mark('title', {}, `${edge.from.title} → ${edge.to.title}: ${words}`));
    ribbon.addEventListener('click', () => panel.goToEdge(edge));
    svg.append(ribbon);
  }
  for (const node of nodes) {
    const name = node.item.short ?? (node.item.input ? node.item.input.name : node.item.title);
    svg.append(
      mark('rect', { x: node.x - node.width / 2, y: node.y - FLOW.bar / 2, width: node.width, height: FLOW.bar, class: node.item.domain }),
      mark('text', { x: node.x + node.width / 2 + 5, y: node.y + 4 }, shorten(name, 20)),
    );
    box.left = Math.min(box.left, node.x - node.width / 2);
    box.right = Math.max(box.right, node.x + node.width / 2 + 96);
    box.bottom = Math.max(box.bottom, node.y + FLOW.bar);
  }
  const width = box.right - box.left + 8;
  svg.setAttribute('viewBox', `${box.left - 4} -4 ${width} ${box.bottom + 8}`);
  svg.setAttribute('width', String(width));
  svg.setAttribute('height', String(box.bottom + 8));
  const rows = [...flows].sort((a, b) => b.values - a.values).slice(0, 40).map(({ edge, values }) => [
    el('button', { type: 'button', class: 'link', onclick: () => panel.goToEdge(edge) }, `${edge.from.title} → ${edge.to.title}`),
    edge.dac ? count(edge.dac) : '', edge.adc ? count(edge.adc) : '', `${((100 * values) / total).toFixed(1)} %`]);
  const key = [['dac', 'DAC: into a block'], ['adc', 'ADC: out of a block'], ['both', 'ADC and DAC: from block to block']];
  return [head,
    el('ul', { class: 'key' }, ...key.map(([name, text]) => el('li', {}, el('span', { class: `tile ${name}`, 'aria-hidden': 'true' }), text))),
    el('div', { class: 'scroll' }, svg),
    section('The largest', table(['arrow', 'DAC', 'ADC', 'share'], rows)),
  ];
}

function timeline(panel) {
  const { rows, total, missing, unsettled } = panel.tree.data.costs.timeline;
  const head = (...texts) => el('header', {}, el('h2', {}, 'Latency of one inference'), ...texts.map((text) => el('p', {}, text)));
  const needs = [
    ...(missing.length ? [`Unknown: ${missing.join(', ')}. Hardware(costs={…}) gives them.`] : []),
    ...(unsettled.length ? [`Nothing predicts the sweeps of ${unsettled.join(', ')}.`] : []),
  ];
  if (!rows.length) {
    return [head('There is no timeline: no source gives the times of this hardware.', ...needs)];
  }
  const homes = new Map(panel.tree.root.items.filter((item) => item.record).map((item) => [item.record.title, item]));
  const last = rows.reduce((sum, row) => sum + row[2], 0);
  let low = 0;
  let high = 0;
  const bars = rows.map(([name, least, most, text]) => {
    const bar = el('div', { class: 'row' },
      el('span', { class: 'what' }, panel.link(homes.get(name), name)),
      el('span', { class: 'track', role: 'img', 'aria-label': `${name}: ${text}` },
        el('i', { class: `span ${homes.get(name).domain}`, title: `${name}: ${text}`, style: `left:${((100 * low) / last).toFixed(3)}%;width:${Math.max(0.4, (100 * (high + most - low)) / last).toFixed(3)}%` })),
      el('span', { class: 'took' }, text));
    low += least;
    high += most;
    return bar;
  });
  return [
    head(`Modelled: ${total}, one after the other. A bar spans from the earliest start to the latest end.`, ...needs),
    el('div', { class: 'timeline' }, ...bars),
  ];
}
