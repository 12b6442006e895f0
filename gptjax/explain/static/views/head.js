// View 5: one head of one block.

const headName = (head) => `${Math.floor(head / H)}.${head % H}`;

/** Returns the number of the head that is chosen: layer * H + head. */
function chosenHead(text) {
  const match = /^(\d+)\.(\d+)$/.exec(text);
  if (match) {
    const layer = Number(match[1]), head = Number(match[2]);
    if (layer < L && head < H) return layer * H + head;
  }
  return clearest();
}

/** The head that the page opens with: of those that travel, the one with the clearest pattern. */
const clearest = () => {
  let best = 0, most = -1;
  for (const each of data.patterns) {
    const number_ = each.layer * H + each.head;
    if (data.heads.length && !travels.has(number_)) continue;
    const size = Math.max(each.previous ?? 0, each.same ?? 0, each.delimiter ?? 0, (each.extract ?? 0) * 0.5);
    if (size > most) [best, most] = [number_, size];
  }
  return best;
};

const travels = new Set(data.heads.map((each) => each.layer * H + each.head));

function HeadPicker() {
  const state = useStore("head");
  const head = chosenHead(state.head);
  const pick = (event) => {
    const item = event.target.closest("[data-head]");
    if (item) store.set({ head: headName(Number(item.dataset.head)) });
  };
  return html`<div class="picker-box"><div class="picker" role="group" aria-label=${t("pick_head")} style=${`grid-template-columns:auto repeat(${H},minmax(0,22px))`}
    onClick=${pick} onKeyDown=${(event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); pick(event); } else rove(event, "[data-head]"); }}>
    ${Array.from({ length: L }, (_, l) => html`<span class="picker-name">${t("block")} <span data-lit>${l}</span></span>
      ${Array.from({ length: H }, (_, h) => {
        const each = l * H + h;
        return html`<span role="button" class=${`dot ${travels.has(each) ? "full" : ""} ${each === head ? "chosen" : ""}`} data-head=${each} tabindex=${each === head ? 0 : -1}
          aria-pressed=${each === head ? "true" : "false"} aria-label=${`${t("block")} ${l}, ${t("head")} ${h}`} title=${headName(each)} />`;
      })}`)}
  </div><p class="legend"><i class="dot full" />${t("dot_full")} <i class="dot" />${t("dot_empty")}</p></div>`;
}

/** Paints a T x T picture once; `colour(i, j)` gives [r, g, b]. */
function picture(colour) {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = T;
  const context = canvas.getContext("2d");
  const image = context.createImageData(T, T);
  for (let i = 0, at = 0; i < T; i++) {
    for (let j = 0; j < T; j++, at += 4) {
      const [r, g, b] = colour(i, j);
      image.data[at] = r;
      image.data[at + 1] = g;
      image.data[at + 2] = b;
      image.data[at + 3] = 255;
    }
  }
  context.putImageData(image, 0, 0);
  return canvas;
}

const MASKED = { light: [238, 239, 242], dark: [38, 42, 49] };
const maskedColour = () => (palette.dark ? MASKED.dark : MASKED.light);

function weightPicture(head) {
  const triangle = triangleOf(head), masked = maskedColour();
  return picture((i, j) => (isVisible(i, j) ? weightColour(Math.sqrt(triangle[rowStart(i) + j] / 255)) : masked));
}

function paste(context, image, x, y, size) {
  context.imageSmoothingEnabled = size < T;
  context.drawImage(image, x, y, size, size);
  const cell = size / T;
  if (cell >= 9) {
    context.strokeStyle = palette.ground;
    context.lineWidth = 1;
    context.beginPath();
    for (let i = 1; i < T; i++) {
      context.moveTo(x + i * cell, y);
      context.lineTo(x + i * cell, y + size);
      context.moveTo(x, y + i * cell);
      context.lineTo(x + size, y + i * cell);
    }
    context.stroke();
  }
  context.strokeStyle = palette.line;
  context.strokeRect(x, y, size, size);
}

/** The lines of the query and the key over a matrix. */
function cross(context, x, y, size, query, key) {
  const cell = size / T;
  context.lineWidth = 1.5;
  context.strokeStyle = palette.orange;
  context.strokeRect(x - 1, y + query * cell - 0.5, size + 2, Math.max(cell, 1.5) + 1);
  if (key !== null) {
    context.strokeStyle = palette.text;
    context.strokeRect(x + key * cell - 0.5, y - 1, Math.max(cell, 1.5) + 1, size + 2);
  }
}

/** Moves over a matrix with the pointer or the arrow keys. */
function matrixEvents(geometry, query, key) {
  const at = (event) => {
    const box = event.currentTarget.getBoundingClientRect();
    const j = Math.floor((event.clientX - box.left - geometry.x) / geometry.cell);
    const i = Math.floor((event.clientY - box.top - geometry.y) / geometry.cell);
    if (j < 0 || j >= T) return null;
    if (i < 0) return { i: j, j: null };
    return i < T ? { i, j } : null;
  };
  return {
    tabindex: 0,
    role: "application",
    onPointerMove: (event) => { const p = at(event); if (p) hover("head", p.i, p.j); else hover("head", null); },
    onPointerLeave: () => hover("head", null),
    onClick: (event) => { const p = at(event); if (p) { hover("head", null); lock(p.i, p.j ?? ""); } },
    onBlur: () => hover("head", null),
    onKeyDown: (event) => {
      const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
      const inside = (x) => Math.max(0, Math.min(T - 1, x));
      if (event.key in moves) {
        const [di, dj] = moves[event.key];
        event.preventDefault();
        hover("head", inside(query + di), inside((key ?? query) + dj));
      } else if (event.key === "Enter" || event.key === " ") {
        event.preventDefault();
        hover("head", null);
        lock(query, key ?? "");
      } else if (event.key === "Escape") {
        hover("head", null);
        store.set({ token: "", key: "" });
      }
    },
  };
}

function Head() {
  const state = useStore("head", "order");
  const head = chosenHead(state.head);
  const { token: query, key: over } = useToken("head", reader);
  const parts = partsOf(head);
  const own = useMemo(() => (parts ? recompute(head, query) : null), [head, query]);
  // From q and k where they travel, because the matrix has only multiples of 1 / 255.
  const row = useMemo(() => (own ? Float32Array.from(own.weights).subarray(0, query + 1) : weightsOf(head, query)), [head, query]);
  const best = useMemo(() => row.reduce((at, w, i) => (w > row[at] ? i : at), 0), [row]);
  const key = over ?? best;
  const picker = useMemo(() => html`<${HeadPicker} />`, []);
  const list = useMemo(() => html`<${Tokens} view="head" name=${t("queries")} fallback=${reader} compact />`, [state.lang]);
  useLayoutEffect(() => {
    const items = document.querySelectorAll('[data-view="head"] .token');
    const most = Math.max(...row, 1e-6);
    // Only what changes is set: a row can have hundreds of tokens.
    items.forEach((item, i) => {
      const seen = isVisible(query, i);
      const style = seen ? tint(weightColour(0.85 * Math.sqrt(row[i] / most))) : "";
      if (item.shownStyle === style) return;
      item.shownStyle = style;
      item.style.cssText = style;
      item.classList.toggle("hidden-key", !seen);
    });
  }, [row, palette, state.theme, state.lang]);
  const intro = useMemo(() => html`<p>${t("head_intro")}</p>
    <div class="aside-formulas"><${Formula} of="qkv" block /><${Formula} of="scores" block /><${Formula} of="weights" block /><${Formula} of="heads" block /></div>
    <p>${t("head_mask")}</p>`, [state.lang]);
  return html`${intro}
    <h3 id="one-head">${fill(t("block_head"), { block: Math.floor(head / H), head: head % H })}</h3>
    ${picker}
    <p class="hint">${t("hint_head")}</p>
    ${list}
    <${Matrix} head=${head} query=${query} shownKey=${key} row=${row} />
    <p class="readout" aria-live="polite">${fill(t(isVisible(query, key) ? "readout" : "readout_masked"), { query: html`<${Quote} i=${query} />`, key: html`<${Quote} i=${key} />`, weight: number(row[key] ?? 0) })}</p>
    <${Behind} title=${t("weights_of_query")} head=${[t("place"), t("token"), t("col_score"), t("col_mask"), t("col_weight")]}
      rows=${() => data.tokens.map((token, i) => [i, label(token), own ? number(own.scores[i]) : "–", isVisible(query, i) ? "0" : "−∞", isVisible(query, i) ? number(row[i]) : "0"])} />
    ${parts ? html`<${Mask} head=${head} query=${query} shownKey=${key} />
      <${Elements} head=${head} query=${query} shownKey=${key} own=${own} parts=${parts} row=${row} best=${best} />
      <${Output} head=${head} query=${query} own=${own} parts=${parts} />`
    : html`<p class="notice">${t("weights_only")}${gap()}${fill(t("weights_only_list"), { heads: html`<span data-lit>${data.heads.map((each) => html`<button type="button" class="link" onClick=${() => store.set({ head: `${each.layer}.${each.head}` })}>${each.layer}.${each.head}</button> `)}</span>` })}</p>`}`;
}

function Matrix({ head, query, shownKey: key, row }) {
  const state = useStore();
  const [figure, width] = useWidth();
  const labels = (width - 90) / T >= 11;
  const x = labels ? 92 : 14;
  const cell = Math.min(26, (Math.min(width, labels ? width : 680) - x - 6) / T);
  const size = cell * T;
  const arcs = 96, names = labels ? 58 : 10, y = arcs + names;
  const limit = 12;
  const drawBase = (context) => {
    paste(context, weightPicture(head), x, y, size);
    if (!labels) return;
    for (let i = 0; i < T; i++) {
      write(context, label(data.tokens[i], limit), x - 6, y + (i + 0.5) * cell, { align: "right", size: 11.5, width: 84 });
      context.save();
      context.translate(x + (i + 0.5) * cell, y - 6);
      context.rotate(-Math.PI / 3.2);
      write(context, label(data.tokens[i], limit), 0, 0, { size: 11.5, width: 62 });
      context.restore();
    }
  };
  const drawOver = (context) => {
    cross(context, x, y, size, query, key);
    const floor = arcs - 2;
    const centre = (i) => x + (i + 0.5) * cell;
    const most = Math.max(...row, 1e-6);
    context.lineCap = "round";
    for (let j = 0; j <= query; j++) {
      if (row[j] < 0.004) continue;
      const from = centre(query), to = centre(j);
      context.strokeStyle = j === key ? palette.orange : palette.blue;
      context.globalAlpha = 0.25 + 0.75 * (row[j] / most);
      context.lineWidth = 0.6 + 6 * row[j];
      context.beginPath();
      if (j === query) context.ellipse(from, floor - 8, 5, 8, 0, 0, 2 * Math.PI);
      else {
        const rise = Math.min(arcs - 10, 16 + Math.abs(from - to) * 0.5);
        context.moveTo(from, floor);
        context.bezierCurveTo(from, floor - rise * 1.3, to, floor - rise * 1.3, to, floor);
      }
      context.stroke();
    }
    context.globalAlpha = 1;
    context.fillStyle = palette.orange;
    context.beginPath();
    context.arc(centre(query), floor, 3.5, 0, 7);
    context.fill();
    if (!labels) {
      write(context, label(data.tokens[query], 16), Math.min(centre(query), width - 40), 10, { align: "center", colour: palette.orange, weight: 600 });
      if (key !== query) write(context, label(data.tokens[key], 16), Math.max(30, Math.min(centre(key), width - 40)), 26, { align: "center", colour: palette.text });
    } else {
      // Over the label of the lower canvas.
      context.fillStyle = palette.ground;
      context.fillRect(0, y + query * cell + 1, x - 2, cell - 2);
      write(context, label(data.tokens[query], limit), x - 6, y + (query + 0.5) * cell, { align: "right", size: 11.5, width: 84, colour: palette.orange, weight: 700 });
    }
  };
  const events = matrixEvents({ x, y, cell }, query, key);
  return html`<${Figure} wide caption=${t("matrix_caption")}>
    <div class="layers-of-canvas" ref=${figure} style=${`height:${y + size + 4}px`}>
      <${Canvas} width=${width} height=${y + size + 4} draw=${drawBase} on=${[head, cell]} />
      <${Canvas} width=${width} height=${y + size + 4} draw=${drawOver} on=${[head, query, key]} ...${events} label=${t("matrix_label")} class="matrix" />
    </div>
    <p class="legend"><${Scale} from="0" to="1" colour=${(w) => weightColour(Math.sqrt(w))} /> <i class="key masked" />${t("masked_key")}</p>
  </${Figure}>`;
}

/** Scores + mask -> softmax -> weights, as three matrices. */
function Mask({ head, query, shownKey: key }) {
  useStore();
  const [figure, width] = useWidth();
  const stack = width < 560;
  const size = stack ? Math.min(width - 20, 260) : Math.floor((width - 76) / 3);
  const top = 24;
  const places = stack ? [0, 1, 2].map((n) => [4, top + n * (size + 44)]) : [0, 1, 2].map((n) => [4 + n * (size + 34), top]);
  const height = places[2][1] + size + 4;
  const scale = useMemo(() => largest(scoresOf(head)), [head]);
  const draw = (context) => {
    const scores = scoresOf(head), masked = maskedColour();
    const images = [
      picture((i, j) => signColour(scores[i * T + j] / scale)),
      picture((i, j) => (isVisible(i, j) ? [255, 255, 255].map((c) => (palette.dark ? 70 : c)) : palette.dark ? [8, 9, 11] : [96, 100, 108])),
      weightPicture(head),
    ];
    images.forEach((image, n) => {
      write(context, [t("scores_title"), t("mask_title"), t("weights_title")][n], places[n][0] + size / 2, places[n][1] - 12, { align: "center", size: 12 });
      paste(context, image, places[n][0], places[n][1], size);
    });
    const [mx, my] = places[1];
    // Inside the triangle of the longest sequence.
    const longest = data.sequences.reduce((a, b) => (b.stop - b.start > a.stop - a.start ? b : a));
    const zero = (share) => ((longest.start + share * (longest.stop - longest.start)) / T) * size;
    write(context, "0", mx + zero(0.3), my + zero(0.72), { size: 20, align: "center", colour: palette.text });
    if (T > 1) write(context, "−∞", mx + size * 0.72, my + size * 0.28, { size: 20, align: "center", colour: palette.dark ? "#e6e6e6" : "#fff" });
    if (!stack) {
      write(context, "+", places[1][0] - 17, top + size / 2, { size: 18, align: "center", colour: palette.text });
      write(context, "→", places[2][0] - 17, top + size / 2, { size: 18, align: "center", colour: palette.text });
    }
  };
  const over = (context) => places.forEach(([x, y]) => cross(context, x, y, size, query, key));
  return html`<h3>${t("mask_heading")}</h3><p>${t("mask_text")}</p>
    <${Figure} wide caption=${t("mask_caption")}>
      <div class="layers-of-canvas" ref=${figure} style=${`height:${height}px`}
        onPointerMove=${(event) => {
          const box = event.currentTarget.getBoundingClientRect();
          const px = event.clientX - box.left, py = event.clientY - box.top;
          const found = places.find(([x, y]) => px >= x && px < x + size && py >= y && py < y + size);
          if (found) hover("head", Math.floor(((py - found[1]) / size) * T), Math.floor(((px - found[0]) / size) * T));
          else hover("head", null);
        }} onPointerLeave=${() => hover("head", null)} onClick=${() => { const h = hoverOf("head"); if (h.token !== null) lock(h.token, h.key ?? ""); }}>
        <${Canvas} width=${width} height=${height} draw=${draw} on=${[head, size]} label=${t("mask_label")} />
        <${Canvas} width=${width} height=${height} draw=${over} on=${[head, query, key]} />
      </div>
      <p class="legend"><${Scale} from=${number(-scale, 2)} to=${number(scale, 2)} colour=${(x) => signColour(2 * x - 1)} /> ${t("scores_title")}</p>
    </${Figure}>`;
}

const ROWS = 18;

/** q.k element by element: for one key in large, and for many keys as rows. */
function Elements({ head, query, shownKey: key, own, parts, row, best }) {
  const state = useStore("order");
  const [figure, width] = useWidth();
  const { q, k, v } = parts;
  const scales = useMemo(() => ({ qk: Math.max(largest(q), largest(k)) }), [head]);
  const vector = (x, i) => x.subarray(i * K, (i + 1) * K);
  const product = (j) => Float32Array.from(vector(q, query), (x, d) => x * k[j * K + d]);
  const keys = useMemo(() => {
    const seen = [];
    for (let j = 0; j < T; j++) if (isVisible(query, j)) seen.push(j);
    const after = [];
    for (let j = 0; j < T && after.length < 2; j++) if (!isVisible(query, j) && j > query) after.push(j);
    for (let j = query; j >= 0 && after.length < 2; j--) if (!isVisible(query, j)) after.push(j);
    if (state.order === "weight") seen.sort((a, b) => own.weights[b] - own.weights[a]);
    const kept = state.order === "weight" ? seen.slice(0, ROWS) : seen.slice(-ROWS);
    return { kept: [...kept, ...after.sort((a, b) => a - b)], seen: seen.length, shown: kept.length, rest: seen.filter((j) => !kept.includes(j)).reduce((sum, j) => sum + own.weights[j], 0) };
  }, [head, query, state.order, own]);
  const narrow = width < 600;
  const nameWidth = narrow ? 70 : 104, bar = narrow ? 0 : 62, text = narrow ? 40 : 48;
  const strips = Math.max(40, (width - nameWidth - 2 * bar - 2 * text - 44 - 26) / 2);
  const x = { name: nameWidth, product: nameWidth + 8, score: nameWidth + 14 + strips, mask: 0, weight: 0, value: 0 };
  x.mask = x.score + bar + text;
  x.weight = x.mask + 40;
  x.value = x.weight + bar + text + 4;
  const scoreScale = Math.max(...keys.kept.map((j) => Math.abs(own.scores[j])), 1e-9);
  const productScale = useMemo(() => keys.kept.reduce((most, j) => Math.max(most, largest(product(j))), 1e-9), [keys]);
  const line = 21, top = 58;
  const height = top + keys.kept.length * line + 44;
  const valueScale = Math.max(largest(own.out), ...keys.kept.filter((j) => isVisible(query, j)).map((j) => own.weights[j] * largest(vector(v, j))), 1e-9);
  const sign = (scale) => (value) => signColour(Math.max(-1, Math.min(1, value / (0.8 * scale))));
  const draw = (context) => {
    const heads = [[t("col_product"), x.product], [t("col_scaled"), x.score], [t("col_mask"), x.mask], [t("col_weight"), x.weight], [t("col_value"), x.value]];
    for (const [title, left] of heads) write(context, title, left, 10, { size: 11, width: left === x.product || left === x.value ? strips : left === x.mask ? 40 : bar + text });
    write(context, `q  ${label(data.tokens[query], 10)}`, nameWidth, 34, { align: "right", colour: palette.orange, weight: 650, width: nameWidth - 4 });
    strip(context, vector(q, query), x.product, 27, strips, 14, sign(scales.qk));
    keys.kept.forEach((j, n) => {
      const y = top + n * line, middle = y + 8, seen = isVisible(query, j);
      if (j === key) {
        context.fillStyle = palette.masked;
        context.fillRect(0, y - 2, width, line - 1);
      }
      write(context, label(data.tokens[j], 14), nameWidth, middle, { align: "right", colour: seen ? palette.text : palette.soft, weight: j === key ? 650 : 400, width: nameWidth - 2 });
      strip(context, product(j), x.product, y + 1, strips, 14, sign(productScale));
      if (bar) {
        const half = bar / 2, size = (own.scores[j] / scoreScale) * (half - 2);
        context.fillStyle = own.scores[j] >= 0 ? palette.blue : palette.orange;
        context.globalAlpha = seen ? 1 : 0.35;
        context.fillRect(x.score + half + Math.min(0, size), y + 3, Math.abs(size), 10);
        context.globalAlpha = 1;
        context.fillStyle = palette.line;
        context.fillRect(x.score + half, y, 1, 16);
        context.fillStyle = palette.blue;
        context.fillRect(x.weight, y + 3, own.weights[j] * (bar - 4), 10);
      }
      write(context, number(own.scores[j], 3), x.score + bar + text - 6, middle, { align: "right", size: 11.5, colour: palette.text });
      write(context, seen ? "+ 0" : "− ∞", x.mask + 4, middle, { size: 11.5, colour: seen ? palette.soft : palette.orange, weight: seen ? 400 : 700 });
      write(context, number(own.weights[j], 3), x.weight + bar + text - 6, middle, { align: "right", size: 11.5, colour: palette.text, width: text + 8 });
      if (seen) strip(context, Float32Array.from(vector(v, j), (value) => value * own.weights[j]), x.value, y + 1, strips, 14, sign(valueScale));
      else hatch(context, x.value, y + 1, strips, 14);
    });
    const y = top + keys.kept.length * line + 8;
    write(context, fillText(t("rest_weight"), { rest: number(keys.rest, 3), count: keys.seen - keys.shown }), x.weight + bar + text - 6, y + 8, { align: "right", size: 11.5 });
    strip(context, own.out, x.value, y, strips, 16, sign(valueScale));
    write(context, t("output_sum"), x.value, y + 27, { size: 11 });
  };
  const big = Math.min(width - 200, 26 * K);
  const values = product(key);
  const total = values.reduce((a, b) => a + b, 0);
  const drawPair = (context) => {
    const rows = [["q", query, vector(q, query), scales.qk], ["k", key, vector(k, key), scales.qk], ["q∘k", null, values, largest(values)]];
    rows.forEach(([symbol, i, x_, scale], n) => {
      const y = 4 + n * 30;
      write(context, symbol, 8, y + 11, { colour: palette.text, weight: 600 });
      if (i !== null) write(context, label(data.tokens[i], 12), 40, y + 11, { width: 68 });
      strip(context, x_, 112, y, big, 22, sign(scale));
      if (big / K > 24) x_.forEach((value, d) => {
        const c = sign(scale)(value), bright = 0.299 * c[0] + 0.587 * c[1] + 0.114 * c[2];
        write(context, value.toFixed(1).replace("-", "−"), 112 + (d + 0.5) * (big / K), y + 11.5, { size: 9, align: "center", colour: bright > 140 ? "#222" : "#fff" });
      });
    });
    write(context, `Σ = ${number(total, 4)}`, 112 + big + 8, 75, { colour: palette.text, weight: 650, width: 78 });
  };
  const pick = (event) => {
    const box = event.currentTarget.getBoundingClientRect();
    const n = Math.floor((event.clientY - box.top - top) / line);
    return n >= 0 && n < keys.kept.length ? keys.kept[n] : null;
  };
  const seen = isVisible(query, key);
  return html`<h3>${t("elements_heading")}</h3><p>${fill(t("elements_text"), { query: html`<${Quote} i=${query} />`, key: html`<${Quote} i=${key} />`, width: K })}</p>
    <${Figure} wide><div ref=${figure}><${Canvas} width=${width} height=${94} draw=${drawPair} on=${[head, query, key]} label=${t("pair_label")} /></div>
      <p class="sum-line" data-lit><span>q·k = ${number(total)}</span> <span>q·k / √${K} = ${number(total / Math.sqrt(K))}</span> <span>${seen ? "+ 0" : "+ (−∞)"}</span> <span>softmax → ${number(own.weights[key])}</span></p>
      <${Behind} title=${t("pair_label")} head=${[t("dimension"), "q", "k", "q∘k", "v"]} rows=${() => Array.from(values, (value, d) => [d, number(q[query * K + d]), number(k[key * K + d]), number(value), number(v[key * K + d])])} />
    </${Figure}>
    <p class="check" id="check"><b>${t("check")}</b>${gap()}${fill(t("check_weights"), { error: html`<span class="given" data-lit id="weight-error">${number(own.weightError, 2)}</span>` })}${gap()}${fill(t("check_out"), { error: html`<span class="given" data-lit id="out-error">${number(own.outError, 2)}</span>` })}</p>
    <${Choice} name=${t("key_order")} field="order" values=${[["weight", t("by_weight")], ["place", t("by_place")]]} />
    <${Figure} wide caption=${fill(t("elements_caption"), { shown: keys.shown, seen: keys.seen })}>
      <${Canvas} width=${width} height=${height} draw=${draw} on=${[head, query, key, state.order]} label=${t("elements_label")} class="pointer"
        onPointerMove=${(event) => { const j = pick(event); if (j !== null) hover("head", query, j); }} onPointerLeave=${() => hover("head", null)}
        onClick=${(event) => { const j = pick(event); if (j !== null) { hover("head", null); lock(query, j); } }} />
    </${Figure}>`;
}

const fillText = (text, parts) => text.replace(/\{(\w+)\}/g, (all, name) => parts[name] ?? all);

/** The output of the head and its place in the concatenation. */
function Output({ head, query, own, parts }) {
  useStore();
  const [figure, width] = useWidth();
  const layer = Math.floor(head / H);
  const scale = useMemo(() => largest(parts.out), [head]);
  const draw = (context) => {
    const gap = 4, block = (width - gap * (H - 1)) / H;
    for (let h = 0; h < H; h++) {
      const x = h * (block + gap), each = partsOf(layer * H + h), mine = layer * H + h === head;
      if (each) strip(context, each.out.subarray(query * K, (query + 1) * K), x, 26, block, 26, (value) => signColour(Math.max(-1, Math.min(1, value / (0.8 * scale)))));
      else hatch(context, x, 26, block, 26);
      if (mine) {
        context.strokeStyle = palette.orange;
        context.lineWidth = 2;
        context.strokeRect(x, 24, block, 30);
      }
      write(context, `z${String(h).split("").map((d) => "⁰¹²³⁴⁵⁶⁷⁸⁹"[d]).join("")}`, x + block / 2, 11, { align: "center", colour: mine ? palette.orange : palette.soft, weight: mine ? 700 : 400 });
    }
  };
  return html`<h3>${t("concat_heading")}</h3><p>${fill(t("concat_text"), { heads: H, head_width: K, width: H * K })}</p>
    <${Figure} wide caption=${t("concat_caption")}><div ref=${figure}><${Canvas} width=${width} height=${58} draw=${draw} on=${[head, query]} label=${t("concat_heading")} /></div>
    <${Formula} of="attention_out" block /></${Figure}>
    <${Behind} title=${t("output_table")} head=${[t("dimension"), t("out_page"), t("out_model")]} rows=${() => Array.from(own.out, (value, d) => [d, number(value), number(parts.out[query * K + d])])} />`;
}
