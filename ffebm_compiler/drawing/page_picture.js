// The picture: each open container is laid out on its own by dagre and drawn as nested SVG groups.

const SVG = 'http://www.w3.org/2000/svg';
const HEAD = 24;
const ROW = 17;
const SIZES = { title: 14, line: 13, label: 12 };
const PAD = 12;
// Beside a name in the overview: in units of the picture where it is laid out, and at least in pixels of the screen where it is drawn.
const BESIDE = { TB: 14, LR: 10, drawn: 3 };
const MANY = 500;
const LEVELS = ['names', 'brief', 'full'];

function shorten(text, most = 58) {
  return text.length <= most ? text : `${text.slice(0, most / 2 - 1)}…${text.slice(text.length - most / 2)}`;
}

class Picture {
  constructor(tree, svg, onPick) {
    this.tree = tree;
    this.stages = new Stages(tree);
    this.svg = svg;
    this.onPick = onPick;
    this.cache = new Map();
    this.bases = new Map();
    this.elements = new Map();
    this.overlay = null;
    this.showSide = false;
    this.direction = 'TB';
    this.level = 'full';
    this.wires = [];
    this.onEdge = () => {};
    this.selected = null;
    this.context = document.createElement('canvas').getContext('2d');
  }

  width(text, size, bold = false) {
    this.context.font = `${bold ? '600 ' : ''}${size}px system-ui, sans-serif`;
    return this.context.measureText(text).width;
  }

  title(item) {
    const word = item.depth === 1 && item.kind !== 'port' ? { analog: item.settles ? ' · analog' : ' · analog, no feedback', digital: ' · digital' }[item.domain] ?? '' : '';
    return shorten(`${item.settles && word ? '∿ ' : ''}${item.title}${word}${this.badge(item)}`);
  }

  // Whether the gradients of a block are the network's, if they were checked.
  badge(item) {
    return item.depth === 1 && item.record?.gradients ? (item.record.gradients.good ? ' ∇✓' : ' ∇!') : '';
  }

  measured(item) {
    return this.overlay && item.depth === 1 && item.record ? this.overlay.values[item.record.title] : undefined;
  }

  lines(item) {
    const lines = item.lines.map((line) => ({ ...line, text: shorten(line.text) }));
    const value = this.measured(item);
    return value === undefined ? lines : [...lines, { text: value.text, style: 'measured' }];
  }

  // Size, and for an open item the layout of what is inside.
  lay(item) {
    const state = item.open ? this.state(item) : 'closed';
    const key = `${state}|${this.look}`;
    const known = this.cache.get(item.id);
    if (known && known.key === key) {
      return known;
    }
    const laid = item.open ? this.layInside(item) : this.layLeaf(item);
    laid.key = key;
    this.cache.set(item.id, laid);
    return laid;
  }

  // Everything beside the open items that a layout depends on.
  get look() {
    return [this.overlay?.name ?? '', this.showSide, this.stages.key, this.direction, this.level].join('|');
  }

  // What the first view shows: blocks, parts, inputs, outputs, and stages that are folded.
  shown() {
    return this.stages.folded(this.tree.root.items, []).items;
  }

  // Size of the picture for a direction and a level of detail.
  sizeOf(direction, level) {
    const before = [this.direction, this.level];
    [this.direction, this.level] = [direction, level];
    const { width, height } = this.lay(this.tree.root);
    [this.direction, this.level] = before;
    return { width, height };
  }

  // The lines of a box in the overview: its name, and at level `brief` what it holds. Null for a box in full.
  overview(item) {
    if (this.level === 'full' || item.depth !== 1 || item.kind === 'port' || item.open) {
      return null;
    }
    const name = `${item.settles ? '∿ ' : ''}${item.input ? item.input.name : item.short ?? item.title}${this.badge(item)}`;
    const line = this.level === 'brief' ? item.record?.brief ?? item.brief : null;
    return [shorten(name, 24), ...(line ? [shorten(line, 24)] : [])];
  }

  state(item) {
    return item.items.filter((inner) => inner.open).map((inner) => `${inner.id}(${this.state(inner)})`).join(',') || 'open';
  }

  layLeaf(item) {
    const overview = this.overview(item);
    if (overview) {
      const value = this.measured(item);
      const rows = [this.width(overview[0], SIZES.line, true), ...overview.slice(1).map((text) => this.width(text, SIZES.label)), ...(value ? [this.width(value.text, SIZES.label, true)] : [])];
      return { width: Math.max(...rows) + 2 * BESIDE[this.direction], height: 10 + 16 * rows.length + (value ? 8 : 0) };
    }
    const lines = this.lines(item);
    const port = item.kind === 'port';
    const title = this.width(this.title(item), port ? SIZES.line : SIZES.title, true) + (item.items ? 16 : 0);
    const widest = Math.max(title, ...lines.map((line) => this.width(line.text, SIZES.line, line.style === 'warn' || line.style === 'measured')));
    const bar = lines.some((line) => line.style === 'measured') ? 8 : 0;
    return { width: widest + (port ? 18 : 26), height: (port ? 22 : HEAD + 8) + ROW * lines.length + bar };
  }

  layInside(item) {
    const { ports, edges: all } = this.tree.edges(item);
    const shown = all.filter((edge) => this.showSide || !edge.side);
    const { items, edges } = item.up ? { items: [...item.items, ...ports], edges: shown } : this.stages.folded(item.items, shown);
    const opened = items.filter((inner) => inner.open);
    const { nodes, links } = items.length > MANY ? this.stretched(item, items, edges, opened) : this.arranged(items, edges, (inner) => this.lay(inner));
    const box = { left: 0, top: 0, right: 0, bottom: 0 };
    const grow = (x, y, width, height) => {
      box.left = Math.min(box.left, x - width / 2);
      box.right = Math.max(box.right, x + width / 2);
      box.top = Math.min(box.top, y - height / 2);
      box.bottom = Math.max(box.bottom, y + height / 2);
    };
    nodes.forEach((node) => grow(node.x, node.y, node.width, node.height));
    links.forEach((link) => {
      link.points.forEach((point) => grow(point.x, point.y, 0, 0));
      if (link.x !== undefined) {
        grow(link.x, link.y, link.width, link.height);
      }
    });
    const top = item.up ? HEAD + 14 + (this.measured(item) === undefined ? 0 : ROW) : 0;
    const least = this.width(this.title(item), SIZES.title, true) + 60;
    const width = Math.max(box.right - box.left + 2 * PAD, item.up ? least : 0);
    const shift = { x: (width - (box.right - box.left)) / 2 - box.left, y: top + PAD - box.top };
    return { items, nodes, links, shift, width, height: box.bottom - box.top + top + 2 * PAD };
  }

  // Positions by dagre.
  arranged(items, edges, sizeOf) {
    const first = items.some((inner) => inner.depth === 1 && inner.kind !== 'port');
    const bare = this.level !== 'full' && first;
    // What is open runs from top to bottom: it would be wider than any window.
    const across = this.direction === 'LR' && first;
    const nodes = items.map((inner) => {
      const { width, height } = sizeOf(inner);
      return { v: inner.id, width, height };
    });
    const links = edges.map((edge) => {
      const labels = bare ? [] : this.tree.labels(edge);
      return {
        v: edge.from.id, w: edge.to.id, minlen: 1, weight: 1, labelpos: 'r', labeloffset: 5, edge, labels, across,
        width: Math.max(0, ...labels.map((text) => this.width(text, SIZES.label) + 6)) + (edge.own.size ? 10 : 0), height: 15 * labels.length,
      };
    });
    const turn = (box) => Object.assign(box, { width: box.height, height: box.width });
    const settings = { nodesep: bare ? 16 : 22, ranksep: bare ? 20 : 34, edgesep: bare ? 12 : 16, rankdir: 'TB' };
    if (nodes.length > MANY) {
      settings.ranker = 'tight-tree';
    }
    if (nodes.length) {
      [...nodes, ...links].forEach((box) => across && turn(box));
      layout(nodes, links, settings, {});
      this.dock(nodes, links);
      // From left to right is the same layout, mirrored at the diagonal.
      for (const box of across ? [...nodes, ...links] : []) {
        turn(box);
        for (const point of [box, ...(box.points ?? [])]) {
          [point.x, point.y] = [point.y, point.x];
        }
      }
    }
    return { nodes, links };
  }

  // Arrows leave at the bottom of a box and arrive at the top of one, never at its sides.
  dock(nodes, links) {
    const byId = new Map(nodes.map((node) => [node.v, node]));
    for (const link of links) {
      for (const [point, node, side] of [[link.points[0], byId.get(link.v), 0.5], [link.points.at(-1), byId.get(link.w), -0.5]]) {
        const room = Math.max(0, node.width / 2 - 10);
        point.x = Math.min(node.x + room, Math.max(node.x - room, point.x));
        point.y = node.y + side * node.height;
      }
    }
  }

  // A large picture is laid out once, closed; what opens pushes the rest down and aside, which takes no new layout.
  stretched(item, items, edges, opened) {
    const key = `${item.id}|${this.look}`;
    if (!this.bases.has(key)) {
      this.bases.set(key, this.arranged(items, edges, (inner) => this.layLeaf(inner)));
    }
    const base = this.bases.get(key);
    const nodes = base.nodes.map((node) => ({ ...node }));
    const links = base.links.map((link) => ({ ...link, points: link.points.map((point) => ({ ...point })) }));
    const byId = new Map(nodes.map((node) => [node.v, node]));
    for (const inner of opened) {
      const node = byId.get(inner.id);
      const { width, height } = this.lay(inner);
      const [x, y, half] = [node.x, node.y, node.height / 2];
      const [wider, higher] = [Math.max(0, width - node.width) / 2, height - node.height];
      const moved = (at) => ({ x: Math.abs(at.y - y) <= half ? Math.sign(at.x - x) * wider : 0, y: at.y > y ? higher : 0 });
      const shifts = new Map(nodes.map((other) => [other.v, moved(other)]));
      for (const link of links) {
        link.points.forEach((point, index) => {
          const end = index === 0 ? link.v : index === link.points.length - 1 ? link.w : null;
          const shift = end === inner.id ? { x: 0, y: index === 0 ? higher : 0 } : end ? shifts.get(end) : moved(point);
          point.x += shift.x;
          point.y += shift.y;
        });
        if (link.y > y) {
          link.y += higher;
        }
      }
      for (const other of nodes) {
        other.x += other === node ? 0 : shifts.get(other.v).x;
        other.y += other === node ? higher / 2 : shifts.get(other.v).y;
      }
      Object.assign(node, { width, height });
    }
    return { nodes, links };
  }

  draw() {
    const laid = this.lay(this.tree.root);
    this.elements.clear();
    this.shorts = [];
    this.wires = [];
    const root = this.make('g', { class: 'root', role: 'none' });
    this.drawInside(this.tree.root, laid, root);
    this.svg.replaceChildren(root);
    this.size = { width: Math.ceil(laid.width), height: Math.ceil(laid.height) };
    this.start = laid.nodes.length ? { x: laid.nodes[0].x + laid.shift.x, y: laid.nodes[0].y + laid.shift.y } : { x: 0, y: 0 };
    this.svg.setAttribute('viewBox', `0 0 ${this.size.width} ${this.size.height}`);
    this.mark();
  }

  make(name, attributes, text) {
    const element = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) {
      element.setAttribute(key, value);
    }
    if (text !== undefined) {
      element.textContent = text;
    }
    return element;
  }

  drawInside(item, laid, parent) {
    // Screen readers find the items of a tree only below the tree itself or a group.
    const group = this.make('g', { role: item.up ? 'group' : 'none', transform: `translate(${laid.shift.x.toFixed(1)},${laid.shift.y.toFixed(1)})` });
    const within = item.home?.domain === 'analog';
    laid.links.forEach((link) => this.wires.push(drawWire(this, link, group, within)));
    laid.items.forEach((inner, index) => this.drawItem(inner, laid.nodes[index], group));
    parent.appendChild(group);
  }

  drawItem(item, node, parent) {
    const laid = this.lay(item);
    const { width, height } = laid;
    const overview = this.overview(item);
    const classes = ['node', item.kind === 'stage' ? '' : item.domain, item.kind === 'stage' ? '' : item.kind ?? 'home', item.open ? 'open' : 'closed', item.stayed ? 'stayed' : '', item.driven ? 'driven' : '', item.kind === 'stage' ? 'repeats' : '', item.domain === 'analog' && !item.kind && !item.settles ? 'plain' : '', overview ? 'compact' : '', item.record?.differs ? 'differs' : ''];
    const group = this.make('g', {
      class: classes.filter(Boolean).join(' '), transform: `translate(${(node.x - width / 2).toFixed(1)},${(node.y - height / 2).toFixed(1)})`,
      tabindex: '-1', role: 'treeitem', 'aria-label': this.spoken(item), 'data-id': item.id,
    });
    if (item.items) {
      group.setAttribute('aria-expanded', String(item.open));
    }
    const round = item.kind === 'port' || ['input', 'output'].includes(item.domain) ? 11 : item.domain === 'analog' ? (item.kind ? 7 : 14) : 0;
    group.appendChild(this.make('rect', { width, height, rx: round, class: 'box' }));
    if (item.settles) {
      group.appendChild(this.make('rect', { x: 3.5, y: 3.5, width: width - 7, height: height - 7, rx: round - 3.5, class: 'inner' }));
    }
    const centre = item.open ? 14 : width / 2;
    const anchor = item.open ? 'start' : 'middle';
    const sign = item.items ? (item.open ? '▾ ' : '▸ ') : '';
    const y = item.kind === 'port' ? 15 : HEAD - 3;
    group.appendChild(this.make('text', { x: centre, y, class: 'title', 'text-anchor': anchor }, sign + this.title(item)));
    const value = this.measured(item);
    (overview ?? []).forEach((text, index) => {
      group.appendChild(this.make('text', { x: centre, y: 18 + 16 * index, class: index ? 'what' : 'called', 'text-anchor': anchor }, text));
    });
    if (overview && value) {
      group.appendChild(this.make('text', { x: centre, y: 18 + 16 * overview.length, class: 'what measured', 'text-anchor': anchor }, value.text));
    }
    const lines = overview ? [] : item.open ? this.lines(item).filter((line) => line.style === 'measured') : this.lines(item);
    lines.forEach((line, index) => {
      group.appendChild(this.make('text', { x: centre, y: HEAD - 3 + ROW * (index + 1), class: `line ${line.style}`, 'text-anchor': anchor }, line.text));
    });
    this.drawBar(item, width, height, group);
    if (!item.open && item.kind !== 'port') {
      const names = [overview?.[0] ?? (item.settles ? '∿ ' : '') + (item.op?.target ?? item.title), item.title.split(/[_ ]/).at(item.kind === 'stage' ? 0 : -1)].slice(0, item.kind && item.kind !== 'stage' ? 1 : 2);
      const short = this.make('text', { x: width / 2, y: height / 2, class: 'short', 'text-anchor': 'middle', 'aria-hidden': 'true' });
      this.shorts.push({ short, width, height, names: names.map((name) => [name, this.width(name, 1, true)]) });
      group.appendChild(short);
    }
    group.addEventListener('click', (event) => {
      event.stopPropagation();
      this.onPick(item, group);
    });
    if (item.open) {
      this.drawInside(item, laid, group);
    }
    this.elements.set(item.id, group);
    parent.appendChild(group);
  }

  drawBar(item, width, height, group) {
    const value = this.measured(item);
    if (value !== undefined && !item.open) {
      group.appendChild(this.make('rect', { x: 10, y: height - 10, width: width - 20, height: 4, class: 'track' }));
      group.appendChild(this.make('rect', { x: 10, y: height - 10, width: (width - 20) * value.share, height: 4, class: 'bar' }));
    }
  }

  spoken(item) {
    const kind = item.domain === 'analog' && !item.kind ? (item.settles ? 'analog energy block, settles' : 'analog energy block without feedback') : item.domain;
    const more = [...(item.record?.gradients ? [`gradients: ${item.record.gradients.text}`] : []), ...(item.record?.differs ? ['not in the other plan'] : [])];
    return [item.title, kind, ...more, ...item.lines.map((line) => line.text)].join(', ');
  }

  // Text is drawn where it is at least 12 pixels high on the screen: far away, each box shows its name alone, if it fits.
  scaled(scale) {
    const far = scale * SIZES.label < 11.5;
    this.svg.classList.toggle('far', far);
    const compact = this.level !== 'full';
    const fits = ([, unit], width) => (12 / scale) * unit <= width - (2 * BESIDE.drawn) / scale;
    // In the overview all boxes have their names, or all their numbers.
    const numbers = compact && this.shorts.some(({ width, names }) => !fits(names[0], width));
    for (const { short, width, height, names } of far ? this.shorts : []) {
      const fitting = (numbers ? [...names].reverse() : names).find((name) => fits(name, width));
      const [name, unit] = fitting ?? names[0];
      const size = Math.min((compact ? 13 : 22) / scale, Math.max(12 / scale, Math.min((width - 24) / unit, height / 2)));
      const shown = fitting && size <= height;
      short.textContent = name;
      short.setAttribute('display', shown ? 'inline' : 'none');
      short.setAttribute('font-size', size.toFixed(2));
      short.setAttribute('y', (height / 2 + 0.35 * size).toFixed(1));
    }
  }

  // Show selection, search hits and the filter by classes alone.
  mark() {
    for (const { edge, element } of this.wires) {
      element.classList.toggle('chosen', edgeKey(edge) === this.chosen);
      element.classList.toggle('hit', Boolean(this.hitEdges?.has(edgeKey(edge))));
    }
    for (const [id, element] of this.elements) {
      const item = this.tree.byId.get(id);
      const members = item?.homes ?? [item];
      const hit = item && this.hits ? members.some((one) => this.hits.has(one)) : false;
      const kept = item && this.kept ? members.some(this.kept) : true;
      element.classList.toggle('selected', id === this.selected);
      element.classList.toggle('hit', hit);
      element.classList.toggle('dimmed', !kept);
      element.setAttribute('tabindex', id === this.selected ? '0' : '-1');
      element.setAttribute('aria-selected', String(id === this.selected));
    }
    if (!this.elements.has(this.selected)) {
      this.elements.values().next().value?.setAttribute('tabindex', '0');
    }
  }
}
