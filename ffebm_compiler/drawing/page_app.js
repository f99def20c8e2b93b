// The page around the picture: toolbar, keyboard, zoom, search, filter, download. One View for each plan.

const LIMITS = [0.08, 3];

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
    place.append(
      el('header', { class: 'top' }, el('h1', {}, data.title), el('p', { class: 'provenance' }, data.provenance), this.totals(), this.toolbar()),
      el('main', {}, this.stage, this.legend(), this.panel.element),
    );
    this.panel.close.addEventListener('click', () => this.shut());
    this.stage.addEventListener('keydown', (event) => this.key(event));
    place.addEventListener('keydown', (event) => this.shortcut(event));
    this.dragging();
    this.picture.draw();
    this.begin();
    // A notebook may give the frame its size after the script ran; what a reader has touched stays as it is.
    const late = new ResizeObserver(() => this.begin());
    late.observe(this.stage);
    for (const kind of ['pointerdown', 'click', 'keydown', 'wheel']) {
      place.addEventListener(kind, () => late.disconnect(), { capture: true, once: true, passive: true });
    }
  }

  begin() {
    this.fit();
    // Where the whole would be too small to tell anything, the width alone decides.
    if (this.scale < 0.2) {
      this.scale = Math.min(1, Math.max(0.45, (this.stage.clientWidth - 24) / this.picture.size.width));
      this.resize();
      this.stage.scrollTo((this.picture.size.width * this.scale - this.stage.clientWidth) / 2, 0);
    }
    // Open where it covers nothing.
    this.guide.open = (this.stage.clientWidth - this.picture.size.width * this.scale) / 2 > 350 && this.stage.clientHeight > 450;
  }

  totals() {
    const rows = this.data.totals.map(([value, name]) => el('li', {}, el('b', {}, value), ` ${name}`));
    if (this.data.costs) {
      const known = this.data.costs.short !== 'unknown';
      rows.push(el('li', {}, ...(known ? [el('b', {}, this.data.costs.short), ' per inference, '] : []), this.panel.costsLink(known ? 'modelled' : 'modelled costs')));
    }
    return el('ul', { class: 'totals' }, ...rows);
  }

  toolbar() {
    const button = (name, text, title, act) => el('button', { type: 'button', name, title, 'aria-label': title, onclick: act }, text);
    this.query = el('input', { type: 'search', name: 'search', placeholder: 'search module or operation', 'aria-label': 'search module or operation (/)' });
    this.query.addEventListener('input', () => this.search());
    this.query.addEventListener('keydown', (event) => {
      if (event.key === 'Enter' && this.results?.length) {
        this.reveal(this.results[this.at = ((this.at ?? -1) + 1) % this.results.length]);
        event.preventDefault();
      }
    });
    const stayed = this.data.rejected.length;
    this.filter = el('button', { type: 'button', name: 'stayed', 'aria-pressed': 'false', onclick: () => this.toggleStayed() }, `stayed digital (${stayed})`);
    const side = this.tree.edges(this.tree.root).edges.filter((edge) => edge.side).length;
    const tools = [
      this.query, this.filter,
      ...(side ? [el('button', { type: 'button', name: 'side', 'aria-pressed': 'false', title: 'masks, positions and constants that many parts read', onclick: (event) => this.toggleSide(event.currentTarget) }, `side inputs (${side})`)] : []),
      ...(this.picture.stages.all.length ? [el('button', { type: 'button', name: 'repeats', 'aria-pressed': 'true', title: 'stages that are alike as one node', onclick: (event) => this.toggleRepeats(event.currentTarget) }, 'fold repeats')] : []),
      button('why', 'why digital', 'everything digital, by reason', () => this.panel.reasons()),
      ...(this.data.whatIf ? [button('what-if', 'what if', 'the plan under other options', () => this.panel.whatIf())] : []),
      button('expand', 'open all', 'open every block', () => this.all(true)),
      button('collapse', 'close all', 'close every block', () => this.all(false)),
      button('out', '−', 'zoom out (-)', () => this.zoom(this.scale / 1.25)),
      button('in', '+', 'zoom in (+)', () => this.zoom(this.scale * 1.25)),
      button('fit', 'fit', 'fit to the window (0)', () => this.fit()),
      button('theme', '◐', 'light or dark', () => this.theme()),
      button('svg', 'SVG', 'download this picture as SVG', () => this.download()),
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
      ['stayed', 'weight-stationary layer that stayed digital'], ['crossing', 'crosses a converter (DAC/ADC values per sample)'], ['within', 'stays analog'], ['wire', 'stays digital'], ...(this.data.ops.some((op) => op.side.length) ? [['side', 'side input (mask, position, constant): the button shows them']] : []),
      ...(this.data.ops.some((op) => op.feedback.length) ? [['back', 'feedback through weights of its own']] : [])];
    const box = this.guide = el('details', { class: 'legend' }, el('summary', {}, 'legend'),
      el('ul', {}, ...rows.map(([name, text]) => el('li', {}, swatch(name), ` ${text}`))),
      el('p', {}, 'Click or Enter opens and closes; arrow keys move; / searches; + − 0 zoom; Esc closes the panel.'),
      ...this.data.notes.map((note) => el('p', { class: 'note' }, `note: ${note}`)));
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
      // What opens far away would be too small to read.
      if (item.open && this.svg.classList.contains('far')) {
        this.scale = 1;
      }
      this.redraw(item);
    }
    this.picture.mark();
    this.guide.open = false;
    this.panel.item(item);
    const element = this.picture.elements.get(item.id);
    element?.focus({ preventScroll: true });
    this.uncover(element);
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
    this.picture.draw();
    this.resize();
    const after = item && this.picture.elements.get(item.id)?.getBoundingClientRect();
    if (before && after) {
      this.stage.scrollBy(after.left + after.width / 2 - before.left - before.width / 2, after.top - before.top);
    }
  }

  reveal(item) {
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
    this.panel.element.hidden = true;
    this.picture.elements.get(this.picture.selected)?.focus({ preventScroll: true });
  }

  search() {
    const query = this.query.value.trim();
    this.results = this.tree.search(query);
    this.at = -1;
    const shown = new Set(this.results.flatMap((item) => this.ancestors(item)));
    this.picture.hits = query ? new Set(this.results) : null;
    this.picture.kept = query ? (item) => shown.has(item) : null;
    this.picture.mark();
    this.say(query ? `${this.results.length} found` : '');
    if (query) {
      this.filter.setAttribute('aria-pressed', 'false');
      this.panel.found(query, this.results);
    } else {
      this.panel.element.hidden = true;
    }
  }

  toggleRepeats(button) {
    const fold = button.getAttribute('aria-pressed') !== 'true';
    button.setAttribute('aria-pressed', String(fold));
    this.picture.stages.fold(fold);
    this.redraw(null);
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
    this.picture.hits = null;
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
    this.say(open && !few ? 'too many operations to open all at once: open single blocks' : '');
    this.redraw(null);
  }

  zoom(scale) {
    const [x, y] = [this.stage.scrollLeft + this.stage.clientWidth / 2, this.stage.scrollTop + this.stage.clientHeight / 2];
    const before = this.scale;
    this.scale = Math.min(LIMITS[1], Math.max(LIMITS[0], scale));
    this.resize();
    this.stage.scrollTo((x * this.scale) / before - this.stage.clientWidth / 2, (y * this.scale) / before - this.stage.clientHeight / 2);
  }

  fit() {
    this.scale = Math.min(1, Math.max(LIMITS[0], Math.min((this.stage.clientWidth - 24) / this.picture.size.width, (this.stage.clientHeight - 24) / this.picture.size.height)));
    this.resize();
    this.stage.scrollTo((this.picture.size.width * this.scale - this.stage.clientWidth) / 2, 0);
  }

  resize() {
    this.svg.setAttribute('width', String(this.picture.size.width * this.scale));
    this.svg.setAttribute('height', String(this.picture.size.height * this.scale));
    this.picture.scaled(this.scale);
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
    if (event.key === 'Enter' || event.key === ' ') {
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

  top(id) {
    return this.picture.elements.get(id).getBoundingClientRect().top;
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
