// The page around the picture: toolbar, keyboard, zoom, search, filter, download. One View for each plan.

const LIMITS = [0.08, 3];
const READABLE = 0.96;
const SEVERAL = 150; // more boxes than these are laid out once, from top to bottom

class View {
  constructor(place, data) {
    this.data = data;
    place.view = this;
    this.tree = new Tree(data);
    this.svg = document.createElementNS(SVG, 'svg');
    this.svg.setAttribute('role', 'tree');
    this.svg.setAttribute('aria-label', `partition of ${data.title}; arrow keys move, Enter opens`);
    this.stage = el('div', { class: 'stage' }, this.svg);
    this.panel = new Panel(this.tree, (item) => this.reveal(item));
    this.status = el('p', { class: 'status', role: 'status', 'aria-live': 'polite' });
    this.picture = new Picture(this.tree, this.svg, (item) => this.pick(item));
    this.picture.onEdge = (edge) => this.panel.edge(edge);
    this.panel.onEdge = (edge) => this.choose(edge);
    this.minimap = new Minimap(this);
    place.append(
      el('header', { class: 'top' }, el('div', { class: 'head' }, el('h1', {}, data.title), el('p', { class: 'provenance' }, data.provenance)), this.totals(), this.toolbar()),
      el('main', {}, el('div', { class: 'canvas' }, this.stage, this.legend(), this.minimap.element, this.controls()), this.panel.element),
    );
    this.panel.close.addEventListener('click', () => this.shut());
    this.stage.addEventListener('keydown', (event) => this.key(event));
    place.addEventListener('keydown', (event) => this.shortcut(event));
    this.scale = 1;
    this.dragging();
    this.begin();
    // A window that changes, a frame that gets its size late, a panel that opens: what was whole stays whole.
    new ResizeObserver(() => this.resized()).observe(this.stage);
  }

  resized() {
    const size = `${this.stage.clientWidth} ${this.stage.clientHeight}`;
    if (size === this.fitted) { // an observer also reports the size that it finds
      return;
    }
    if (this.whole && this.panel.element.hidden) {
      this.begin();
    } else if (this.whole) {
      this.fit();
      if (this.scale < 0.75) { // beside a panel, names may need another direction
        this.arrange();
        this.redraw(null);
        this.fit();
      }
    }
  }

  begin() {
    this.arrange();
    this.redraw(null);
    this.fit();
    // Open where it covers nothing.
    const [beside, below] = [this.stage.clientWidth - this.picture.size.width * this.scale, this.stage.clientHeight - this.picture.size.height * this.scale];
    this.guide.open = this.panel.element.hidden && (beside / 2 > 350 ? this.stage.clientHeight > 450 : below / 2 > 330 && this.stage.clientWidth > 700);
  }

  // Where the picture may lie: the stage without its margins.
  room() {
    const { paddingLeft, paddingRight, paddingTop, paddingBottom } = getComputedStyle(this.stage);
    const [across, down] = [parseFloat(paddingLeft) + parseFloat(paddingRight), parseFloat(paddingTop) + parseFloat(paddingBottom)];
    return [this.stage.clientWidth - across, this.stage.clientHeight - down];
  }

  // The direction and the level of detail at which the whole can be read; else those at which it is largest.
  arrange() {
    const [width, height] = this.room();
    const many = this.picture.shown().length > SEVERAL;
    const directions = this.fixed?.direction ? [this.fixed.direction] : many || width < 600 ? ['TB'] : ['TB', 'LR'];
    const levels = this.fixed?.level ? [this.fixed.level] : many ? ['brief'] : ['full', 'brief', 'names'];
    let best = null;
    for (const level of levels) {
      for (const direction of directions) {
        const size = this.picture.sizeOf(direction, level);
        // On a wide window, a picture of its shape is easier to follow.
        const wide = direction === 'LR' && width > 1.6 * height ? 1.25 : 1;
        const scale = wide * Math.min(1, width / size.width, height / size.height);
        if (!best || best.level === 'full' || scale > best.scale * (level === best.level ? 1.05 : 1.2)) {
          best = { direction, level, scale };
        }
      }
      if (best.scale >= READABLE) {
        break;
      }
    }
    Object.assign(this.picture, { direction: best.direction, level: best.level });
    this.said();
  }

  // The buttons of direction and detail say what is shown.
  said() {
    this.across.setAttribute('aria-pressed', String(this.picture.direction === 'LR'));
    this.detail.setAttribute('aria-pressed', String(this.picture.level === 'full'));
  }

  totals() {
    const rows = this.data.totals.map(([value, name]) => el('li', {}, el('b', {}, value), ` ${name}`));
    if (this.data.costs) {
      const { short, energy, latency, time } = this.data.costs;
      const known = short !== 'unknown';
      rows.push(el('li', {}, ...(known ? [el('b', {}, short), ' per inference, '] : []), this.panel.costsLink(known ? 'modelled' : 'modelled costs'), ...(energy.length ? [budget('energy', energy)] : [])));
      rows.push(el('li', {}, ...(time.length ? [el('b', {}, latency), ' latency, modelled', budget('latency', time)] : ['latency unknown'])));
    }
    return el('ul', { class: 'totals' }, ...rows);
  }

  button(name, text, title, act) {
    return el('button', { type: 'button', name, title, 'aria-label': title, onclick: act }, text);
  }

  report(...children) {
    this.guide.open = false;
    this.panel.report(...children);
  }

  // Beside the picture: direction, detail and zoom.
  controls() {
    this.across = el('button', { type: 'button', name: 'across', title: 'from left to right', 'aria-label': 'from left to right', onclick: () => this.turn() }, '⇄');
    this.detail = el('button', { type: 'button', name: 'details', title: 'every box with its layers, every arrow with its values', 'aria-label': 'details', onclick: () => this.deepen() }, 'details');
    return el('div', { class: 'tools controls', role: 'toolbar', 'aria-label': 'view' },
      this.button('expand', 'open all', 'open every block', () => this.all(true)),
      this.button('collapse', 'close all', 'close every block', () => this.all(false)),
      this.detail, this.across,
      this.button('out', '−', 'zoom out (-)', () => this.zoom(this.scale / 1.25)),
      this.button('in', '+', 'zoom in (+)', () => this.zoom(this.scale * 1.25)),
      this.button('fit', 'fit', 'fit to the window (0)', () => this.fit()),
      this.button('theme', '◐', 'light or dark', () => this.theme()),
      this.button('svg', 'SVG', 'download this picture as SVG', () => this.download()));
  }

  turn() {
    this.fixed = { ...this.fixed, direction: this.picture.direction === 'LR' ? 'TB' : 'LR' };
    this.arrange();
    this.redraw(null);
    this.fit();
  }

  // All that the boxes hold, at a scale that can be read; or the overview again.
  deepen() {
    const full = this.picture.level !== 'full';
    this.fixed = { ...this.fixed, level: full ? 'full' : null };
    if (full) {
      this.picture.level = 'full';
      this.whole = false;
      this.scale = Math.max(this.scale, 1);
      this.redraw(null);
      this.said();
      const { x, y } = this.picture.start;
      this.stage.scrollTo(this.picture.direction === 'LR' ? 0 : x * this.scale - this.stage.clientWidth / 2, this.picture.direction === 'LR' ? y * this.scale - this.stage.clientHeight / 2 : 0);
      this.picture.elements.get(this.picture.selected)?.scrollIntoView({ block: 'center', inline: 'center' });
    } else {
      const level = this.picture.level;
      this.arrange();
      this.picture.level = this.picture.level === level ? 'brief' : this.picture.level;
      this.said();
      this.redraw(null);
      this.fit();
    }
  }

  toolbar() {
    const button = this.button;
    this.query = el('input', { type: 'search', name: 'search', placeholder: 'search', 'aria-label': 'search layers, operations, weights and arrows (/)' });
    this.query.addEventListener('input', () => this.search());
    this.query.addEventListener('keydown', (event) => {
      if (event.key === 'Enter' && this.results?.length) {
        this.reveal(this.results[this.at = ((this.at ?? -1) + 1) % this.results.length]);
        event.preventDefault();
      }
    });
    const stayed = this.data.rejected.length;
    this.filter = el('button', { type: 'button', name: 'stayed', 'aria-pressed': 'false', onclick: () => this.toggleStayed() }, `stayed digital (${stayed})`);
    const side = this.tree.arrows.filter((edge) => edge.side).length;
    const tools = [
      this.query, this.filter,
      ...(side ? [el('button', { type: 'button', name: 'side', 'aria-pressed': 'false', title: 'masks, positions and constants that many parts read', onclick: (event) => this.toggleSide(event.currentTarget) }, `side inputs (${side})`)] : []),
      ...(this.picture.stages.all.length ? [el('button', { type: 'button', name: 'repeats', 'aria-pressed': 'true', title: 'stages that are alike as one node', onclick: (event) => this.toggleRepeats(event.currentTarget) }, 'fold repeats')] : []),
      button('why', 'why digital', 'everything digital, by reason', () => this.panel.reasons()),
      ...(this.data.whatIf ? [button('what-if', 'what if', 'the plan under other options', () => this.panel.whatIf())] : []),
      ...(this.data.gains ? [button('gains', 'loop gain', 'deviation at each measured loop gain', () => loopGains(this.panel, this))] : []),
      ...(this.data.beside ? [button('differences', 'differences', 'what the other plan does not have', () => differences(this))] : []),
      button('floor', 'floor plan', 'tiles by how full they are', () => this.report(...floorPlan(this.panel))),
      button('flows', 'conversions', 'what crosses the converters, as a flow', () => this.report(...conversions(this.panel, this.picture.stages))),
      ...(this.data.costs ? [button('timeline', 'latency', 'when each block runs, modelled', () => this.report(...timeline(this.panel)))] : []),
      ...(this.data.notes.length ? [button('notes', `notes (${this.data.notes.length})`, 'what the compiler noted', () => this.panel.notes())] : []),
    ];
    if (this.data.overlays.length) {
      const choice = el('select', { name: 'overlay', 'aria-label': 'show a measurement' }, el('option', { value: '' }, 'no measurement'));
      this.data.overlays.forEach((overlay, index) => choice.append(el('option', { value: String(index) }, overlay.name)));
      choice.addEventListener('change', () => {
        this.picture.overlay = choice.value === '' ? null : this.data.overlays[Number(choice.value)];
        this.redraw(null);
        this.say(this.picture.overlay?.sentence ?? '');
      });
      tools.splice(2, 0, choice);
    }
    return el('div', { class: 'tools', role: 'toolbar', 'aria-label': 'tools' }, ...tools, this.status);
  }

  legend() {
    const swatch = (name) => el('span', { class: `swatch ${name}`, 'aria-hidden': 'true' });
    const rows = [['analog', 'energy block: analog, settles to an equilibrium'], ...(this.picture.stages.all.length ? [['repeats', 'stages like those above, as one node: a click unfolds them']] : []), ['plain', 'energy block without feedback: analog, exactly the source’s layers'], ['digital', 'digital part: runs forward'],
      ['stayed', 'weight-stationary layer that stayed digital'], ['crossing', 'crosses a converter (DAC/ADC values per sample)'], ['within', 'stays analog'], ['wire', 'stays digital'],
      ...(this.data.homes.some((home) => home.gradients) ? [['nabla', '∇✓ gradients checked: every cosine 0.999 or more; ∇! one is below']] : []), ...(this.data.homes.some((home) => home.differs) ? [['differs', 'not in the other plan']] : []), ...(this.data.ops.some((op) => op.side.length) ? [['side', 'side input (mask, position, constant): the button shows them']] : []),
      ...(this.data.ops.some((op) => op.feedback.length) ? [['back', 'feedback through weights of its own']] : [])];
    const box = this.guide = el('details', { class: 'legend' }, el('summary', {}, 'legend'),
      el('ul', {}, ...rows.map(([name, text]) => el('li', {}, swatch(name), ` ${text}`))),
      el('p', {}, 'Click or Enter opens and closes; arrow keys move; E steps through the arrows out of a box; / searches; + − 0 zoom; Esc closes the panel.'),);
    return box;
  }

  say(text) {
    this.status.textContent = text;
  }

  pick(item) {
    this.picture.selected = item.id;
    if (item.kind === 'stage') {
      this.picture.stages.show(item);
      this.picture.selected = item.homes[0].id;
      this.redraw(null);
      this.reveal(item.homes[0]);
      return;
    }
    if (item.items) {
      item.open = !item.open;
      this.whole = false;
      // What opens far away would be too small to read.
      if (item.open && this.svg.classList.contains('far')) {
        this.scale = 1;
      }
      this.redraw(item);
    }
    this.picture.chosen = null;
    this.picture.mark();
    this.guide.open = false;
    this.panel.item(item);
    const element = this.picture.elements.get(item.id);
    element?.focus({ preventScroll: true });
    this.uncover(element);
  }

  // Show an arrow of the first view, and its values.
  choose(edge) {
    this.whole = false;
    for (const end of [edge.from, edge.to]) {
      this.picture.stages.show(end);
    }
    this.picture.showSide ||= edge.side;
    this.picture.chosen = edgeKey(edge);
    this.redraw(null);
    this.picture.wires.find((wire) => edgeKey(wire.edge) === this.picture.chosen)?.element.scrollIntoView({ block: 'center', inline: 'center' });
  }

  // Scroll where the head of an item lies outside of the window or below the panel.
  uncover(element) {
    const [head, stage] = [element?.getBoundingClientRect(), this.stage.getBoundingClientRect()];
    const panel = this.panel.element.getBoundingClientRect();
    const end = panel.left <= stage.left && !this.panel.element.hidden ? panel.top : stage.bottom;
    if (head && (head.top < stage.top || head.top + 60 > end)) {
      this.stage.scrollBy(0, head.top - stage.top - 40);
    }
    if (head && head.left < stage.left) {
      this.stage.scrollBy(head.left - stage.left - 8, 0);
    }
  }

  // Draw again with the top of one item where it was on the screen.
  redraw(item) {
    const before = item && this.picture.elements.get(item.id)?.getBoundingClientRect();
    const focused = this.svg.contains(document.activeElement) ? document.activeElement : null;
    const wire = this.picture.wires.find((one) => one.element === focused);
    this.picture.draw();
    this.resize();
    this.minimap.draw();
    // The focus stays on its box or arrow, which is drawn anew.
    const again = wire ? this.picture.wires.find((one) => edgeKey(one.edge) === edgeKey(wire.edge))?.element : this.picture.elements.get(focused?.dataset.id);
    again?.focus({ preventScroll: true });
    const after = item && this.picture.elements.get(item.id)?.getBoundingClientRect();
    if (before && after) {
      this.stage.scrollBy(after.left + after.width / 2 - before.left - before.width / 2, after.top - before.top);
    }
  }

  reveal(item) {
    this.whole = false;
    for (let up = item.up; up && up.depth > 0; up = up.up) {
      up.open = true;
    }
    this.picture.stages.show(item);
    this.picture.selected = item.id;
    this.redraw(null);
    this.panel.item(item);
    const element = this.picture.elements.get(item.id);
    element?.scrollIntoView({ block: 'center', inline: 'center' });
    this.uncover(element);
    if (document.activeElement !== this.query) {
      element?.focus({ preventScroll: true });
    }
  }

  shut() {
    if (this.measuring) { // the bars of a loop gain go with its panel
      this.measuring = false;
      this.picture.overlay = null;
      this.redraw(null);
    }
    this.panel.element.hidden = true;
    this.picture.elements.get(this.picture.selected)?.focus({ preventScroll: true });
  }

  search() {
    const query = this.query.value.trim();
    this.results = this.tree.search(query);
    const arrows = this.tree.searchArrows(query);
    this.picture.hitEdges = new Set(arrows.map(edgeKey));
    this.at = -1;
    const shown = new Set(this.results.flatMap((item) => this.ancestors(item)));
    this.picture.hits = query ? new Set(this.results) : null;
    this.picture.kept = query ? (item) => shown.has(item) : null;
    this.picture.mark();
    this.say(query ? `${this.results.length} found` : '');
    if (query) {
      this.filter.setAttribute('aria-pressed', 'false');
      this.panel.found(query, this.results, arrows);
    } else {
      this.panel.element.hidden = true;
    }
  }

  toggleRepeats(button) {
    const fold = button.getAttribute('aria-pressed') !== 'true';
    button.setAttribute('aria-pressed', String(fold));
    this.picture.stages.fold(fold);
    this.arrange();
    this.redraw(null);
    this.fit();
  }

  toggleSide(button) {
    this.picture.showSide = !this.picture.showSide;
    button.setAttribute('aria-pressed', String(this.picture.showSide));
    this.redraw(null);
  }

  ancestors(item) {
    const all = [];
    for (let one = item; one; one = one.up) {
      all.push(one);
    }
    return all;
  }

  toggleStayed() {
    const on = this.filter.getAttribute('aria-pressed') !== 'true';
    this.filter.setAttribute('aria-pressed', String(on));
    this.query.value = '';
    this.picture.hits = this.picture.hitEdges = null;
    this.picture.kept = on ? (item) => Boolean(item.stayed) : null;
    this.picture.mark();
    this.say(on ? plural(this.data.rejected.length, 'layer') + ' stayed digital' : '');
    if (on) {
      this.panel.stayed();
    } else {
      this.panel.element.hidden = true;
    }
  }

  all(open) {
    const few = this.data.ops.length <= 800;
    for (const item of this.tree.byId.values()) {
      item.open = Boolean(item.items) && open && few;
    }
    this.whole = false;
    this.say(open && !few ? 'too many operations to open all at once: open single blocks' : '');
    this.redraw(null);
  }

  zoom(scale) {
    const [x, y] = [this.stage.scrollLeft + this.stage.clientWidth / 2, this.stage.scrollTop + this.stage.clientHeight / 2];
    const before = this.scale;
    this.scale = Math.min(LIMITS[1], Math.max(LIMITS[0], scale));
    this.whole = false;
    this.resize();
    this.stage.scrollTo((x * this.scale) / before - this.stage.clientWidth / 2, (y * this.scale) / before - this.stage.clientHeight / 2);
  }

  fit() {
    const [width, height] = this.room();
    const whole = Math.min(1, width / this.picture.size.width, height / this.picture.size.height);
    // Where the whole would be too small to tell anything, its breadth decides, and the small map shows the whole.
    const breadth = this.picture.direction === 'LR' ? height / this.picture.size.height : width / this.picture.size.width;
    this.scale = whole >= 0.3 ? whole : Math.min(1, Math.max(0.45, breadth));
    this.whole = true;
    this.fitted = `${this.stage.clientWidth} ${this.stage.clientHeight}`;
    this.resize();
    // Where not all of it is seen, from the first box on.
    const [begin, size] = [this.picture.start, this.picture.size];
    const middle = whole >= 0.3 ? { x: size.width / 2, y: size.height / 2 } : begin;
    this.stage.scrollTo(this.picture.direction === 'LR' ? 0 : middle.x * this.scale - this.stage.clientWidth / 2, this.picture.direction === 'LR' ? middle.y * this.scale - this.stage.clientHeight / 2 : 0);
  }

  resize() {
    this.svg.setAttribute('width', String(this.picture.size.width * this.scale));
    this.svg.setAttribute('height', String(this.picture.size.height * this.scale));
    this.picture.scaled(this.scale);
    this.minimap.move();
  }

  theme() {
    const root = document.documentElement;
    const dark = root.dataset.theme ? root.dataset.theme === 'dark' : matchMedia('(prefers-color-scheme: dark)').matches;
    root.dataset.theme = dark ? 'light' : 'dark';
  }

  shortcut(event) {
    const typing = event.target instanceof HTMLInputElement || event.target instanceof HTMLSelectElement;
    if (event.key === 'Escape') {
      this.shut();
    } else if (!typing && !event.ctrlKey && !event.metaKey && !event.altKey) {
      const act = { '/': () => this.query.focus(), '+': () => this.zoom(this.scale * 1.25), '=': () => this.zoom(this.scale * 1.25), '-': () => this.zoom(this.scale / 1.25), 0: () => this.fit() }[event.key];
      if (act) {
        event.preventDefault();
        act();
      }
    }
  }

  key(event) {
    const element = event.target.closest?.('g.node');
    const item = element && (this.tree.byId.get(element.dataset.id) ?? null);
    const wire = this.picture.wires.find((one) => one.element === event.target);
    if (wire ? ['e', 'E', 'ArrowUp', 'ArrowDown', 'Enter', ' '].includes(event.key) : item && ['e', 'E'].includes(event.key)) {
      this.wireKey(event.key, wire, item);
    } else if (event.key === 'Enter' || event.key === ' ') {
      element?.dispatchEvent(new MouseEvent('click', { bubbles: true }));
    } else if (event.key === 'ArrowDown' || event.key === 'ArrowUp') {
      const order = [...this.picture.elements.keys()].sort((a, b) => this.top(a) - this.top(b));
      const place = element ? order.indexOf(element.dataset.id) : -1;
      const next = order[place + (event.key === 'ArrowDown' ? 1 : -1)];
      if (next) {
        this.picture.selected = next;
        this.picture.mark();
        const target = this.picture.elements.get(next);
        target.focus({ preventScroll: true });
        target.scrollIntoView({ block: 'nearest', inline: 'nearest' });
      }
    } else if (item?.items && item.open === (event.key === 'ArrowLeft') && ['ArrowLeft', 'ArrowRight'].includes(event.key)) {
      this.pick(item);
    } else {
      return;
    }
    event.preventDefault();
  }

  // E steps through the arrows out of a box. From an arrow, up and down lead to its ends, and Enter tells its values.
  wireKey(key, wire, item) {
    const target = { ArrowUp: wire?.edge.from, ArrowDown: wire?.edge.to }[key];
    if (target) {
      this.picture.selected = target.id;
      this.picture.mark();
      this.picture.elements.get(target.id).focus();
    } else if (wire && key !== 'e' && key !== 'E') {
      this.picture.onEdge(wire.edge);
    } else {
      const next = nextWire(this.picture, wire?.edge.from ?? item, wire?.element);
      next ? next.element.focus() : this.say('no arrow leaves this box');
    }
  }

  // The place of a box along the flow.
  top(id) {
    const box = this.picture.elements.get(id).getBoundingClientRect();
    return this.picture.direction === 'LR' ? box.left : box.top;
  }

  dragging() {
    let from = null;
    this.stage.addEventListener('pointerdown', (event) => {
      from = event.pointerType === 'mouse' && event.button === 0 && !event.target.closest('g.node') ? event : null;
    });
    window.addEventListener('pointermove', (event) => {
      if (from) {
        this.stage.scrollBy(from.clientX - event.clientX, from.clientY - event.clientY);
        from = event;
      }
    });
    window.addEventListener('pointerup', () => { from = null; });
    this.stage.addEventListener('wheel', (event) => {
      if (event.ctrlKey) {
        event.preventDefault();
        this.zoom(this.scale * Math.exp(-event.deltaY / 300));
      }
    }, { passive: false });
  }

  download() {
    const title = `${this.data.title}: ${this.data.totals.map((pair) => pair.join(' ')).join(', ')}`;
    const text = standAlone(this.svg, this.picture.size, title);
    const address = URL.createObjectURL(new Blob([text], { type: 'image/svg+xml' }));
    const link = el('a', { href: address, download: 'partition.svg' });
    document.body.append(link);
    link.click();
    link.remove();
    setTimeout(() => URL.revokeObjectURL(address), 10000);
    this.say('saved as partition.svg');
  }
}

const started = performance.now();
const pages = JSON.parse(document.getElementById('data').textContent);
document.body.classList.toggle('beside', pages.length > 1);
const views = pages.map((data) => {
  const place = el('div', { class: 'view' });
  document.body.append(place);
  return new View(place, data);
});
document.documentElement.dataset.ready = String(Math.round(performance.now() - started));
