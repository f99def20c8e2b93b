// The side panel: everything known about one item, as text. Names are only ever set as text nodes.

function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith('on')) {
      element.addEventListener(key.slice(2), value);
    } else {
      element.setAttribute(key, value);
    }
  }
  element.append(...children);
  return element;
}

function table(columns, rows) {
  return el('div', { class: 'scroll' }, el('table', {},
    el('thead', {}, el('tr', {}, ...columns.map((name) => el('th', { scope: 'col' }, name)))),
    el('tbody', {}, ...rows.map((cells) => el('tr', {}, ...cells.map((cell) => el('td', {}, cell)))))));
}

function facts(pairs) {
  return el('dl', {}, ...pairs.filter(([, value]) => value !== '').flatMap(([name, value]) => [el('dt', {}, name), el('dd', {}, String(value))]));
}

function section(title, ...children) {
  return el('section', {}, el('h3', {}, title), ...children);
}

function list(items) {
  return el('ul', {}, ...items.map((item) => el('li', {}, item)));
}

class Panel {
  constructor(tree, goTo) {
    this.tree = tree;
    this.goTo = goTo;
    this.body = el('div', { class: 'panel-body' });
    this.close = el('button', { type: 'button', class: 'close', 'aria-label': 'close the panel', title: 'close (Esc)' }, '×');
    this.element = el('aside', { class: 'panel', 'aria-label': 'details', hidden: '' }, this.close, this.body);
  }

  // Reports are wider than what is told about one item.
  report(...children) {
    this.show(...children);
    this.element.classList.add('wide');
  }

  show(...children) {
    this.element.classList.remove('wide');
    this.body.replaceChildren(...children);
    this.element.hidden = false;
    this.body.scrollTop = 0;
  }

  goToEdge(edge) {
    this.edge(edge);
    this.onEdge?.(edge);
  }

  link(item, text) {
    return el('button', { type: 'button', class: 'link', onclick: () => this.goTo(item) }, text);
  }

  item(item) {
    if (item.record) {
      this.home(item);
    } else if (item.op) {
      this.operation(item);
    } else if (item.kind === 'group') {
      this.show(this.head(item, `${plural(item.ops.length, 'operation')} of ${item.path || 'the model itself'}`), this.operations(item.ops));
    } else if (item.kind === 'port') {
      this.show(this.head(item, 'What flows here comes from, or goes to, another part of the network.'), this.link(item.target, `go to ${item.target.title}`));
    } else {
      const values = item.input ? item.input.values : this.tree.values(item.source);
      this.show(this.head(item, `${plural(count(values), 'value')} per sample`));
    }
  }

  head(item, sentence) {
    return el('header', {}, el('p', { class: `badge ${item.domain}` }, item.domain), el('h2', {}, item.title), el('p', {}, sentence));
  }

  home(item) {
    const record = item.record;
    const parts = [this.head(item, record.sentence), facts(record.facts)];
    const stayed = item.ops.map((op) => this.tree.data.ops[op]).filter((op) => op.stayed);
    if (stayed.length) {
      parts.push(section('Stayed digital', list(stayed.map((op) => `${op.path || op.name}: ${op.reason}`))));
    }
    if (record.ends?.length) {
      parts.push(section('Why it ends here', list(record.ends.map(([name, why]) => `${name}: ${why}`))));
    }
    const touching = this.tree.arrows.filter((edge) => edge.from === item || edge.to === item);
    parts.push(section('Connections', list(touching.map((edge) => el('button', { type: 'button', class: 'link', onclick: () => this.goToEdge(edge) }, `${edge.from === item ? 'to' : 'from'} ${(edge.from === item ? edge.to : edge.from).title}: ${this.tree.labels(edge).join(', ')}`)))));
    if (record.layers.length) {
      parts.push(section('Layers', table(['layer', 'operation', 'matrix', 'tiles', 'MACs'], record.layers)));
    }
    if (record.measured.length) {
      parts.push(section('Measured', facts(record.measured)));
    }
    if (record.curves) {
      parts.push(...this.relaxation(record.curves));
    }
    if (record.gradients) {
      parts.push(section('Gradients', el('p', {}, `${record.gradients.good ? '∇✓' : '∇!'} ${record.gradients.text}, against float64 unrolled`), table(['weight', 'estimator', 'cosine', 'relative error'], record.gradients.rows)));
    }
    if (record.costs.length) {
      parts.push(section('Costs per sample, modelled', facts(record.costs), this.costsLink('all costs and their sources')));
    }
    if (record.weights.length) {
      parts.push(section('Parameters and statistics', list(record.weights)));
    }
    parts.push(this.operations(item.ops));
    this.show(...parts);
  }

  relaxation(curves) {
    const until = curves.sweeps;
    const shown = until <= curves.residuals.length ? 'the dashed line' : 'beyond the curves';
    return [section('How it settles', facts(curves.facts),
      curve('residual: largest relative change of a layer', curves.residuals, { first: 1, logarithmic: true, until }),
      curves.energies.length
        ? curve('energy, less that of the feedforward values', curves.energies, { first: 0, logarithmic: false, until })
        : el('p', { class: 'quiet' }, 'No energy curve: the feedback has weights of its own.'),
      el('p', { class: 'quiet' }, until ? `The forward stopped at sweep ${until}, ${shown}.` : '')),
    ...(curves.states.length ? [section('Its states, sweep by sweep', ...settling(curves.states))] : [])];
  }

  costsLink(text) {
    return el('button', { type: 'button', class: 'link', onclick: () => this.costs() }, text);
  }

  whatIf() {
    const { rows, unchanged } = this.tree.data.whatIf;
    this.show(
      el('header', {}, el('h2', {}, 'What if'), el('p', {}, 'The same network planned again under each option. Energies are modelled.')),
      table(['option', 'blocks', 'layers that settle together', 'conversions', 'one inference', 'one training step'], rows.map((row) => row.slice(0, 6))),
      list(rows.slice(1).map((row) => `${row[0]}: ${row[6]}`)),
      ...(unchanged.length ? [el('p', { class: 'quiet' }, `Without effect here: ${unchanged.join('; ')}.`)] : []),
    );
  }

  notes() {
    this.show(el('header', {}, el('h2', {}, 'Notes'), el('p', {}, 'What the compiler noted on the way.')), list(this.tree.data.notes));
  }

  costs() {
    const { rows, constants, uncounted, energy, time } = this.tree.data.costs;
    this.show(
      el('header', {}, el('h2', {}, 'Costs per sample'), el('p', {}, 'Modelled, nothing here is measured. “Digital” is the same layers in digital arithmetic at 45 nm, without memory access.')),
      table(['', 'hybrid', 'digital'], rows),
      ...[['Energy of one inference', energy], ['Latency of one inference', time]].filter(([, parts]) => parts.length).map(([name, parts]) => section(name, budget(name, parts), budgetKey(parts))),
      el('p', {}, uncounted ? `In no total, unknown and the same on both sides: ${uncounted}.` : ''),
      section('Constants and their sources', el('ul', { class: 'operations' }, ...constants.map(([name, what, value, source]) => el('li', {}, el('b', {}, `${name}: ${value}`), ` ${what}`, el('small', {}, source))))),
    );
  }

  edge(edge) {
    const sources = [...edge.sources];
    const rows = sources.map((source) => {
      const item = source < 0 ? this.tree.inputs[-1 - source] : this.tree.byId.get(`op:${source}`);
      const op = source < 0 ? null : this.tree.data.ops[source];
      return [this.link(item, op ? `${op.path ? `${op.path}: ` : ''}${op.target}` : item.title), this.tree.shape(source), count(this.tree.values(source))];
    });
    this.show(
      el('header', {}, el('h2', {}, `${edge.from.title} → ${edge.to.title}`), el('p', {}, edge.side ? 'A side input: computed without parameters, and read by many parts.' : this.tree.labels(edge).slice(1).join(', '))),
      table(['value', 'shape', 'per sample'], rows),
      el('p', {}, 'from ', this.link(edge.from, edge.from.title), ' to ', this.link(edge.to, edge.to.title)),
    );
  }

  // Everything digital, by reason, the most frequent first.
  reasons() {
    const groups = new Map();
    this.tree.data.ops.forEach((op, index) => {
      if (op.reason.startsWith('digital: ')) {
        const reason = op.reason.slice(9);
        groups.set(reason, [...(groups.get(reason) ?? []), index]);
      }
    });
    const rows = [...groups].sort((a, b) => b[1].length - a[1].length).map(([reason, ops]) => el('details', {},
      el('summary', {}, `${plural(ops.length, 'operation')}: ${reason}`),
      el('ul', {}, ...ops.slice(0, 60).map((index) => el('li', {}, this.link(this.tree.byId.get(`op:${index}`), `${this.tree.data.ops[index].path || 'the model itself'}: ${this.tree.data.ops[index].target}`)))),
      ...(ops.length > 60 ? [el('p', {}, `and ${ops.length - 60} more`)] : [])));
    this.show(el('header', {}, el('h2', {}, 'Why digital'), el('p', {}, `${groups.size} reasons, the most frequent first`)), ...rows);
  }

  operation(item) {
    const op = item.op;
    const home = item.home;
    this.show(
      this.head(item, op.reason),
      facts([
        ['module', op.path || 'the model itself'], ['name in the graph', op.name], ['output', op.shape],
        ['values per sample', count(op.values)], ['MACs per sample', op.macs ? count(op.macs) : ''],
        ['weights', op.weights.join(', ')],
      ]),
      ...(op.sizes.length ? [el('p', { class: 'quiet' }, `It reads the sizes alone of ${op.sizes.map((source) => (source < 0 ? this.tree.inputs[-1 - source].title : this.tree.data.ops[source].name)).join(', ')}.`)] : []),
      el('p', {}, 'in ', this.link(home, home.title)),
      section('Reads', list(op.in.map((source) => {
        const from = source < 0 ? this.tree.inputs[-1 - source] : this.tree.byId.get(`op:${source}`);
        return this.link(from, source < 0 ? from.title : `${from.op.path ? `${from.op.path}: ` : ''}${from.title}`);
      }))),
    );
  }

  operations(ops) {
    const rows = ops.map((index) => {
      const op = this.tree.data.ops[index];
      return el('li', {}, this.link(this.tree.byId.get(`op:${index}`), op.target), ` ${op.path} · ${op.shape}`, el('small', {}, op.reason));
    });
    return section('Operations', el('ul', { class: 'operations' }, ...rows));
  }

  found(query, items, arrows) {
    const shown = items.slice(0, 60);
    const name = (item) => (item.op ? `${item.op.path ? `${item.op.path}: ` : ''}${item.title}` : item.title);
    const rows = shown.map((item) => el('li', {}, this.link(item, name(item)), el('span', { class: `where ${item.domain}` }, ` ${item.home.title}`)));
    const more = items.length > shown.length ? [el('p', {}, `and ${items.length - shown.length} more`)] : [];
    this.show(el('header', {}, el('h2', {}, `${items.length} found`), el('p', {}, `for “${query}”`)), el('ul', { class: 'found' }, ...rows), ...more,
      ...(arrows.length ? [section(plural(arrows.length, 'arrow'), list(arrows.slice(0, 20).map((edge) => el('button', { type: 'button', class: 'link', onclick: () => this.goToEdge(edge) }, `${edge.from.title} → ${edge.to.title}: ${this.tree.labels(edge).join(', ')}`))))] : []));
  }

  stayed() {
    const { rejected, ops } = this.tree.data;
    const rows = rejected.map(([path, reason]) => {
      const op = ops.findIndex((one) => one.stayed && (one.path || one.name) === path);
      return el('li', {}, op < 0 ? path : this.link(this.tree.byId.get(`op:${op}`), path), el('p', {}, reason));
    });
    const none = el('p', {}, 'Every weight-stationary layer is analog.');
    this.show(el('header', {}, el('h2', {}, 'Stayed digital'), el('p', {}, `${plural(rejected.length, 'weight-stationary layer')} that could have been analog`)), rows.length ? el('ul', {}, ...rows) : none);
  }
}
