// The small map: the whole picture, and the part of it that the window shows. A click or a drag moves the window.

const MAP = { width: 150, height: 96 };

class Minimap {
  constructor(view) {
    this.view = view;
    this.map = document.createElementNS(SVG, 'svg');
    this.map.setAttribute('aria-hidden', 'true');
    this.window = mark('rect', { class: 'window' });
    this.element = el('div', { class: 'minimap', hidden: '', title: 'the whole picture: click or drag to move' }, this.map);
    view.stage.addEventListener('scroll', () => this.move(), { passive: true });
    const go = (event) => {
      if (event.buttons & 1) {
        const box = this.map.getBoundingClientRect();
        const { size } = view.picture;
        const [x, y] = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
        view.stage.scrollTo(x * size.width * view.scale - view.stage.clientWidth / 2, y * size.height * view.scale - view.stage.clientHeight / 2);
      }
    };
    this.element.addEventListener('pointerdown', (event) => {
      this.element.setPointerCapture(event.pointerId);
      event.preventDefault();
      go(event);
    });
    this.element.addEventListener('pointermove', go);
  }

  // The boxes of the first view, from the layout of the picture.
  draw() {
    const laid = this.view.picture.lay(this.view.tree.root);
    const boxes = laid.items.map((item, index) => {
      const { x, y, width, height } = laid.nodes[index];
      return mark('rect', { class: item.kind === 'stage' ? 'stage' : item.domain, x: x - width / 2 + laid.shift.x, y: y - height / 2 + laid.shift.y, width, height });
    });
    const { width, height } = this.view.picture.size;
    const scale = Math.min(MAP.width / width, MAP.height / height);
    this.map.setAttribute('viewBox', `0 0 ${width} ${height}`);
    this.map.setAttribute('width', String(Math.max(24, width * scale)));
    this.map.setAttribute('height', String(Math.max(24, height * scale)));
    this.window.setAttribute('stroke-width', String(1.5 / scale));
    this.map.replaceChildren(...boxes, this.window);
    this.move();
  }

  move() {
    const { stage, scale, picture } = this.view;
    if (!picture.size) {
      return;
    }
    const [width, height] = [picture.size.width * scale, picture.size.height * scale];
    this.element.hidden = width <= stage.clientWidth + 4 && height <= stage.clientHeight + 4;
    const part = { x: stage.scrollLeft / scale, y: stage.scrollTop / scale, width: Math.min(stage.clientWidth, width) / scale, height: Math.min(stage.clientHeight, height) / scale };
    Object.entries(part).forEach(([name, value]) => this.window.setAttribute(name, value.toFixed(1)));
  }
}
