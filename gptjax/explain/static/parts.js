// The parts that several views share: colours, canvases, token rows, bars and tables.

// ---- colours. They stay apart for colour-blind readers: one hue for weights, blue and orange for signs.

let palette;

function buildPalette(dark) {
  const ground = dark ? [27, 30, 36] : [255, 255, 255];
  const mix = (a, b, x) => a.map((c, i) => Math.round(c + (b[i] - c) * x));
  const ramp = (stops, x) => {
    const place = x * (stops.length - 1);
    const low = Math.min(Math.floor(place), stops.length - 2);
    return mix(stops[low], stops[low + 1], place - low);
  };
  const weight = dark ? [ground, [23, 74, 122], [86, 160, 222], [222, 240, 255]] : [ground, [190, 217, 240], [65, 137, 199], [8, 48, 107]];
  const positive = dark ? [ground, [30, 96, 150], [126, 190, 240]] : [ground, [150, 198, 230], [0, 95, 160]];
  const negative = dark ? [ground, [140, 70, 20], [250, 164, 92]] : [ground, [250, 200, 160], [196, 84, 0]];
  const heat = dark ? [ground, [120, 66, 24], [245, 170, 95]] : [ground, [253, 214, 178], [200, 88, 8]];
  const table = (stops) => Array.from({ length: 256 }, (_, i) => ramp(stops, i / 255));
  palette = {
    dark,
    text: dark ? "#e6e6e6" : "#1c1c1e",
    soft: dark ? "#9aa2ad" : "#6a6f76",
    line: dark ? "#3a4048" : "#dddfe2",
    ground: `rgb(${ground})`,
    blue: dark ? "#6db3ea" : "#0a66a8",
    orange: dark ? "#f0a35e" : "#c45400",
    masked: dark ? "#262a31" : "#f0f1f3",
    hatch: dark ? "#454c56" : "#cfd3d8",
    weight: table(weight), positive: table(positive), negative: table(negative), heat: table(heat),
  };
}

const clamp = (x) => Math.max(0, Math.min(255, Math.round(x * 255)));
/** The colour of a share between 0 and 1. */
const weightColour = (x) => palette.weight[clamp(x)];
const heatColour = (x) => palette.heat[clamp(x)];
/** The colour of a number with a sign, between -1 and 1. */
const signColour = (x) => (x >= 0 ? palette.positive : palette.negative)[clamp(Math.abs(x))];

function tint(colour) {
  const bright = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2];
  return `background-color:rgb(${colour});color:${bright > 140 ? "#16181c" : "#ffffff"}`;
}

// ---- drawing when looked at

const waiting = new Map();
const observer = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    if (!entry.isIntersecting) continue;
    const action = waiting.get(entry.target);
    waiting.delete(entry.target);
    observer.unobserve(entry.target);
    if (action) action();
  }
}, { rootMargin: "300px" });

function whenSeen(element, action) {
  waiting.set(element, action);
  observer.observe(element);
  return () => {
    waiting.delete(element);
    observer.unobserve(element);
  };
}

/** Draws everything now, for a printer. */
function drawAll() {
  for (const [element, action] of [...waiting]) {
    waiting.delete(element);
    observer.unobserve(element);
    action();
  }
}

/** A canvas with sharp pixels. `draw(context)` is called when it is seen, and again when `on` changes. */
function Canvas({ width, height, draw, on = [], label: name, ...rest }) {
  const canvas = useRef();
  const seen = useRef(false);
  const latest = useRef();
  const state = useStore();
  latest.current = () => {
    const element = canvas.current;
    if (!element || !seen.current || width < 1 || height < 1) return;
    const ratio = Math.min(devicePixelRatio || 1, 3);
    const w = Math.round(width * ratio), h = Math.round(height * ratio);
    if (element.width !== w || element.height !== h) {
      element.width = w;
      element.height = h;
    }
    const context = element.getContext("2d");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, width, height);
    draw(context);
  };
  useEffect(() => whenSeen(canvas.current, () => {
    seen.current = true;
    latest.current();
  }), []);
  useLayoutEffect(() => latest.current(), [width, height, state.theme, palette.dark, state.lang, ...on]);
  const role = rest.role || (name ? "img" : "presentation");
  return html`<canvas ref=${canvas} style=${`width:${width}px;height:${height}px`} role=${role} aria-label=${name} ...${rest} />`;
}

/** Returns [ref, width]: the width of an element in CSS pixels. */
function useWidth(start = 680) {
  const element = useRef();
  const [width, setWidth] = useState(start);
  useLayoutEffect(() => {
    const measure = () => {
      const width_ = element.current ? element.current.clientWidth : 0;
      if (width_ > 60) setWidth(Math.floor(width_)); // 0 while a printer lays the page out
    };
    measure();
    const sizes = new ResizeObserver(measure);
    sizes.observe(element.current);
    return () => sizes.disconnect();
  }, []);
  return [element, width];
}

const FONT = 'system-ui, -apple-system, "Segoe UI", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", sans-serif';

function write(context, text, x, y, { size = 12, colour = palette.soft, align = "left", weight = 400, width } = {}) {
  context.font = `${weight} ${size}px ${FONT}`;
  context.fillStyle = colour;
  context.textAlign = align;
  context.textBaseline = "middle";
  context.fillText(text, x, y, width);
}

/** Draws a vector as coloured cells. */
function strip(context, values, x, y, width, height, colour) {
  const cell = width / values.length;
  for (let i = 0; i < values.length; i++) {
    context.fillStyle = `rgb(${colour(values[i])})`;
    const left = Math.floor((x + i * cell) * 2) / 2;
    context.fillRect(left, y, Math.ceil((x + (i + 1) * cell) * 2) / 2 - left, height);
  }
  context.strokeStyle = palette.line;
  context.lineWidth = 1;
  context.strokeRect(x - 0.5, y - 0.5, width + 1, height + 1);
}

function hatch(context, x, y, width, height) {
  context.save();
  context.beginPath();
  context.rect(x, y, width, height);
  context.clip();
  context.fillStyle = palette.masked;
  context.fillRect(x, y, width, height);
  context.strokeStyle = palette.hatch;
  context.beginPath();
  for (let i = -height; i < width; i += 6) {
    context.moveTo(x + i, y + height);
    context.lineTo(x + i + height, y);
  }
  context.stroke();
  context.restore();
}

const largest = (values) => {
  let most = 1e-9;
  for (const value of values) if (Math.abs(value) > most) most = Math.abs(value);
  return most;
};

// ---- rows of tokens

/** Moves the focus inside a group of items with the arrow keys. Returns whether the key was one. */
function rove(event, selector) {
  const steps = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
  const items = [...event.currentTarget.querySelectorAll(selector)];
  const place = items.indexOf(event.target.closest(selector));
  let next = place + (steps[event.key] || 0);
  if (event.key === "Home") next = 0;
  else if (event.key === "End") next = items.length - 1;
  else if (!(event.key in steps)) return false;
  event.preventDefault();
  next = Math.max(0, Math.min(items.length - 1, next));
  for (const item of items) item.tabIndex = -1;
  items[next].tabIndex = 0;
  items[next].focus();
  return true;
}

/** The tokens of the row, as text that one can point at, step through with the arrow keys, and lock with Enter.
 *
 * `styles` are the styles of the tokens (as CSS texts), `titles` what a screen reader says after a token. */
function Tokens({ view, name, styles = [], titles = null, fallback = null, compact = false, follow = false }) {
  const root = useRef();
  const state = useStore();
  const lists = useMemo(() => data.sequences.map((sequence) => data.tokens.slice(sequence.start, sequence.stop)), []);
  const rows = useMemo(() => data.sequences.map((sequence, s) => html`<div class="sequence" key=${s}>
    ${data.sequences.length > 1 && !compact && html`<span class="name" data-lit><bdi>${sequenceName(s)}</bdi></span>`}
    ${lists[s].map((token, n) => {
      const i = sequence.start + n;
      const special = token.kind !== "text" || !token.seen;
      const joined = token.word !== null && i + 1 < T && data.tokens[i + 1].word === token.word;
      return html`<span class=${`token ${special ? "special" : ""} ${joined ? "joined" : ""}`} data-i=${i} role="button"
        data-lit=${token.kind === "text"} tabindex=${i === (fallback ?? firstText) ? 0 : -1} style=${styles[i]}
        aria-label=${titles ? `${label(token)}: ${titles[i]}` : undefined}><bdi>${label(token, 60)}</bdi></span>`;
    })}
  </div>`), [styles, titles, state.lang, fallback]);
  useLayoutEffect(() => {
    const over = hoverOf(view);
    let on = null, held = null;
    const find = (i) => (i === null ? null : root.current.querySelector(`[data-i="${i}"]`));
    const mark = () => {
      const locked = index(store.state.token, T);
      const active = find(over.token ?? locked ?? fallback), hold = find(locked);
      if (on !== active) {
        if (on) on.classList.remove("on");
        if (active) active.classList.add("on");
        on = active;
      }
      if (held !== hold) {
        if (held) {
          held.classList.remove("locked");
          held.removeAttribute("aria-pressed");
        }
        if (hold) {
          hold.classList.add("locked");
          hold.setAttribute("aria-pressed", "true");
        }
        held = hold;
      }
    };
    mark();
    over.listeners.add(mark);
    store.listeners.add(mark);
    return () => {
      if (on) on.classList.remove("on");
      if (held) held.classList.remove("locked");
      over.listeners.delete(mark);
      store.listeners.delete(mark);
    };
  }, [view, fallback, rows]);
  const at = (event) => {
    const element = event.target.closest("[data-i]");
    return element ? Number(element.dataset.i) : null;
  };
  return html`<div class=${`tokens ${compact ? "compact" : ""}`} ref=${root} role="group" aria-label=${name} data-view=${view}
    onPointerOver=${(event) => { const i = at(event); if (i !== null && event.pointerType !== "touch") hover(view, i); }}
    onPointerLeave=${() => hover(view, null)}
    onClick=${(event) => { const i = at(event); if (i !== null) { hover(view, null); lock(i); } }}
    onKeyDown=${(event) => {
      if (event.key === "Enter" || event.key === " ") {
        event.preventDefault();
        const i = at(event);
        hover(view, null);
        if (i !== null) lock(i);
      } else if (event.key === "Escape") store.set({ token: "", key: "" });
      else if (rove(event, ".token")) hover(view, at({ target: document.activeElement }));
    }}
    onfocusout=${(event) => { if (!root.current.contains(event.relatedTarget)) hover(view, null); }}>${rows}</div>`;
}

// ---- bars and tables

/** Bars with a name and a number. A row is {name, value, text, mark, lit, empty}. */
function Bars({ rows, most, name, signed = false }) {
  const scale = most ?? largest(rows.map((row) => row.value));
  return html`<div class=${`bars ${signed ? "signed" : ""}`} role="list" aria-label=${name}>
    ${rows.map((row) => html`<div class=${`bar ${row.mark ? "mark" : ""} ${row.empty ? "empty" : ""} ${row.value < 0 ? "negative" : ""}`} role="listitem">
      <span class="bar-name" data-lit=${row.lit !== false}><bdi>${row.name}</bdi></span>
      <span class="bar-track" aria-hidden="true"><span class="bar-fill" style=${`width:${(Math.min(1, Math.abs(row.value) / scale) * 100).toFixed(2)}%`} />
        ${row.ghost !== undefined && html`<span class="bar-ghost" style=${`left:${(Math.min(1, row.ghost / scale) * 100).toFixed(2)}%`} />`}</span>
      <span class="bar-value" data-lit>${row.text}</span>
      ${row.note && html`<span class="bar-note">${row.note}</span>`}
    </div>`)}
  </div>`;
}

/** A table behind a picture. `rows()` is called when the reader opens it. */
function Behind({ title, head, rows, literal = [] }) {
  const [open, setOpen] = useState(false);
  useStore();
  return html`<details class="behind" onToggle=${(event) => setOpen(event.target.open)}>
    <summary>${t("table")}: ${title}</summary>
    ${open && html`<div class="scroll" tabindex="0" role="region" aria-label=${title}><table><thead><tr>${head.map((each) => html`<th scope="col">${each}</th>`)}</tr></thead>
      <tbody>${rows().map((row) => html`<tr>${row.map((cell, i) => html`<td data-lit>${cell}</td>`)}</tr>`)}</tbody></table></div>`}
  </details>`;
}

function Figure({ children, caption, wide = false, id }) {
  return html`<figure class=${wide ? "wide" : ""} id=${id}>${children}${caption && html`<figcaption>${caption}</figcaption>`}</figure>`;
}

function Choice({ name, field, values }) {
  const state = useStore(field);
  return html`<div class="choice" role="radiogroup" aria-label=${name}>
    <span class="choice-name">${name}</span>
    ${values.map(([value, text]) => html`<label class=${state[field] === value ? "chosen" : ""}>
      <input type="radio" name=${field} checked=${state[field] === value} onChange=${() => store.set({ [field]: value })} />${text}</label>`)}
  </div>`;
}

/** The word of a token as part of a sentence, between quotes, never taken for HTML. */
const Quote = ({ i }) => html`<bdi class="quote" data-lit=${data.tokens[i].kind === "text"}>${label(data.tokens[i], 30)}</bdi>`;

/** A sentence with parts in it: `fill("a {x} b", {x: vnode})`. */
function fill(text, parts) {
  return text.split(/(\{\w+\})/).map((each) => {
    const name = /^\{(\w+)\}$/.exec(each);
    if (!name) return each;
    const part = parts[name[1]];
    return typeof part === "string" || typeof part === "number" ? html`<span class="given" data-lit>${part}</span>` : part;
  });
}

/** A legend: small squares of colour with their meaning. */
const Scale = ({ from, to, colour }) => html`<span class="scale"><span data-lit>${from}</span>
  ${Array.from({ length: 9 }, (_, i) => html`<i style=${`background-color:rgb(${colour(i / 8)})`} aria-hidden="true" />`)}<span data-lit>${to}</span></span>`;
