// The arrows: drawn, and reached by the keyboard from the box that they leave.

function edgeKey(edge) {
  return `${edge.from.id}\n${edge.to.id}`;
}

// One arrow as an SVG group inside `parent`, from top to bottom or from left to right.
function drawWire(picture, link, parent, within) {
  const { edge, points, labels, across } = link;
  const spot = (x, y) => `${x.toFixed(1)},${y.toFixed(1)}`;
  const [first, last] = [points[0], points.at(-1)];
  let path = `M${spot(first.x, first.y)}`;
  for (let index = 1; index < points.length; index++) {
    const a = points[index - 1];
    const gap = index === points.length - 1 ? 5 : 0;
    const b = across ? { x: points[index].x - gap, y: points[index].y } : { x: points[index].x, y: points[index].y - gap };
    const middle = across ? (a.x + b.x) / 2 : (a.y + b.y) / 2;
    path += across ? `C${spot(middle, a.y)} ${spot(middle, b.y)} ${spot(b.x, b.y)}` : `C${spot(a.x, middle)} ${spot(b.x, middle)} ${spot(b.x, b.y)}`;
  }
  const crossing = edge.adc || edge.dac || edge.shared;
  const kind = edge.side ? 'edge side' : crossing ? 'edge crossing' : within ? 'edge within' : 'edge';
  const words = picture.tree.labels(edge).join(', ');
  const element = picture.make('g', { class: kind, role: 'button', tabindex: '-1', 'aria-label': `arrow from ${edge.from.title} to ${edge.to.title}: ${words}` });
  element.addEventListener('click', (event) => {
    event.stopPropagation();
    picture.onEdge(edge);
  });
  element.append(
    picture.make('title', {}, `${edge.from.title} → ${edge.to.title}: ${words}`),
    picture.make('path', { d: path, class: 'grip' }),
    picture.make('path', { d: path, class: 'wire' }),
    picture.make('path', { d: `M${spot(last.x, last.y)}${across ? 'l-7,-4v8z' : 'l-4,-7h8z'}`, class: 'tip' }),
  );
  if (edge.own.size) { // feedback through weights of its own runs beside the wire, the other way
    const tip = across ? `M${spot(first.x, first.y + 8)}l7,-4v8z` : `M${spot(first.x + 8, first.y)}l-4,7h8z`;
    element.append(
      picture.make('path', { d: path, class: 'back', transform: across ? 'translate(0,8)' : 'translate(8,0)' }),
      picture.make('path', { d: tip, class: 'back-tip' }),
    );
  }
  labels.forEach((text, index) => {
    const y = link.y - link.height / 2 + 12 + 15 * index;
    const x = link.x - link.width / 2 + (edge.own.size ? 10 : 0);
    element.append(picture.make('text', { x: x.toFixed(1), y: y.toFixed(1), class: 'label' }, text));
  });
  parent.appendChild(element);
  return { edge, element };
}

// The next arrow out of a box, after the one that has the focus; undefined where none leaves it.
function nextWire(picture, item, focused) {
  const leaving = picture.wires.filter((wire) => wire.edge.from === item);
  return leaving[(leaving.findIndex((wire) => wire.element === focused) + 1) % leaving.length];
}
