// The picture as a file of its own: its style rules with the colours of the light theme filled in.

function standAlone(svg, { width, height }, name) {
  const copy = svg.cloneNode(true);
  copy.classList.remove('far');
  copy.setAttribute('xmlns', SVG);
  copy.setAttribute('width', String(width));
  copy.setAttribute('height', String(height));
  for (const element of copy.querySelectorAll('.selected, .dimmed, .hit')) {
    element.classList.remove('selected', 'dimmed', 'hit');
  }
  const colours = new Map([...document.getElementById('colours').textContent.matchAll(/(--[a-z-]+):\s*light-dark\(([^,]+),/g)].map((match) => [match[1], match[2].trim()]));
  const rules = document.getElementById('picture').textContent.replace(/var\((--[a-z-]+)\)/g, (whole, colour) => colours.get(colour) ?? whole);
  copy.prepend(mark('title', {}, name), mark('style', {}, rules), mark('rect', { width, height, fill: '#ffffff' }));
  return new XMLSerializer().serializeToString(copy);
}
