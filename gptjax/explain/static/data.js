// The data of the page, and simple functions of them. Large arrays are decoded when they are asked for.

const data = JSON.parse(document.getElementById("data").textContent);

/** Reads the large arrays, which stand after this script. Only views 5, 6 and 12 need them.
 *
 * They are a gzip file as base64: the length of a JSON text, this text, and the bytes of the arrays. */
let isComplete = false;
async function readMore() {
  const packed = decode(document.getElementById("more").textContent);
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const file = new Uint8Array(await new Response(stream).arrayBuffer());
  const size = new DataView(file.buffer).getUint32(0, true);
  const more = JSON.parse(new TextDecoder().decode(file.subarray(4, 4 + size)));
  const get = ([start, stop]) => file.subarray(4 + size + start, 4 + size + stop);
  const all = (places) => Object.fromEntries(Object.entries(places).map(([name, place_]) => [name, get(place_)]));
  data.attention.weights = get(more.attention.weights);
  data.attention.top = all(more.attention.top);
  data.heads.forEach((each, i) => Object.assign(each, all(more.heads[i])));
  if (data.weights) Object.assign(data.weights, more.weights, { float16: get(more.weights.float16) });
  isComplete = true;
}

const T = data.tokens.length;
const { layers: L, heads: H } = data.model;
const K = data.model.head_width;
const TRIANGLE = (T * (T + 1)) / 2;

function decode(base64) {
  return Uint8Array.fromBase64 ? Uint8Array.fromBase64(base64) : Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
}

/** The bytes of an array: large arrays are bytes already, small ones are base64. */
const bytesOf = (array) => (typeof array === "string" ? decode(array) : array);

const little = new Uint8Array(new Uint16Array([1]).buffer)[0] === 1;

/** Returns numbers `start` to `start + count - 1` of an array of little-endian numbers. */
function numbers(array, Type, start, count) {
  const size = Type.BYTES_PER_ELEMENT;
  const copy = bytesOf(array).slice(start * size, (start + count) * size);
  if (!little) for (let i = 0; i < copy.length; i += size) copy.subarray(i, i + size).reverse();
  return new Type(copy.buffer);
}

function memo(make, limit = Infinity) {
  const known = new Map();
  return (key) => {
    if (!known.has(key)) {
      if (known.size >= limit) known.delete(known.keys().next().value);
      known.set(key, make(key));
    }
    return known.get(key);
  };
}

/** The lower triangle of a head, uint8 [T (T + 1) / 2]. */
const triangleOf = (head) => data.attention.weights.subarray(head * TRIANGLE, (head + 1) * TRIANGLE);
const visible = memo(() => bytesOf(data.attention.visible));

const rowStart = (query) => (query * (query + 1)) / 2;
const isVisible = (query, key) => key <= query && visible(0)[rowStart(query) + key] === 1;

const topOf = memo((head) => ({
  keys: numbers(data.attention.top.keys, Uint16Array, head * T * 8, T * 8),
  values: numbers(data.attention.top.values, Float32Array, head * T * 8, T * 8),
}), 24);

/** The weights of a query, [query + 1]: the eight largest are exact, the others are multiples of 1/255. */
function weightsOf(head, query) {
  const start = rowStart(query);
  const row = Float32Array.from(triangleOf(head).subarray(start, start + query + 1), (w) => w / 255);
  const top = topOf(head);
  for (let i = query * 8; i < query * 8 + 8; i++) if (top.values[i] > 0) row[top.keys[i]] = top.values[i];
  return row;
}

/** The queries, keys, values and outputs of a head that travels, float32 [T, K] each, or null. */
const partsOf = memo((head) => {
  const found = data.heads.find((each) => each.layer * H + each.head === head);
  if (!found) return null;
  const part = (name) => numbers(found[name], Float32Array, 0, T * K);
  return { q: part("q"), k: part("k"), v: part("v"), out: part("out") };
});

/** q.k / sqrt(K) of all pairs, before the mask: float32 [T, T]. */
const scoresOf = memo((head) => {
  const { q, k } = partsOf(head);
  const scores = new Float32Array(T * T);
  const scale = 1 / Math.sqrt(K);
  for (let i = 0; i < T; i++) {
    for (let j = 0; j < T; j++) {
      let sum = 0;
      for (let d = 0; d < K; d++) sum += q[i * K + d] * k[j * K + d];
      scores[i * T + j] = sum * scale;
    }
  }
  return scores;
}, 4);

function softmax(logits, temperature = 1) {
  // Not Math.max(...logits): a vocabulary can have more entries than a call takes arguments.
  const largest = logits.reduce((most, logit) => Math.max(most, logit), -Infinity);
  const powers = logits.map((x) => Math.exp((x - largest) / temperature));
  const sum = powers.reduce((a, b) => a + b, 0);
  return powers.map((x) => x / sum);
}

/** What the page computes itself for a query: scores, weights and output, and their distance from the model's. */
function recompute(head, query) {
  const parts = partsOf(head);
  const scores = scoresOf(head).subarray(query * T, query * T + T);
  const masked = Array.from(scores, (score, key) => (isVisible(query, key) ? score : -Infinity));
  const weights = softmax(masked);
  const out = new Float32Array(K);
  for (let key = 0; key <= query; key++) {
    if (weights[key] > 0) for (let d = 0; d < K; d++) out[d] += weights[key] * parts.v[key * K + d];
  }
  const top = topOf(head);
  let weightError = 0;
  for (let i = query * 8; i < query * 8 + 8; i++) {
    if (top.values[i] > 0) weightError = Math.max(weightError, Math.abs(weights[top.keys[i]] - top.values[i]));
  }
  let outError = 0;
  for (let d = 0; d < K; d++) outError = Math.max(outError, Math.abs(out[d] - parts.out[query * K + d]));
  return { scores, masked, weights, out, weightError, outError };
}

const embeddingOf = memo((name) =>
  data.embedding[name] === null ? null : numbers(data.embedding[name], Float32Array, 0, T * data.embedding.dimensions));

// ---- texts

const hex = (character) => `⟨U+${character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`;

/** Returns a text in which characters that one cannot see, or that turn the direction, are written out. */
function show(text) {
  return String(text)
    .replace(/[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]/g, hex)
    .replace(/[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/g, hex);
}

/** The text of a token. White space, which cannot be seen alone, is drawn. */
const spelled = (text) => show(text).replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/^ +$/, (spaces) => "␣".repeat(spaces.length));

const END_OF_WORD = "</w>";
const plain = (text) => (text.endsWith(END_OF_WORD) && text.length > END_OF_WORD.length ? text.slice(0, -END_OF_WORD.length) : text);

/** The text of a token for a label: a special token has its name in the reader's language. */
function label(token, limit = 40) {
  const text = token.kind === "text" ? spelled(plain(token.text)) : t(`kind_${token.kind}`);
  return shorten(text, limit);
}

function shorten(text, limit) {
  const characters = Array.from(text.length > 4 * limit ? text.slice(0, 4 * limit) : text);
  return characters.length > limit || text.length > 4 * limit ? `${characters.slice(0, limit - 1).join("")}…` : text;
}

const specials = new Map(data.tokens.filter((token) => token.kind !== "text").map((token) => [token.id, token.kind]));

/** A token of the vocabulary that need not be in the row. A special token has its name in the reader's language. */
const piece = (each, limit = 24) => specials.has(each.id) ? t(`kind_${specials.get(each.id)}`) : shorten(spelled(plain(each.text)), limit);

// ---- the answer

const kind = data.task ? data.task.kind : null;
const isRegression = kind === "regression";

const isChoice = kind === "multiple_choice";

/** The names of the entries of `answer.probabilities`: labels, or the texts of the answers. */
const options = !data.task || isRegression ? [] : isChoice ? data.sequences.map((each) => each.name) : data.task.labels;
const predicted = options.length ? data.answer.probabilities.indexOf(Math.max(...data.answer.probabilities)) : -1;
const trueOption = data.input.option ?? -1;
/** A label for people. In a multiple choice it is the text of the answer. */
const option = (i, fallback) => show(i >= 0 ? options[i] : fallback);

/** The name of a sequence, or its number. */
function sequenceName(s) {
  const name_ = data.sequences[s].name;
  const window_ = /^window (\d+)$/.exec(name_);
  return window_ ? `${t("window")} ${window_[1]}` : show(name_) || String(s);
}

/** The tokens of the first sequence's text; the views start with one of them. */
const textTokens = data.tokens.map((token, i) => (token.kind === "text" ? i : -1)).filter((i) => i >= 0);
const firstText = textTokens[0] ?? 0;
const lastText = textTokens[textTokens.length - 1] ?? T - 1;
const reader = data.sequences.length && data.sequences[0].extract !== null ? data.sequences[0].extract : lastText;
const surprising = data.lm.surprise.reduce(
  (best, value, i) => (value !== null && (best < 0 || value > data.lm.surprise[best]) ? i : best), -1);

// ---- numbers

function number(x, digits = 4) {
  if (x === null || x === undefined) return "–";
  if (x === Infinity) return "∞";
  if (x === -Infinity) return "−∞";
  if (x === 0) return "0";
  const size = Math.abs(x);
  const text = size >= 1e6 || size < 1e-4 ? x.toExponential(Math.min(digits, 3) - 1) : Number(x.toPrecision(digits)).toString();
  return text.replace(/-/g, "−").replace("e+", "e");
}
const whole = (x) => (x === null || x === undefined ? "–" : x.toLocaleString("en-US"));
const percent = (p) => `${(100 * p).toFixed(p >= 0.1 || p === 0 ? 1 : p >= 0.001 ? 2 : 4)} %`;
function short(x) {
  if (x === null || x === undefined) return "–";
  for (const [size, unit] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]]) {
    if (x >= size) return `${Number((x / size).toPrecision(3))} ${unit}`;
  }
  return String(x);
}
