// The floor plan: every core with its tiles, coloured by how full they are.

const STEPS = [0.25, 0.5, 0.75, 0.999];
const CELL = 15;

function fullness(share) {
  return `full-${STEPS.filter((step) => share >= step).length}`;
}

function floorPlan(panel) {
  const { floor, ops } = panel.tree.data;
  const head = (text) => el('header', {}, el('h2', {}, 'Floor plan'), el('p', {}, text));
  if (floor.why) {
    return [head(`There is none: ${floor.why}.`)];
  }
  const layers = new Map(floor.cores.map(([core]) => [core, []]));
  floor.layers.forEach((layer) => layers.get(layer.core).push(layer));
  const side = Math.ceil(Math.sqrt(floor.tiles));
  const most = 64;
  const cores = floor.cores.slice(0, most).map(([core, used]) => el('figure', { class: 'core' },
    drawCore(panel, core, used, layers.get(core), side),
    el('figcaption', {}, `core ${core + 1}: ${used} of ${floor.tiles}`)));
  const key = ['below 25 %', '25 % or more', '50 % or more', '75 % or more', 'full'].map((text, index) => el('li', {}, el('span', { class: `tile full-${index}`, 'aria-hidden': 'true' }), text));
  const rows = floor.layers.map((layer) => {
    const tiles = layer.runs.reduce((sum, [, times]) => sum + times, 0);
    const share = layer.runs.reduce((sum, [value, times]) => sum + value * times, 0) / tiles;
    return [panel.link(panel.tree.byId.get(`op:${layer.op}`), ops[layer.op].path || ops[layer.op].name), String(layer.core + 1), String(tiles), `${(100 * share).toFixed(1)} %`];
  });
  return [
    head(`${count(floor.used)} tiles on ${plural(floor.cores.length, 'core')}. ${(100 * floor.utilisation).toFixed(1)} % of the devices of used tiles hold a weight.`),
    el('ul', { class: 'key' }, ...key, el('li', {}, el('span', { class: 'tile', 'aria-hidden': 'true' }), 'not used')),
    el('div', { class: 'cores' }, ...cores),
    ...(floor.cores.length > most ? [el('p', {}, `and ${floor.cores.length - most} more cores`)] : []),
    section('Layers', table(['layer', 'core', 'tiles', 'devices used'], rows)),
  ];
}

function drawCore(panel, core, used, layers, side) {
  const { tiles } = panel.tree.data.floor;
  const rows = Math.ceil(tiles / side);
  const svg = mark('svg', { class: 'tiles', width: side * CELL + 1, height: rows * CELL + 1, role: 'img', 'aria-label': `core ${core + 1}: ${used} of ${tiles} tiles used` });
  const place = (index) => ({ x: (index % side) * CELL + 1, y: Math.floor(index / side) * CELL + 1, width: CELL - 2, height: CELL - 2 });
  for (let index = used; index < tiles; index++) {
    svg.append(mark('rect', { ...place(index), class: 'tile' }));
  }
  for (const layer of layers) {
    const { path, name } = panel.tree.data.ops[layer.op];
    let at = layer.first;
    for (const [share, times] of layer.runs) {
      for (let more = 0; more < times; more++, at++) {
        const cell = mark('rect', { ...place(at), class: `tile ${fullness(share)}` }, mark('title', {}, `${path || name}: ${(100 * share).toFixed(1)} % of its devices used`));
        cell.addEventListener('click', () => panel.goTo(panel.tree.byId.get(`op:${layer.op}`)));
        svg.append(cell);
      }
    }
  }
  return svg;
}
