// Repeats: stages of a network that are alike. The first one is drawn, and the others are one node until it is opened.
// A run of neighbours in a topological order has no path out of it and back, so that folding makes no cycle.

const LEAST = 24;

class Stages {
  constructor(tree) {
    this.tree = tree;
    const homes = tree.root.items.filter((item) => item.record);
    const signatures = homes.map((item) => JSON.stringify([item.domain, item.settles ?? false, item.ops.map((op) => {
      const { target, shape, macs } = tree.data.ops[op];
      return [target, shape, macs];
    })]));
    this.all = homes.length > LEAST ? this.find(signatures).map(([start, period, times], index) => this.stage(index, homes.slice(start + period, start + period * times), times - 1)) : [];
  }

  // Runs of equal periods, the longest first, that do not overlap: [start, period, times], at least three times.
  find(signatures) {
    const runs = [];
    for (let period = 1; period <= signatures.length / 3; period++) {
      for (let at = 0; at + period < signatures.length; at++) {
        let end = at;
        while (end + period < signatures.length && signatures[end] === signatures[end + period]) {
          end++;
        }
        const times = Math.floor((end - at) / period) + 1;
        if (times >= 3) {
          runs.push([at, period, times]);
        }
        at = Math.max(at, end);
      }
    }
    runs.sort((a, b) => b[1] * b[2] - a[1] * a[2] || a[1] - b[1]);
    const taken = new Set();
    return runs.filter(([start, period, times]) => {
      const places = Array.from({ length: period * times }, (_, index) => start + index);
      const free = places.every((place) => !taken.has(place));
      places.forEach((place) => free && taken.add(place));
      return free;
    });
  }

  stage(index, homes, times) {
    const blocks = homes.filter((item) => item.domain === 'analog').length;
    const lines = [`${homes[0].title} to ${homes.at(-1).title}`, `${plural(blocks, 'block')}, ${plural(homes.length - blocks, 'digital part')}`];
    const item = {
      id: `stage:${index}`, kind: 'stage', domain: 'stage', title: `×${times} more like the ${homes.length / times} above`, items: null, open: false,
      up: this.tree.root, depth: 1, ops: [], lines: lines.map((text) => ({ text, style: 'quiet' })), homes, folded: true, short: `×${times} more`, brief: `${plural(blocks, 'block')}, ${plural(homes.length - blocks, 'part')}`,
    };
    item.home = item;
    this.tree.byId.set(item.id, item);
    return item;
  }

  get key() {
    return this.all.map((stage) => Number(stage.folded)).join('');
  }

  // Unfold the stage that holds an item.
  show(item) {
    this.all.filter((stage) => stage === item || stage.homes.includes(item.home)).forEach((stage) => { stage.folded = false; });
  }

  fold(folded) {
    this.all.forEach((stage) => { stage.folded = folded; });
  }

  // Items and edges of the first view, with every folded stage as one item.
  folded(items, edges) {
    const into = new Map(this.all.filter((stage) => stage.folded).flatMap((stage) => stage.homes.map((home) => [home, stage])));
    const merged = new Map();
    for (const edge of edges) {
      const [from, to] = [into.get(edge.from) ?? edge.from, into.get(edge.to) ?? edge.to];
      const known = merged.get(`${from.id}\n${to.id}`);
      if (known) {
        edge.sources.forEach((source) => known.sources.add(source));
        edge.own.forEach((name) => known.own.add(name));
        Object.assign(known, { adc: known.adc + edge.adc, dac: known.dac + edge.dac, shared: known.shared || edge.shared, side: known.side && edge.side });
      } else if (from !== to) {
        merged.set(`${from.id}\n${to.id}`, { ...edge, from, to, sources: new Set(edge.sources), own: new Set(edge.own) });
      }
    }
    return { items: [...new Set(items.map((item) => into.get(item) ?? item))], edges: [...merged.values()] };
  }
}
