// A budget: what a modelled total is made of, as one bar. The same bar has its words in the panel of costs.

function budget(what, parts) {
  const words = parts.map(([name, share]) => `${name} ${(100 * share).toFixed(share < 0.1 ? 1 : 0)} %`).join(', ');
  return el('span', { class: 'budget', role: 'img', 'aria-label': `${what}, modelled: ${words}`, title: `${what}, modelled: ${words} (middles of the ranges)` },
    ...parts.map(([, share], index) => el('i', { class: `share-${index}`, style: `width:${(100 * share).toFixed(2)}%` })));
}

// The words beside a budget's colours.
function budgetKey(parts) {
  return el('ul', { class: 'budget-key' }, ...parts.map(([name, share, range], index) => el('li', {}, el('i', { class: `share-${index}`, 'aria-hidden': 'true' }), ` ${name}: ${range} (${(100 * share).toFixed(share < 0.1 ? 1 : 0)} %)`)));
}
