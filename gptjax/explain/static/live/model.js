// The forward pass in the page: GPT-1 on float16-rounded parameters, with float32 activations and
// float64 sums. The letters of shapes are those of gptjax/batch.py. A test compares the logits with
// those of gptjax on the same rounded parameters.
//
// Long work is a generator that gives way every few milliseconds. `complete` runs it, and a frame
// stays free. (A worker would need a second file, or a wider policy of the page.)

const Live = (() => {
  // ---- parameters

  /** All 65,536 numbers of float16. */
  const halves = memo(() => Float32Array.from({ length: 65536 }, (_, i) => {
    const sign = i & 0x8000 ? -1 : 1, exponent = (i >> 10) & 31, fraction = i & 1023;
    if (exponent === 0) return sign * fraction * 2 ** -24;
    return exponent === 31 ? (fraction ? NaN : sign * Infinity) : sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
  }));

  /** [inputs, outputs] -> [outputs, inputs], the order in which a sum over the inputs is fastest. */
  function transposed(kernel, inputs, outputs) {
    const found = new Float32Array(kernel.length);
    for (let i = 0; i < inputs; i++) for (let o = 0; o < outputs; o++) found[o * inputs + i] = kernel[i * outputs + o];
    return found;
  }

  /** Returns the model of the objects `weights` and `model` of the page. */
  function* load(weights, model) {
    const table = halves(0), arrays = {};
    let start = 0;
    for (const { name, shape } of weights.arrays) {
      const size = shape.reduce((a, b) => a * b, 1);
      const codes = numbers(weights.float16, Uint16Array, start, size), values = new Float32Array(size);
      for (let i = 0; i < size; i++) values[i] = table[codes[i]];
      arrays[name] = values;
      start += size;
      yield;
    }
    const { layers, heads, width, ffn_width: ffn } = model;
    const blocks = [];
    for (let l = 0; l < layers; l++) {
      const part = (name, size) => arrays[`blocks/${name}`].subarray(l * size, (l + 1) * size);
      const linear = (name, inputs, outputs) => ({
        inputs, outputs, kernel: transposed(part(`${name}/kernel`, inputs * outputs), inputs, outputs), bias: part(`${name}/bias`, outputs),
      });
      const norm = (name) => ({ scale: part(`${name}/scale`, width), bias: part(`${name}/bias`, width) });
      blocks.push({
        qkv: linear("attention/qkv", width, 3 * width), out: linear("attention/out", width, width), norm1: norm("norm1"),
        ffnIn: linear("ffn_in", width, ffn), ffnOut: linear("ffn_out", ffn, width), norm2: norm("norm2"),
      });
      yield;
    }
    const outputs = arrays["task_head/bias"] ? arrays["task_head/bias"].length : 0;
    return {
      layers, heads, width, ffn, size: width / heads, context: model.context_length, vocabulary: model.vocab_size,
      epsilon: weights.epsilon, relu: model.activation === "relu", mean: model.head === "mean", input: weights.input,
      embedding: { token: arrays.token_embedding, position: arrays.position_embedding, segment: arrays.segment_embedding },
      blocks,
      lm: { inputs: width, outputs: model.vocab_size, kernel: arrays["lm_head/kernel"] || arrays.token_embedding, bias: arrays["lm_head/bias"] || null },
      task: outputs ? { inputs: width, outputs, kernel: transposed(arrays["task_head/kernel"], width, outputs), bias: arrays["task_head/bias"] } : null,
    };
  }

  // ---- the parts of a block

  /** Columns `from` to `to - 1` of y [rows, outputs] = x [rows, inputs] kernel + bias. */
  function columns(x, rows, { inputs: M, outputs: N, kernel: w, bias }, y, from, to) {
    for (let n = from; n < to; n += 2) {
      // The last column or row can be computed twice, so that all sums are made in blocks of 4 x 2.
      const two = n + 1 < to, w0 = n * M, w1 = two ? w0 + M : w0;
      const b0 = bias ? bias[n] : 0, b1 = bias && two ? bias[n + 1] : 0;
      for (let t = 0; t < rows; t += 4) {
        const x0 = t * M, x1 = t + 1 < rows ? x0 + M : x0, x2 = t + 2 < rows ? x0 + 2 * M : x0, x3 = t + 3 < rows ? x0 + 3 * M : x0;
        let a0 = 0, a1 = 0, a2 = 0, a3 = 0, c0 = 0, c1 = 0, c2 = 0, c3 = 0;
        for (let m = 0; m < M; m++) {
          const u = w[w0 + m], v = w[w1 + m], p = x[x0 + m], q = x[x1 + m], r = x[x2 + m], s = x[x3 + m];
          a0 += p * u; a1 += q * u; a2 += r * u; a3 += s * u;
          c0 += p * v; c1 += q * v; c2 += r * v; c3 += s * v;
        }
        let at = t * N + n;
        y[at] = a0 + b0;
        if (two) y[at + 1] = c0 + b1;
        if (t + 1 < rows) { at += N; y[at] = a1 + b0; if (two) y[at + 1] = c1 + b1; }
        if (t + 2 < rows) { at += N; y[at] = a2 + b0; if (two) y[at + 1] = c2 + b1; }
        if (t + 3 < rows) { at += N; y[at] = a3 + b0; if (two) y[at + 1] = c3 + b1; }
      }
    }
  }

  /** The same for one row of x: four columns at a time. */
  function single(x, { inputs: M, outputs: N, kernel: w, bias }, y) {
    let n = 0;
    for (; n + 3 < N; n += 4) {
      const w0 = n * M, w1 = w0 + M, w2 = w1 + M, w3 = w2 + M;
      let a = 0, b = 0, c = 0, d = 0;
      for (let m = 0; m < M; m++) {
        const p = x[m];
        a += p * w[w0 + m]; b += p * w[w1 + m]; c += p * w[w2 + m]; d += p * w[w3 + m];
      }
      y[n] = a; y[n + 1] = b; y[n + 2] = c; y[n + 3] = d;
    }
    for (; n < N; n++) {
      let a = 0;
      for (let m = 0; m < M; m++) a += x[m] * w[n * M + m];
      y[n] = a;
    }
    if (bias) for (let i = 0; i < N; i++) y[i] += bias[i];
  }

  // About the products between two breaks: two milliseconds.
  const PRODUCTS = 2e6;

  function* linear(x, rows, layer, y) {
    if (rows === 1) single(x, layer, y);
    else {
      const step = Math.max(2, 2 * Math.floor(PRODUCTS / (2 * rows * layer.inputs)));
      for (let n = 0; n < layer.outputs; n += step) {
        columns(x, rows, layer, y, n, Math.min(layer.outputs, n + step));
        yield;
      }
    }
  }

  /** x = norm(x + y) in each row. */
  function addAndNorm(x, y, rows, width, { scale, bias }, epsilon) {
    for (let t = 0, at = 0; t < rows; t++, at += width) {
      let mean = 0, square = 0;
      for (let d = 0; d < width; d++) mean += x[at + d] += y[at + d];
      mean /= width;
      for (let d = 0; d < width; d++) square += (x[at + d] - mean) ** 2;
      const factor = 1 / Math.sqrt(square / width + epsilon);
      for (let d = 0; d < width; d++) x[at + d] = (x[at + d] - mean) * factor * scale[d] + bias[d];
    }
  }

  const SLOPE = Math.sqrt(2 / Math.PI);

  function activate(h, relu) {
    if (relu) for (let i = 0; i < h.length; i++) h[i] = Math.max(0, h[i]);
    else for (let i = 0; i < h.length; i++) h[i] = 0.5 * h[i] * (1 + Math.tanh(SLOPE * h[i] * (1 + 0.044715 * h[i] * h[i])));
  }

  /** The weighted values of one query in one head: softmax(q k / sqrt(K)) v over the keys it sees.
   *
   * Key s is at keys[s * stride + base], and `segments` (or null: all) says which keys the query sees. */
  function attend(query, q, keys, values, stride, keyBase, valueBase, size, segments, scores, out, o, factor) {
    const scale = 1 / Math.sqrt(size);
    let most = -Infinity;
    for (let s = 0; s <= query; s++) {
      if (segments && segments[s] !== segments[query]) {
        scores[s] = -Infinity;
        continue;
      }
      const at = s * stride + keyBase;
      let sum = 0;
      for (let k = 0; k < size; k++) sum += q[k] * keys[at + k];
      scores[s] = sum * scale;
      if (scores[s] > most) most = scores[s];
    }
    let total = 0;
    for (let s = 0; s <= query; s++) total += scores[s] = Math.exp(scores[s] - most);
    for (let k = 0; k < size; k++) out[o + k] = 0;
    for (let s = 0; s <= query; s++) {
      if (scores[s] === 0) continue;
      const weight = factor * scores[s] / total, at = s * stride + valueBase;
      for (let k = 0; k < size; k++) out[o + k] += weight * values[at + k];
    }
  }

  function embed(model, id, position, type, x, at) {
    const { token, position: places, segment } = model.embedding, D = model.width;
    for (let d = 0; d < D; d++) {
      x[at + d] = token[id * D + d] + places[position * D + d] + (segment ? segment[type * D + d] : 0);
    }
  }

  // ---- whole rows

  /** The states after the last block, float32 [T, D].
   *
   * `row` is {ids, positions, types, segments}. `factors` [L * H] is 0 for a head that is off (null: none).
   * `cache` takes the keys and values of a row that is one sequence. */
  function* states(model, row, factors = null, cache = null) {
    const { width: D, heads, size, ffn } = model, rows = row.ids.length;
    const x = new Float32Array(rows * D), y = new Float32Array(rows * D), z = new Float32Array(rows * D);
    const qkv = new Float32Array(rows * 3 * D), h = new Float32Array(rows * ffn), scores = new Float64Array(rows);
    for (let t = 0; t < rows; t++) embed(model, row.ids[t], row.positions[t], row.types[t], x, t * D);
    for (let l = 0; l < model.layers; l++) {
      const block = model.blocks[l];
      yield* linear(x, rows, block.qkv, qkv);
      for (let head = 0; head < heads; head++) {
        const factor = factors ? factors[l * heads + head] : 1, base = head * size;
        for (let t = 0; t < rows; t++) {
          const q = qkv.subarray(t * 3 * D + base, t * 3 * D + base + size);
          attend(t, q, qkv, qkv, 3 * D, D + base, 2 * D + base, size, row.segments, scores, z, t * D + base, factor);
          if (t % 32 === 31) yield;
        }
      }
      if (cache) {
        for (let t = 0; t < rows; t++) {
          cache.keys[l].set(qkv.subarray(t * 3 * D + D, t * 3 * D + 2 * D), t * D);
          cache.values[l].set(qkv.subarray(t * 3 * D + 2 * D, t * 3 * D + 3 * D), t * D);
        }
        cache.length = rows;
      }
      yield* linear(z, rows, block.out, y);
      addAndNorm(x, y, rows, D, block.norm1, model.epsilon);
      yield* linear(x, rows, block.ffnIn, h);
      activate(h, model.relu);
      yield;
      yield* linear(h, rows, block.ffnOut, y);
      addAndNorm(x, y, rows, D, block.norm2, model.epsilon);
      yield;
    }
    return x;
  }

  /** What the LM head says at each place: {surprise [T] or null, logits}. Logits [T, V] only if wanted. */
  function* predictions(model, row, x, keep = false) {
    const { width: D, vocabulary: V } = model, rows = row.ids.length, together = 16;
    const surprise = new Array(rows).fill(null), logits = keep ? new Float32Array(rows * V) : null;
    let last = null;
    for (let from = 0; from < rows; from += together) {
      const count = Math.min(together, rows - from), some = new Float32Array(count * V);
      yield* linear(x.subarray(from * D, (from + count) * D), count, model.lm, some);
      for (let i = 0; i < count; i++) {
        const t = from + i, each = some.subarray(i * V, (i + 1) * V);
        if (row.predicts[t]) surprise[t] = logSumExp(each) - each[row.ids[t + 1]];
        if (t === row.reader) last = each.slice();
        if (keep) logits.set(each, t * V);
      }
      yield;
    }
    return { surprise, last, logits };
  }

  function logSumExp(logits) {
    let most = -Infinity, sum = 0;
    for (let i = 0; i < logits.length; i++) if (logits[i] > most) most = logits[i];
    for (let i = 0; i < logits.length; i++) sum += Math.exp(logits[i] - most);
    return most + Math.log(sum);
  }

  /** The outputs of the task head: for each class, or for each answer, or one number. */
  function taskLogits(model, row, x) {
    const D = model.width, { task, input } = model;
    let read = row.sequences.map(({ extract }) => {
      if (!model.mean) return Float32Array.from(x.subarray(extract * D, (extract + 1) * D));
      const sum = new Float64Array(D);
      let count = 0;
      row.segments.forEach((segment, t) => {
        if (segment !== row.segments[extract]) return;
        for (let d = 0; d < D; d++) sum[d] += x[t * D + d];
        count++;
      });
      return Float32Array.from(sum, (value) => value / count);
    });
    if (!input.answers && (input.orders > 1 || input.windows)) {
      const share = input.orders > 1 ? 1 : 1 / read.length;
      read = [read[0].map((_, d) => share * read.reduce((sum, each) => sum + each[d], 0))];
    }
    return read.flatMap((each) => {
      const out = new Float32Array(task.outputs);
      single(each, task, out);
      return [...out];
    });
  }

  /** The whole forward pass of a row, with heads off and tokens hidden as `gptjax.Changes` does it. */
  function* forward(model, row, { factors = null, hidden = [], keep = false } = {}) {
    let changed = row;
    if (hidden.length) {
      // A hidden token is a segment of its own: no other token sees it, and it sees only itself.
      const segments = [...row.segments];
      let most = Math.max(...segments);
      for (const token of hidden) segments[token] = ++most;
      changed = { ...row, segments };
    }
    const x = yield* states(model, changed, factors);
    const found = yield* predictions(model, changed, x, keep);
    return { ...found, task: model.task ? taskLogits(model, changed, x) : null };
  }

  // ---- texts

  /** The numbers of tokens of two texts to keep, as `cut_pair` in gptjax/data/tasks.py. */
  function cutPair(first, second, budget) {
    if (first + second <= budget) return [first, second];
    const keepSecond = Math.min(second, Math.max(Math.floor(budget / 2), budget - first));
    return [Math.min(first, budget - keepSecond), keepSecond];
  }

  /** Returns the row of texts: a list of ids for each column. The rules are those of gptjax/data/tasks.py. */
  function rowOf(model, special, texts) {
    const { input, context } = model;
    if (!input) {
      const ids = texts[0].slice(0, context);
      return finish([{ ids, second: ids.length }], texts[0].length > context, false);
    }
    let cut = false;
    const join = (parts) => {
      let keep;
      if (parts.length === 1) keep = [Math.min(parts[0].length, context - 2)];
      else if (input.cut === "half") keep = parts.map((part) => Math.min(part.length, Math.floor(context / 2) - 2));
      else keep = cutPair(parts[0].length, parts[1].length, context - 3);
      cut = cut || parts.some((part, i) => keep[i] < part.length);
      const first = input.keeps_end ? parts[0].slice(parts[0].length - keep[0]) : parts[0].slice(0, keep[0]);
      const ids = [special.start, ...first];
      if (parts.length > 1) ids.push(special.delimiter, ...parts[1].slice(0, keep[1]));
      ids.push(special.extract);
      return { ids, second: parts.length > 1 ? keep[0] + 2 : ids.length };
    };
    if (input.answers) return finish(texts.slice(1).map((answer) => join([texts[0], answer])), cut, true);
    const room = context - 2;
    if (input.windows && texts[0].length > room) {
      const count = Math.min(input.windows, Math.ceil(texts[0].length / room)), kept = Math.min(texts[0].length, count * room);
      const ends = Array.from({ length: count + 1 }, (_, i) => Math.floor((kept * i) / count));
      const windows = ends.slice(1).map((end, i) => join([texts[0].slice(ends[i], end)]));
      return finish(windows, kept < texts[0].length, true);
    }
    return finish([texts, [...texts].reverse()].slice(0, input.orders).map(join), cut, true);
  }

  /** Puts sequences into one row. */
  function finish(parts, cut, ends) {
    const row = { ids: [], positions: [], types: [], segments: [], predicts: [], sequences: [], cut, reader: 0 };
    parts.forEach(({ ids, second }, s) => {
      const start = row.ids.length;
      ids.forEach((id, i) => {
        row.ids.push(id);
        row.positions.push(i);
        row.types.push(i >= second ? 1 : 0);
        row.segments.push(s + 1);
        row.predicts.push(i + 1 < ids.length);
      });
      row.sequences.push({ start, stop: row.ids.length, extract: ends ? row.ids.length - 1 : null });
    });
    // The place after which the next token of the text is asked for.
    row.reader = Math.max(0, row.sequences[0].stop - (ends ? 2 : 1));
    return row;
  }

  // ---- drawing new text

  const newCache = (model) => ({
    length: 0,
    keys: model.blocks.map(() => new Float32Array(model.context * model.width)),
    values: model.blocks.map(() => new Float32Array(model.context * model.width)),
  });

  /** Runs a text through the model and fills the cache. Returns the logits of the next token. */
  function* prefill(model, ids, cache, factors) {
    const zeros = ids.map(() => 0), D = model.width;
    const x = yield* states(model, { ids, positions: ids.map((_, i) => i), types: zeros, segments: zeros }, factors, cache);
    const logits = new Float32Array(model.vocabulary);
    single(x.subarray((ids.length - 1) * D), model.lm, logits);
    return logits;
  }

  /** Runs one more token through the model. Returns the logits of the next one. */
  function step(model, id, cache, factors) {
    const { width: D, heads, size, ffn } = model, place = cache.length++;
    const x = new Float32Array(D), y = new Float32Array(D), z = new Float32Array(D), qkv = new Float32Array(3 * D);
    const h = new Float32Array(ffn), scores = new Float64Array(place + 1);
    embed(model, id, place, 0, x, 0);
    model.blocks.forEach((block, l) => {
      single(x, block.qkv, qkv);
      const keys = cache.keys[l], values = cache.values[l];
      keys.set(qkv.subarray(D, 2 * D), place * D);
      values.set(qkv.subarray(2 * D), place * D);
      for (let head = 0; head < heads; head++) {
        const base = head * size, factor = factors ? factors[l * heads + head] : 1;
        attend(place, qkv.subarray(base, base + size), keys, values, D, base, base, size, null, scores, z, base, factor);
      }
      single(z, block.out, y);
      addAndNorm(x, y, 1, D, block.norm1, model.epsilon);
      single(x, block.ffnIn, h);
      activate(h, model.relu);
      single(h, block.ffnOut, y);
      addAndNorm(x, y, 1, D, block.norm2, model.epsilon);
    });
    const logits = new Float32Array(model.vocabulary);
    single(x, model.lm, logits);
    return logits;
  }

  /** The probabilities of the next token after temperature, top-k and top-p, as gptjax/infer/generate.py. */
  function distribution(logits, { temperature, topk, topp }) {
    const found = new Float64Array(logits.length);
    if (temperature === 0) {
      found[logits.reduce((best, value, i) => (value > logits[best] ? i : best), 0)] = 1;
      return found;
    }
    const scaled = Float64Array.from(logits, (value) => value / Math.max(temperature, 1e-6));
    let floor = -Infinity;
    if (topk > 0 || topp < 1) {
      const falling = Float64Array.from(scaled).sort().reverse();
      const border = falling[(topk > 0 ? Math.min(topk, falling.length) : falling.length) - 1];
      floor = border;
      if (topp < 1) {
        const inside = falling.filter((value) => value >= border), powers = inside.map((value) => Math.exp(value - falling[0]));
        const total = powers.reduce((a, b) => a + b, 0);
        let before = 0;
        for (let i = 0; i < inside.length && before < topp; i++) {
          floor = inside[i];
          before += powers[i] / total;
        }
      }
    }
    let most = -Infinity, sum = 0;
    for (const value of scaled) if (value > most) most = value;
    for (let i = 0; i < found.length; i++) if (scaled[i] >= floor) sum += found[i] = Math.exp(scaled[i] - most);
    return found.map((power) => power / sum);
  }

  /** Random numbers in [0, 1) of a seed (Tommy Ettinger's mulberry32). */
  function random(seed) {
    let state = seed >>> 0;
    return () => {
      state = (state + 0x6d2b79f5) >>> 0;
      let mixed = Math.imul(state ^ (state >>> 15), state | 1);
      mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
      return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
    };
  }

  /** Draws tokens after a text, and yields each. A full window goes on from its last half. */
  function* generate(model, prompt, { count, seed, banned, factors = null, ...settings }) {
    const draw = random(seed), { context } = model;
    let text = [...prompt], cache, logits = null;
    for (let n = 0; n < count; n++) {
      if (logits === null) {
        const start = text.length < context ? 0 : text.length - Math.max(1, Math.floor(context / 2));
        cache = newCache(model);
        logits = yield* prefill(model, text.slice(start), cache, factors);
      }
      for (const id of banned) logits[id] = -Infinity;
      const probabilities = distribution(logits, settings);
      let left = draw(), token = probabilities.findLastIndex((p) => p > 0);
      for (let i = 0; i < probabilities.length; i++) {
        left -= probabilities[i];
        if (left < 0) {
          token = i;
          break;
        }
      }
      text.push(token);
      yield token;
      // In a full window there is no place for the token.
      logits = cache.length + 1 < context ? step(model, token, cache, factors) : null;
    }
  }

  // ---- running

  const pause = () => new Promise((resume) => {
    const channel = new MessageChannel();
    channel.port1.onmessage = () => {
      channel.port1.close();
      resume();
    };
    channel.port2.postMessage(0);
  });

  /** Runs work to its end, with a break every 10 ms. Returns {value, ms}, or null if it was `stale` before.
   *
   * `ms` is the time of the work, without the breaks. `on` takes what the work yields. */
  async function complete(work, stale = () => false, on = () => {}) {
    let begun = performance.now(), ms = 0;
    for (;;) {
      const { value, done } = work.next();
      const now = performance.now();
      if (done) return { value, ms: ms + now - begun };
      if (value !== undefined) on(value);
      if (now - begun < 10) continue;
      ms += now - begun;
      await pause();
      if (stale()) return null;
      begun = performance.now();
    }
  }

  return { load, forward, states, rowOf, finish, prefill, step, newCache, distribution, generate, random, complete };
})();
