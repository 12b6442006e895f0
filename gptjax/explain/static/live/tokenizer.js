// The tokenizer in the page: the words of gptjax/data/tokens/normalize.py, and byte pair encoding.
// A test compares its ids with those of the library `tokenizers`.

const Tokenizing = (() => {
  // White space, word characters and punctuation as the library's regular expressions know them.
  // JavaScript's own \s counts U+FEFF, but not U+0085; its \w and \d are ASCII alone.
  const BLANK = "\\t-\\r \\u0085\\u00a0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000";
  const WORD = "[\\p{Alphabetic}\\p{M}\\p{Nd}\\p{Pc}]";
  const REPLACED = [["—", "-"], ["–", "-"], ["―", "-"], ["…", "..."], ["´", "'"], ["‘", "'"], ["’", "'"], ["“", '"'], ["”", '"']];
  const CONTROL = new RegExp(`(?![${BLANK}])[\\p{Cc}\\p{Cf}]`, "gu");
  const BREAK = new RegExp(`[${BLANK}]*\\n[${BLANK}]*`, "gu");
  const RUN = new RegExp(`(?:(?!\\n)[${BLANK}])+`, "gu");
  // The library's punctuation is that of Unicode 8. These marks came later; two were one then.
  const LATER = "\\u{61d}\\u{9fd}\\u{a76}\\u{c77}\\u{c84}\\u{1b4e}\\u{1b4f}\\u{1b7d}-\\u{1b7f}\\u{2e43}-\\u{2e5d}\\u{10d6e}\\u{10ead}\\u{10ed0}\\u{10f55}-\\u{10f89}"
    + "\\u{113d4}-\\u{113d8}\\u{1144b}-\\u{1145d}\\u{11660}-\\u{1166c}\\u{116b9}\\u{1183b}\\u{11944}-\\u{11946}\\u{119e2}\\u{11a3f}-\\u{11b09}\\u{11be1}"
    + "\\u{11c41}-\\u{11c71}\\u{11ef7}-\\u{11fff}\\u{12ff1}\\u{12ff2}\\u{16d6d}-\\u{16d6f}\\u{16e97}-\\u{16e9a}\\u{16fe2}\\u{1e5ff}\\u{1e95e}\\u{1e95f}";
  const MARKS = {
    fast: new RegExp(`[!-/:-@\\[-\`{-~\\u{166d}\\u{111c9}]|(?![${LATER}])\\p{P}`, "gu"),
    english: new RegExp(
      `n't(?!${WORD})|(?<!${WORD})can(?=not(?!${WORD}))|'(?:s|ll|re|ve|d|m|em)(?!${WORD})|'{2,}`
      + "|-+|~+|/+|\\.{2,}|\\p{Nd}+(?:[.:]\\p{Nd}+)+"
      + `|(?<!${WORD})(?:mr|mrs|ms|dr|st|jr|sr|prof|gen|rev|sen|gov|inc|corp|ltd|co|jan|feb|aug|sept|oct`
      + `|nov|dec)\\.|(?<!${WORD})\\p{L}\\.(?:\\p{L}\\.)*|[\\p{P}$+<=>^\`|~]`, "gu"),
  };

  /** Half a surrogate pair becomes U+FFFD. */
  const wellFormed = (text) => text.replace(/[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/g, "\ufffd");

  function normalized(text) {
    let found = text.normalize("NFC");
    for (const [old, now] of REPLACED) found = found.replaceAll(old, now);
    // Letter by letter, because the library knows no final sigma.
    found = Array.from(found, (c) => c.toLowerCase()).join("");
    return found.replace(CONTROL, "").replace(BREAK, "\n").replace(RUN, " ");
  }

  /** Splits a text: what matches is a piece of its own. */
  function split(text, pattern) {
    const pieces = [];
    let last = 0;
    for (const match of text.matchAll(pattern)) {
      if (match.index > last) pieces.push(text.slice(last, match.index));
      if (match[0]) pieces.push(match[0]);
      last = match.index + match[0].length;
    }
    if (last < text.length) pieces.push(text.slice(last));
    return pieces;
  }

  function words(text, rules) {
    const found = [];
    for (const line of split(normalized(text), /\n/g)) {
      if (line === "\n") found.push(line);
      else for (const part of line.split(RUN)) if (part) found.push(...split(part, MARKS[rules]));
    }
    return found;
  }

  /** A queue of numbers, the smallest first. */
  function queue() {
    const heap = [];
    return {
      push(value) {
        let i = heap.push(value) - 1;
        for (let up = (i - 1) >> 1; i > 0 && heap[up] > value; up = (i - 1) >> 1) {
          heap[i] = heap[up];
          i = up;
        }
        heap[i] = value;
      },
      pop() {
        const first = heap[0], value = heap.pop();
        if (!heap.length) return first;
        let i = 0;
        for (;;) {
          let down = 2 * i + 1;
          if (down + 1 < heap.length && heap[down + 1] < heap[down]) down++;
          if (down >= heap.length || heap[down] >= value) break;
          heap[i] = heap[down];
          i = down;
        }
        heap[i] = value;
        return first;
      },
      get size() { return heap.length; },
    };
  }

  /** Returns {encode, decode} of the object `weights.tokenizer`. `merges` are ids, [M, 2]. */
  function make({ rules, tokens, special }, merges) {
    const hidden = new Set(Object.values(special)), known = new Map();
    tokens.forEach((token, i) => hidden.has(i) || known.has(token) || known.set(token, i));
    const size = tokens.length, ranks = new Map(), results = [];
    for (let rank = 0; rank < merges.length / 2; rank++) {
      const [left, right] = [merges[2 * rank], merges[2 * rank + 1]];
      const key = left * size + right;
      // Of equal merges the library keeps the last.
      ranks.set(key, rank);
      results[rank] = known.get(tokens[left] + tokens[right]) ?? special.unknown;
    }
    const PLACES = 2 ** 26;

    /** The ids of a word: always the pair of the lowest rank is merged, the leftmost of several. */
    function bpe(word) {
      const characters = Array.from(word), n = characters.length;
      characters[n - 1] += "</w>";
      const ids = characters.map((c) => known.get(c) ?? special.unknown);
      const next = ids.map((_, i) => i + 1), last = ids.map((_, i) => i - 1), gone = new Uint8Array(n);
      const waiting = queue();
      const rankAt = (i) => (i >= 0 && next[i] < n ? ranks.get(ids[i] * size + ids[next[i]]) : undefined);
      const add = (i) => {
        const rank = rankAt(i);
        if (rank !== undefined) waiting.push(rank * PLACES + i);
      };
      for (let i = 0; i < n; i++) add(i);
      while (waiting.size) {
        const first = waiting.pop(), rank = Math.floor(first / PLACES), i = first % PLACES;
        if (gone[i] || rankAt(i) !== rank) continue; // one of the two was merged meanwhile
        gone[next[i]] = 1;
        next[i] = next[next[i]];
        if (next[i] < n) last[next[i]] = i;
        ids[i] = results[rank];
        add(last[i]);
        add(i);
      }
      return ids.filter((_, i) => !gone[i]);
    }

    const cache = new Map();
    function ofWord(word) {
      if (!cache.has(word)) {
        if (cache.size > 20000) cache.clear();
        cache.set(word, bpe(word));
      }
      return cache.get(word);
    }

    return {
      encode(text) {
        const good = wellFormed(text);
        if (rules === "characters") return Array.from(good, (c) => known.get(c) ?? special.unknown);
        const ids = [];
        for (const word of words(good, rules)) for (const id of ofWord(word)) ids.push(id);
        return ids;
      },
      /** The text of ids, without special tokens. */
      decode(ids) {
        const parts = ids.filter((id) => !hidden.has(id)).map((id) => tokens[id] ?? "");
        if (rules === "characters" || !merges.length) return parts.join("");
        return parts.map((part, i) => part.replaceAll("</w>", i + 1 < parts.length ? " " : "")).join("");
      },
    };
  }

  return { make };
})();
