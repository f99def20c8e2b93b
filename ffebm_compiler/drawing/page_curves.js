// A small curve along sweeps, as inline SVG. A null is a value that was not finite: a gap.

const FRAME = { width: 348, height: 128, left: 64, right: 12, top: 24, bottom: 22 };

function mark(name, attributes, ...children) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) {
    element.setAttribute(key, String(value));
  }
  element.append(...children);
  return element;
}

// At most three digits.
function short(value) {
  return value === 0 ? '0' : Math.abs(value) >= 1e-3 && Math.abs(value) < 1e5 ? String(Number(value.toPrecision(3))) : value.toExponential(1);
}

function curve(name, values, { first, logarithmic, until }) {
  const { width, height, left, right, top, bottom } = FRAME;
  const usable = (value) => value !== null && (!logarithmic || value > 0);
  const scale = (value) => (logarithmic ? Math.log10(value) : value);
  const heights = values.filter(usable).map(scale);
  const svg = mark('svg', { class: 'curve', viewBox: `0 0 ${width} ${height}`, role: 'img' },
    mark('text', { class: 'name', x: 2, y: 13 }, logarithmic ? `${name} (log)` : name));
  if (!heights.length) {
    svg.append(mark('text', { x: left, y: height / 2 }, 'no finite value above 0'));
    svg.setAttribute('aria-label', `${name}: no finite value above 0`);
    return svg;
  }
  const [low, high] = [Math.min(...heights), Math.max(...heights)];
  const last = first + values.length - 1;
  const x = (sweep) => left + ((width - left - right) * (sweep - first)) / Math.max(last - first, 1);
  const y = (value) => (high > low ? top + ((height - top - bottom) * (high - scale(value))) / (high - low) : (top + height - bottom) / 2);
  const [floor, ceiling] = [low, high].map((value) => (logarithmic ? 10 ** value : value));
  svg.append(
    mark('path', { class: 'axis', d: `M${left} ${top}V${height - bottom}H${width - right}` }),
    ...(high > low ? [mark('text', { x: left - 5, y: top + 5, 'text-anchor': 'end' }, short(ceiling))] : []),
    mark('text', { x: left - 5, y: high > low ? height - bottom : y(floor) + 4, 'text-anchor': 'end' }, short(floor)),
    mark('text', { x: left, y: height - 6, 'text-anchor': 'middle' }, String(first)),
    mark('text', { x: (left + width - right) / 2, y: height - 6, 'text-anchor': 'middle' }, 'sweep'),
  );
  if (last > first) {
    svg.append(mark('text', { x: width - right, y: height - 6, 'text-anchor': 'middle' }, String(last)));
  }
  if (until >= first && until <= last) {
    svg.append(mark('path', { class: 'until', d: `M${x(until)} ${top}V${height - bottom}` }));
  }
  let pen = 'M';
  let path = '';
  values.forEach((value, index) => {
    if (usable(value)) {
      path += `${pen}${x(first + index).toFixed(1)} ${y(value).toFixed(1)}`;
      svg.append(mark('circle', { cx: x(first + index).toFixed(1), cy: y(value).toFixed(1), r: 2.4 }, mark('title', {}, `sweep ${first + index}: ${short(value)}`)));
    }
    pen = usable(value) ? 'L' : 'M';
  });
  svg.append(mark('path', { class: 'run', d: path }));
  const [begin, end] = [values.find(usable), values.findLast(usable)];
  svg.setAttribute('aria-label', `${name}, from ${short(begin)} to ${short(end)} over sweeps ${first} to ${last}`);
  return svg;
}
