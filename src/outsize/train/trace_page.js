"use strict";
(() => {
  const { words, groups } = JSON.parse(document.getElementById("data").textContent);
  const canvas = document.getElementById("trace"), tip = document.getElementById("tip");
  const pen = canvas.getContext("2d");
  const whole = Math.max(...groups.map((group) => group.step)) || 1;
  const tiers = [...new Set(groups.flatMap((group) => Object.keys(group.memory)))];
  const ROW = 22, GAP = 5, HEAD = 26, AXIS = 24, MEMORY = 84, FONT = "system-ui, sans-serif";
  let view = { from: 0, to: whole }, layout, colours, stripes, chosen = null, pointer = null;

  // -- what is where -------------------------------------------------------------------------------------------------

  function place() {
    const width = canvas.clientWidth, narrow = width < 620;
    const left = narrow ? 0 : 150;
    const rows = [], heads = [], charts = [];
    let y = AXIS;
    for (const group of groups) {
      heads.push({ group, y });
      y += HEAD;
      for (const row of group.rows) {
        if (narrow) y += 15;
        const height = Math.max(ROW, Math.min(42, row.tracks.length * 7));
        rows.push({ group, resource: row.resource, tracks: row.tracks, y, height });
        y += height + GAP;
      }
      y += 10;
    }
    for (const tier of tiers) {
      y += HEAD;
      const most = Math.max(1, ...groups.flatMap((group) => (group.memory[tier] || []).map(([, size]) => size)));
      charts.push({ tier, y, height: MEMORY, most: most * 1.08 });
      y += MEMORY + (narrow ? 22 : 8);
    }
    layout = { width, height: y, left, right: width - 4, narrow, rows, heads, charts };
  }

  const x = (time) => layout.left + ((time - view.from) / (view.to - view.from)) * (layout.right - layout.left);
  const timeAt = (at) => view.from + ((at - layout.left) / (layout.right - layout.left)) * (view.to - view.from);

  function look(from, to) {
    const least = whole * 1e-6;
    let length = Math.min(whole, Math.max(least, to - from));
    from = Math.max(0, Math.min(whole - length, from));
    view = { from, to: from + length };
    schedule();
  }

  function zoom(factor, about) {
    look(about - (about - view.from) * factor, about + (view.to - about) * factor);
  }

  /** The first of `spans`, which follow each other, that ends after `time`. */
  function firstAfter(spans, time) {
    let low = 0, high = spans.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (spans[middle][1] > time) high = middle; else low = middle + 1;
    }
    return low;
  }

  // -- drawing -------------------------------------------------------------------------------------------------------

  function readColours() {
    const style = getComputedStyle(document.documentElement);
    const names = ["ink", "soft", "line", "page", "card", "ground", "compute", "update", "read", "write", "up", "down"];
    colours = Object.fromEntries(names.map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
    stripes = Object.fromEntries(names.slice(6).map((name) => [name, striped(colours[name])]));
  }

  function striped(colour) {
    const ratio = devicePixelRatio, size = Math.round(7 * ratio);
    const tile = document.createElement("canvas");
    tile.width = tile.height = size;
    const brush = tile.getContext("2d");
    brush.globalAlpha = 0.2;
    brush.fillStyle = colour;
    brush.fillRect(0, 0, size, size);
    brush.globalAlpha = 1;
    brush.strokeStyle = colour;
    brush.lineWidth = 2 * ratio;
    for (const shift of [-size, 0, size]) {
      brush.beginPath();
      brush.moveTo(shift - 1, size + 1);
      brush.lineTo(shift + size + 1, -1);
      brush.stroke();
    }
    const pattern = pen.createPattern(tile, "repeat");
    pattern.setTransform(new DOMMatrix().scale(1 / ratio));
    return pattern;
  }

  function draw() {
    place();
    const ratio = devicePixelRatio, { width, height } = layout;
    canvas.style.height = `${height}px`;
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    const drawn = Object.fromEntries(groups.map((group) => [group.name, { spans: 0, stalls: 0 }]));
    drawAxis();
    for (const { group, y } of layout.heads) {
      text(group.name, 0, y + 15, { weight: 600, colour: colours.ink });
      const at = pen.measureText(group.name).width + 8;
      text(duration(group.step), at, y + 15, {});
    }
    for (const row of layout.rows) drawRow(row, drawn[row.group.name]);
    for (const { group, y } of layout.heads) drawEnd(group, y);
    for (const chart of layout.charts) drawMemory(chart);
    drawPointer();
    for (const [name, counts] of Object.entries(drawn)) {
      document.body.dataset[`${name}Spans`] = counts.spans;
      document.body.dataset[`${name}Stalls`] = counts.stalls;
    }
    window.outsizeTrace = { drawn, view, layout, whole };
  }

  function text(what, at, y, { weight = 400, colour = colours.soft, align = "left", size = 12.5 }) {
    pen.font = `${weight} ${size}px ${FONT}`;
    pen.fillStyle = colour;
    pen.textAlign = align;
    pen.fillText(what, at, y);
  }

  function drawAxis() {
    const room = Math.max(1, Math.floor((layout.right - layout.left) / 110));
    const raw = (view.to - view.from) / room, power = 10 ** Math.floor(Math.log10(raw));
    const step = power * [1, 2, 5, 10].find((each) => each * power >= raw * 0.999);
    pen.lineWidth = 1;
    for (let index = Math.ceil(view.from / step); index * step <= view.to; index++) {
      const at = x(index * step);
      pen.strokeStyle = colours.line;
      pen.beginPath();
      pen.moveTo(at, AXIS - 6);
      pen.lineTo(at, layout.height);
      pen.stroke();
      const align = at < layout.left + 20 ? "left" : at > layout.right - 30 ? "right" : "center";
      text(tick(index * step, step), at, 12, { align, size: 11.5 });
    }
  }

  function drawRow(row, counts) {
    const { y, height, resource, tracks } = row, { left, right } = layout;
    if (layout.narrow) text(words[resource], 0, y - 4, { size: 11.5 });
    else text(words[resource], 0, y + height / 2 + 4, {});
    pen.fillStyle = colours.ground;
    pen.fillRect(left, y, right - left, height);
    if (resource === "compute") {
      for (const [start, end, cause] of row.group.stalls) {
        if (end <= view.from || start >= view.to) continue;
        const from = Math.max(left, x(start)), to = Math.min(right, x(end));
        pen.fillStyle = stripes[cause];
        pen.fillRect(from, y, Math.max(1, to - from), height);
        counts.stalls++;
      }
    }
    const each = height / Math.max(1, tracks.length);
    tracks.forEach((track, index) => {
      const top = y + index * each, tall = tracks.length > 1 ? each - 1 : each;
      pen.fillStyle = colours[resource];
      let covered = -1;
      for (let at = firstAfter(track, view.from); at < track.length && track[at][0] < view.to; at++) {
        counts.spans++;
        const from = Math.max(left, x(track[at][0])), to = Math.min(right, x(track[at][1]));
        const end = Math.max(from + 1, to - (to - from > 4 ? 1 : 0));  // a seam between neighbours
        if (end <= covered + 0.4) continue;  // nothing new to see
        pen.globalAlpha = track[at][2].startsWith("forward") ? 0.74 : 1;
        pen.fillRect(Math.max(from, covered), top, end - Math.max(from, covered), tall);
        pen.globalAlpha = 1;
        covered = end;
        if (to - from > 32 && tall >= 16) inside(track[at][2], from, top, to - from, tall);
      }
    });
    if (chosen && chosen.row.resource === resource && chosen.row.group === row.group) {
      pen.strokeStyle = colours.ink;
      pen.lineWidth = 1.5;
      pen.strokeRect(left - 2, y - 2, right - left + 4, height + 4);
      if (chosen.span) {
        const [start, end] = chosen.span;
        pen.strokeRect(Math.max(left, x(start)) - 1, y - 1, Math.max(3, Math.min(right, x(end)) - x(start)) + 1, height + 2);
      }
    }
  }

  function inside(label, from, top, room, tall) {
    const colour = pen.fillStyle;
    pen.font = `11px ${FONT}`;
    let shown = label;
    if (pen.measureText(shown).width > room - 10) shown = label.slice(label.indexOf(" ") + 1);
    if (pen.measureText(shown).width <= room - 10) {
      text(shown, from + 5, top + tall / 2 + 4, { size: 11, colour: colours.page });
    }
    pen.fillStyle = colour;
  }

  function drawEnd(group, y) {
    if (group.step >= whole || x(group.step) < layout.left || x(group.step) > layout.right) return;
    const rows = layout.rows.filter((row) => row.group === group), last = rows[rows.length - 1];
    if (!last) return;
    const at = x(group.step);
    pen.globalAlpha = 0.72;
    pen.fillStyle = colours.card;
    pen.fillRect(at, y + HEAD - 2, layout.right - at + 2, last.y + last.height + 4 - y - HEAD);
    pen.globalAlpha = 1;
    pen.fillStyle = colours.ink;
    pen.fillRect(at, y + HEAD - 2, 1.5, last.y + last.height + 4 - y - HEAD);
  }

  function drawMemory({ tier, y, height, most }) {
    const { left, right } = layout, up = (size) => y + height - (size / most) * height;
    text(`memory of the ${tier}`, 0, y - 9, { weight: 600, colour: colours.ink });
    pen.fillStyle = colours.ground;
    pen.fillRect(left, y, right - left, height);
    pen.save();
    pen.beginPath();
    pen.rect(left, y - 2, right - left, height + 4);
    pen.clip();
    for (const group of groups) {
      const points = group.memory[tier] || [];
      if (!points.length) continue;
      const isPlan = group.name === "predicted";
      pen.beginPath();
      points.forEach(([time, size], index) => {
        if (index) pen.lineTo(x(time), isPlan ? up(size) : up(points[index - 1][1]));
        pen.lineTo(x(time), up(size));
      });
      if (!isPlan) {
        pen.strokeStyle = colours.compute;
        pen.lineWidth = 1.6;
        pen.stroke();
        pen.lineTo(x(points[points.length - 1][0]), y + height);
        pen.lineTo(x(points[0][0]), y + height);
        pen.globalAlpha = 0.18;
        pen.fillStyle = colours.compute;
        pen.fill();
        pen.globalAlpha = 1;
      } else {
        pen.setLineDash([6, 4]);
        pen.strokeStyle = colours.ink;
        pen.lineWidth = 1.4;
        pen.stroke();
        pen.setLineDash([]);
      }
    }
    pen.restore();
    const parts = groups.filter((group) => (group.memory[tier] || []).length).map((group) => {
      const size = bytes(Math.max(...group.memory[tier].map(([, each]) => each)));
      return group.name === "predicted" ? `predicted ${size} at most (dashed)` : `measured ${size} at most`;
    });
    if (layout.narrow) text(parts.join(", "), 0, y + height + 14, { size: 11 });
    else parts.forEach((part, index) => part.split(/ (?=at most)/).forEach((line, second) =>
      text(line, 0, y + 16 + index * 40 + second * 16, { size: 11.5 })));
  }

  function drawPointer() {
    if (!pointer || pointer.x < layout.left || pointer.x > layout.right) return;
    pen.globalAlpha = 0.55;
    pen.fillStyle = colours.ink;
    pen.fillRect(pointer.x, AXIS - 4, 1, layout.height - AXIS);
    pen.globalAlpha = 1;
  }

  let waiting = false;
  function schedule() {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; draw(); });
  }

  // -- words ---------------------------------------------------------------------------------------------------------

  function three(value) {
    return value >= 100 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(3)));
  }
  function duration(seconds) {
    if (seconds >= 1) return `${three(seconds)} s`;
    return seconds >= 1e-3 ? `${three(seconds * 1e3)} ms` : `${three(seconds * 1e6)} µs`;
  }
  function tick(seconds, step) {
    const [scale, unit] = step >= 0.1 ? [1, "s"] : step >= 1e-4 ? [1e3, "ms"] : [1e6, "µs"];
    return `${Number((seconds * scale).toFixed(6)).toLocaleString("en", { maximumSignificantDigits: 6 })} ${unit}`;
  }
  function bytes(size) {
    const units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let index = 0;
    while (size >= 1024 && index < 4) { size /= 1024; index++; }
    return `${three(size)} ${units[index]}`;
  }

  // -- what is under the pointer -------------------------------------------------------------------------------------

  function describe(row, span) {
    const [start, end, label, size] = span, took = end - start;
    const lines = [`${row.group.name}: ${words[row.resource]}`, `${duration(took)}, from ${duration(Math.max(0, start))}`];
    if (size) lines.push(`${bytes(size)}, ${bytes(size / Math.max(took, 1e-9))}/s`);
    return { title: label, lines };
  }

  function under(at, y) {
    const time = timeAt(at), slack = (view.to - view.from) * (2 / (layout.right - layout.left));
    for (const row of layout.rows) {
      if (y < row.y || y >= row.y + row.height) continue;
      const track = row.tracks[Math.min(row.tracks.length - 1, Math.floor(((y - row.y) / row.height) * row.tracks.length))] || [];
      const span = track[firstAfter(track, time - slack)];
      if (span && span[0] <= time + slack) return describe(row, span);
      const stall = row.resource === "compute" && row.group.stalls.find(([start, end]) => start <= time && time < end);
      if (!stall) return null;
      const lines = [`${row.group.name}: ${duration(stall[1] - stall[0])}, from ${duration(stall[0])}`];
      return { title: `waiting for ${words[stall[2]] || stall[2]}`, lines };
    }
    for (const chart of layout.charts) {
      if (y < chart.y || y >= chart.y + chart.height) continue;
      const lines = groups.filter((group) => (group.memory[chart.tier] || []).length).map((group) => {
        const points = group.memory[chart.tier];
        const passed = points.filter(([when]) => when <= time);
        return `${group.name}: ${bytes((passed[passed.length - 1] || points[0])[1])}`;
      });
      return { title: `memory of the ${chart.tier} at ${duration(Math.max(0, time))}`, lines };
    }
    return null;
  }

  function show(found, at, y) {
    tip.hidden = !found;
    if (!found) return;
    tip.replaceChildren();
    tip.append(Object.assign(document.createElement("b"), { textContent: found.title }));
    for (const line of found.lines) tip.append(Object.assign(document.createElement("span"), { textContent: line }));
    const wide = tip.offsetWidth;
    tip.style.left = `${Math.max(0, at + 16 + wide > layout.width ? at - wide - 12 : at + 16)}px`;
    tip.style.top = `${y + 14}px`;
  }

  // -- hands ---------------------------------------------------------------------------------------------------------

  const fingers = new Map();
  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    const turned = event.deltaMode ? event.deltaY * 24 : event.deltaY;
    const slid = event.shiftKey ? turned : event.deltaX;
    const length = view.to - view.from;
    if (Math.abs(slid) > Math.abs(turned) || event.shiftKey) {
      const moved = (slid / (layout.right - layout.left)) * length;
      look(view.from + moved, view.to + moved);
    } else zoom(Math.exp(Math.max(-240, Math.min(240, turned)) * 0.002), timeAt(Math.max(layout.left, event.offsetX)));
  }, { passive: false });
  canvas.addEventListener("pointerdown", (event) => {
    fingers.set(event.pointerId, event.offsetX);
    canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener("pointermove", (event) => {
    const before = fingers.get(event.pointerId), at = event.offsetX;
    pointer = { x: at };
    if (before === undefined) {
      show(under(at, event.offsetY), at, event.offsetY);
      schedule();
      return;
    }
    tip.hidden = true;
    const others = [...fingers].filter(([id]) => id !== event.pointerId).map(([, where]) => where);
    fingers.set(event.pointerId, at);
    if (others.length) {
      const apart = Math.max(8, Math.abs(at - others[0])), was = Math.max(8, Math.abs(before - others[0]));
      zoom(was / apart, timeAt((at + others[0]) / 2));
    } else {
      const moved = ((before - at) / (layout.right - layout.left)) * (view.to - view.from);
      look(view.from + moved, view.to + moved);
    }
  });
  for (const kind of ["pointerup", "pointercancel"]) {
    canvas.addEventListener(kind, (event) => fingers.delete(event.pointerId));
  }
  canvas.addEventListener("pointerleave", () => { pointer = null; tip.hidden = true; schedule(); });
  canvas.addEventListener("dblclick", () => look(0, whole));
  canvas.addEventListener("blur", () => { chosen = null; tip.hidden = true; schedule(); });

  function choose(step) {
    const index = chosen ? layout.rows.findIndex((row) => row.group === chosen.row.group && row.resource === chosen.row.resource) : -1;
    const next = index < 0 ? (step > 0 ? 0 : layout.rows.length - 1) : index + step;
    const row = layout.rows[Math.max(0, Math.min(layout.rows.length - 1, next))];
    if (!row) return;
    chosen = { row, span: null };
    show({ title: words[row.resource], lines: [row.group.name] }, layout.left, row.y + row.height);
    schedule();
  }

  function walk(step) {
    if (!chosen) choose(1);
    if (!chosen) return;
    const spans = chosen.row.tracks.flat().sort((one, other) => one[0] - other[0]);
    const found = chosen.span ? spans.indexOf(chosen.span) + step : spans.findIndex((span) => span[1] > view.from);
    const span = spans[Math.max(0, Math.min(spans.length - 1, found))];
    if (!span) return;
    chosen.span = span;
    const length = view.to - view.from;
    if (span[0] < view.from || span[1] > view.to) look(span[0] - length / 4, span[0] + (length * 3) / 4);
    const row = chosen.row;
    show(describe(row, span), Math.max(layout.left, x(Math.max(span[0], view.from))), row.y + row.height);
    schedule();
  }

  const middle = () => (view.from + view.to) / 2, tenth = () => (view.to - view.from) / 10;
  const keys = {
    ArrowLeft: () => look(view.from - tenth(), view.to - tenth()),
    ArrowRight: () => look(view.from + tenth(), view.to + tenth()),
    ArrowUp: () => choose(-1),
    ArrowDown: () => choose(1),
    "+": () => zoom(0.7, middle()),
    "=": () => zoom(0.7, middle()),
    "-": () => zoom(1 / 0.7, middle()),
    0: () => look(0, whole),
    Home: () => look(0, whole),
    "[": () => walk(-1),
    "]": () => walk(1),
    Escape: () => { chosen = null; tip.hidden = true; schedule(); },
  };
  canvas.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || !keys[event.key]) return;
    event.preventDefault();
    keys[event.key]();
  });
  document.getElementById("in").addEventListener("click", () => zoom(0.6, middle()));
  document.getElementById("out").addEventListener("click", () => zoom(1 / 0.6, middle()));
  document.getElementById("fit").addEventListener("click", () => look(0, whole));

  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { readColours(); schedule(); });
  new ResizeObserver(schedule).observe(canvas.parentElement);
  readColours();
  draw();
})();
