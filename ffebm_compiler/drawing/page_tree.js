// The hierarchy of a plan: blocks and digital parts -> module paths -> operations.
// An item is {id, domain, title, lines, items, ops, up, open, home, depth}; `items` is null for a leaf.

function plural(number, noun) {
  return `${number} ${noun}${number === 1 ? '' : 's'}`;
}

function count(value) {
  for (const [size, unit] of [[1e9, ' G'], [1e6, ' M'], [1e4, ' k']]) {
    if (value >= size) {
      return `${Number((value / (unit === ' k' ? 1e3 : size)).toPrecision(3))}${unit}`;
    }
  }
  return String(value);
}

class Tree {
  constructor(data) {
    this.data = data;
    this.byId = new Map();
    this.root = { id: 'root', items: [], up: null, open: true, depth: 0, ops: data.ops.map((_, index) => index) };
    this.chains = data.ops.map(() => []);
    this.inputs = data.inputs.map((input) => this.add(this.root, {
      id: `input:${input.name}`, domain: 'input', title: `${input.name} · input`, lines: [], ops: [], input,
    }));
    data.homes.forEach((home, index) => this.addHome(home, index));
    this.outputs = data.outputs.map((source, index) => this.add(this.root, {
      id: `output:${index}`, domain: 'output', title: data.outputs.length > 1 ? `output ${index + 1}` : 'output',
      lines: [], ops: [], source,
    }));
    this.users = data.ops.map(() => []);
    data.ops.forEach((op, index) => op.in.forEach((source) => source >= 0 && this.users[source].push(index)));
  }

  add(up, item) {
    const made = { items: null, open: false, up, depth: up.depth + 1, home: up.home ?? null, ...item };
    made.home = made.home ?? made;
    up.items = up.items ?? [];
    up.items.push(made);
    this.byId.set(made.id, made);
    return made;
  }

  addHome(home, index) {
    const item = this.add(this.root, {
      id: `home:${index}`, domain: home.domain, settles: home.settles, title: home.title, lines: home.lines, ops: home.ops, record: home,
      stayed: home.ops.some((op) => this.data.ops[op].stayed),
    });
    // A group is one call of a module: two calls of one are two nodes.
    const groups = new Map();
    const parts = new Map();
    for (const op of home.ops) {
      const { path, group } = this.data.ops[op];
      if (!groups.has(group)) {
        groups.set(group, []);
        parts.set(path, [...(parts.get(path) ?? []), group]);
      }
      groups.get(group).push(op);
    }
    for (const [group, ops] of groups) {
      const { path, call } = this.data.ops[ops[0]];
      const part = parts.get(path).length > 1 && call === 0 ? ` (${parts.get(path).indexOf(group) + 1} of ${parts.get(path).length})` : '';
      const which = call ? ` · call ${call + 1}` : part;
      const chain = [item];
      let up = item;
      if (ops.length > 1 && groups.size > 1) {
        up = this.add(item, {
          id: `group:${index}:${group}`, domain: home.domain, title: `${path || 'the model itself'}${which}`, ops, kind: 'group',
          lines: [{ text: this.words(ops), style: 'quiet' }], path, stayed: ops.some((op) => this.data.ops[op].stayed),
        });
        chain.push(up);
      }
      for (const op of ops) {
        const record = this.data.ops[op];
        const leaf = this.add(up, {
          id: `op:${op}`, domain: home.domain, title: record.target, ops: [op], op: record, kind: 'op',
          lines: [...(up === item && record.path ? [`${record.path}${which}`] : []), ...(record.driven ? ['driven state, no weights'] : [])].map((text) => ({ text, style: 'quiet' })),
          stayed: record.stayed, driven: record.driven,
        });
        this.chains[op] = [...chain, leaf];
      }
    }
  }

  words(ops) {
    const counts = new Map();
    for (const op of ops) {
      const target = this.data.ops[op].target;
      counts.set(target, (counts.get(target) ?? 0) + 1);
    }
    return [...counts].map(([target, times]) => (times > 1 ? `${target} ×${times}` : target)).join(', ');
  }

  homeOf(source) {
    return source < 0 ? this.inputs[-1 - source] : this.chains[source][0];
  }

  // The arrows of the first view, unfolded. They never change.
  get arrows() {
    this.known ??= this.edges(this.root).edges;
    return this.known;
  }

  // What flows between the items directly inside a container; what enters or leaves it gets a port of its own.
  edges(container) {
    const ports = new Map();
    const edges = new Map();
    const inside = new Set(container.ops);
    const converted = new Set();
    const port = (kind, home) => {
      const id = `${kind}:${container.id}:${home.id}`;
      if (!ports.has(id)) {
        ports.set(id, {
          id, domain: home.domain, kind: 'port', title: `${kind} ${home.title}`, lines: [], items: null, home, target: home,
        });
      }
      return ports.get(id);
    };
    const connect = (from, to, source, crossing, own = [], side = false) => {
      const key = `${from.id}\n${to.id}`;
      const edge = edges.get(key) ?? { from, to, sources: new Set(), dac: 0, adc: 0, shared: false, side: true, own: new Set() };
      own.forEach((name) => edge.own.add(name));
      edge.side &&= side;
      if (!edge.sources.has(source)) {
        edge.sources.add(source);
        // A value is converted once, wherever it is read: the first edge that carries it counts it.
        const leaves = crossing && this.homeOf(source).domain === 'analog';
        edge.adc += leaves && !converted.has(source) ? this.values(source) : 0;
        edge.shared ||= leaves && converted.has(source);
        leaves && converted.add(source);
        edge.dac += crossing && crossing.domain === 'analog' ? this.values(source) : 0;
      }
      edges.set(key, edge);
    };
    const at = container.depth;
    for (const op of container.ops) {
      const mine = this.chains[op][at];
      for (const source of this.data.ops[op].in) {
        const home = this.homeOf(source);
        const crossing = home === this.chains[op][0] ? null : this.chains[op][0];
        if (container === this.root || inside.has(source)) {
          const from = source < 0 ? home : this.chains[source][at];
          if (from !== mine) {
            connect(from, mine, source, crossing, crossing ? [] : this.data.ops[op].feedback, this.data.ops[op].side.includes(source));
          }
        } else {
          connect(port('from', home), mine, source, crossing);
        }
      }
      if (container !== this.root) {
        for (const user of this.users[op]) {
          if (!inside.has(user)) {
            const home = this.chains[user][0];
            connect(mine, port('to', home), op, home === this.chains[op][0] ? null : home);
          }
        }
      }
    }
    for (const output of this.outputs) {
      if (container === this.root) {
        connect(this.homeOf(output.source), output, output.source, output);
      } else if (inside.has(output.source)) {
        connect(this.chains[output.source][at], port('to', output), output.source, output);
      }
    }
    return { ports: [...ports.values()], edges: [...edges.values()] };
  }

  values(source) {
    return source < 0 ? this.data.inputs[-1 - source].values : this.data.ops[source].values;
  }

  labels(edge) {
    const sources = [...edge.sources];
    const shapes = [...new Set(sources.map((source) => this.shape(source)))];
    const total = sources.reduce((sum, source) => sum + this.values(source), 0);
    const many = shapes.length === 1 ? `${sources.length} × ${shapes[0]}` : `${sources.length} tensors, ${plural(count(total), 'value')}`;
    const crossing = [edge.adc ? `ADC ${count(edge.adc)}` : '', edge.shared ? 'ADC of another edge' : '', edge.dac ? `DAC ${count(edge.dac)}` : ''];
    const own = edge.own.size ? shorten(`feedback: ${[...edge.own].join(', ')}`) : '';
    return [sources.length === 1 ? shapes[0] : many, crossing.filter(Boolean).join(', '), own].filter(Boolean);
  }

  shape(source) {
    return source < 0 ? plural(count(this.values(source)), 'value') : this.data.ops[source].shape;
  }

  // Arrows of the first view whose ends, labels or values contain every word of the query.
  searchArrows(query) {
    const fits = this.fitting(query);
    const value = (source) => (source < 0 ? this.inputs[-1 - source].input.name : `${this.data.ops[source].name} ${this.data.ops[source].path}`);
    return this.arrows.filter((edge) => fits(`${edge.from.title} ${edge.to.title} ${this.labels(edge).join(' ')} ${[...edge.sources].map(value).join(' ')}`));
  }

  // Whether a text contains every word of a query; nothing does where it has none.
  fitting(query) {
    const words = query.toLowerCase().split(/\s+/).filter(Boolean);
    return (text) => words.length > 0 && words.every((word) => text.toLowerCase().includes(word));
  }

  // Operations, module paths, blocks that contain every word of the query.
  search(query) {
    const fits = this.fitting(query);
    const found = [];
    for (const item of this.byId.values()) {
      const op = item.op;
      const text = op ? `${op.path} ${op.target} ${op.name} ${op.weights.join(' ')}` : `${item.title} ${item.path ?? ''}`;
      if (fits(text)) {
        found.push(item);
      }
    }
    return found;
  }
}
