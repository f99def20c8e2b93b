// What was measured, to be moved through: loop gains, and the states of a block sweep by sweep.

// The slider stops at measured points alone. Each shows its deviations on the blocks.
function loopGains(panel, view) {
  const { points, label } = panel.tree.data.gains;
  const told = el('div', { role: 'status' });
  const slider = el('input', { type: 'range', name: 'gain', min: '0', max: String(points.length - 1), step: '1', value: '0', 'aria-label': 'loop gain κ' });
  const number = (value) => (value === null ? 'not finite' : short(value));
  const top = Math.max(0, ...points.flatMap((point) => Object.values(point.blocks).filter((value) => value !== null))) || 1;
  const show = () => {
    const point = points[Number(slider.value)];
    slider.setAttribute('aria-valuetext', `κ ${short(point.feedback)}`);
    told.replaceChildren(facts([
      ['loop gain κ', short(point.feedback)], ['deviation at the output', number(point.output)],
      ...(point.value === null ? [] : [[label, number(point.value)]]),
      ['most sweeps of a block', String(Math.max(0, ...Object.values(point.sweeps)))],
    ]));
    const values = Object.entries(point.blocks).map(([block, value]) => [block, { text: `deviation ${number(value)}`, share: value === null ? 1 : value / top }]);
    view.picture.overlay = { name: `deviation at κ ${point.feedback}`, values: Object.fromEntries(values) };
    view.redraw(null);
  };
  slider.addEventListener('input', show);
  view.measuring = true;
  view.report(
    el('header', {}, el('h2', {}, 'Loop gain'), el('p', {}, `Measured at ${plural(points.length, 'loop gain')}: deviation from the source, ‖hybrid − source‖/‖source‖. The bars on the blocks are theirs.`)),
    el('label', { class: 'slide' }, 'κ ', slider), told,
    table(['κ', 'deviation', ...(label ? [label] : [])], points.map((point) => [short(point.feedback), number(point.output), ...(label ? [number(point.value)] : [])])),
  );
  show();
}

const SWATCH = { width: 7, height: 16, gap: 4 };

// The states of one sample, a row for each layer, a cell for each value that was kept.
function settling(states) {
  const top = Math.max(...states.flat(2).map((value) => Math.abs(value ?? 0))) || 1;
  const rows = states[0];
  const width = 60 + Math.max(...rows.map((row) => row.length)) * SWATCH.width;
  const height = rows.length * (SWATCH.height + SWATCH.gap);
  const svg = mark('svg', { class: 'states', viewBox: `0 0 ${width} ${height}`, width, height, role: 'img' });
  const cells = rows.map((row, index) => {
    const y = index * (SWATCH.height + SWATCH.gap);
    svg.append(mark('text', { x: 0, y: y + 12 }, `state ${index + 1}`));
    return row.map((_, at) => {
      const cell = mark('rect', { x: 58 + at * SWATCH.width, y, width: SWATCH.width - 1, height: SWATCH.height });
      svg.append(cell);
      return cell;
    });
  });
  const slider = el('input', { type: 'range', name: 'sweep', min: '0', max: String(states.length - 1), step: '1', value: '0', 'aria-label': 'sweep' });
  const told = el('span', {}, '');
  const show = () => {
    const sweep = Number(slider.value);
    told.textContent = sweep ? ` after sweep ${sweep}` : ' at the feedforward values';
    slider.setAttribute('aria-valuetext', told.textContent.trim());
    svg.setAttribute('aria-label', `states${told.textContent}`);
    states[sweep].forEach((row, index) => row.forEach((value, at) => {
      cells[index][at].setAttribute('class', value === null || value < 0 ? 'below' : 'above');
      cells[index][at].setAttribute('fill-opacity', value === null ? '0' : (Math.abs(value) / top).toFixed(3));
    }));
  };
  let timer = 0;
  const play = el('button', { type: 'button', name: 'play', 'aria-label': 'play the sweeps' }, '▶');
  play.addEventListener('click', () => {
    clearInterval(timer);
    slider.value = '0';
    show();
    timer = setInterval(() => {
      if (!svg.isConnected || slider.value === slider.max) {
        clearInterval(timer);
        return;
      }
      slider.value = String(Number(slider.value) + 1);
      show();
    }, 450);
  });
  slider.addEventListener('input', () => { clearInterval(timer); show(); });
  show();
  return [el('p', { class: 'slide tools' }, play, slider, told), el('div', { class: 'scroll' }, svg),
    el('p', { class: 'quiet' }, `One sample, up to ${rows[0].length} values of each state. Blue is above 0, orange below; the strongest is ${short(top)}.`)];
}

// Two plans beside each other.
function differences(view) {
  const { panel } = view;
  const { rows, alone, blocks, names } = panel.tree.data.beside;
  const one = (title, paths) => (paths.length ? [section(title, list(paths))] : []);
  view.report(
    el('header', {}, el('h2', {}, 'Differences'), el('p', {}, 'Blocks with a magenta outline are not in the other plan: no block there has the same layers.')),
    table(['', ...names], rows),
    ...one(`Analog in ${names[0]} alone`, alone[0]), ...one(`Analog in ${names[1]} alone`, alone[1]),
    ...one(`Blocks of ${names[0]} alone`, blocks[0]), ...one(`Blocks of ${names[1]} alone`, blocks[1]),
  );
}
