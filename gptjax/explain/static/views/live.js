// View 12: the model itself. The reader changes the text, the heads or the tokens, and it computes again.

/** The texts of the reader, in the order of the columns. */
const givenTexts = data.input.columns.map((column) => column.text);

/** The model, its tokenizer, and what it makes of the original text. They are read when they are first needed. */
const lab = memo(async () => {
  const { tokenizer: spec, input } = data.weights;
  const { value: model } = await Live.complete(Live.load(data.weights, data.model));
  const ids = bytesOf(spec.merges).length / 4;
  const tokenizer = Tokenizing.make(spec, numbers(spec.merges, Uint32Array, 0, ids));
  const parts = data.sequences.map(({ start, stop }) => {
    const tokens = data.tokens.slice(start, stop), second = tokens.findIndex((token) => token.type === 1);
    return { ids: tokens.map((token) => token.id), second: second < 0 ? tokens.length : second };
  });
  const row = Live.finish(parts, data.input.cut, input !== null);
  const first = await Live.complete(Live.forward(model, row));
  const special = new Map(Object.entries(spec.special).map(([name, id]) => [id, name]));
  return { model, tokenizer, spec, special, row, original: { row, ...answerOf(first.value), ms: first.ms } };
});

/** Adds the answer, as view 1 shows it: probabilities, or the number of a regression. */
function answerOf(found) {
  const { task, surprise } = found;
  const probabilities = task && !isRegression ? softmax(task, data.model.temperature) : null;
  const known = surprise.filter((value) => value !== null);
  // The surprise of token i is that of the prediction one token before.
  const of = surprise.map((_, i) => (i > 0 ? surprise[i - 1] : null));
  return { ...found, probabilities, of, mean: known.length ? known.reduce((a, b) => a + b, 0) / known.length : null };
}

/** For each token of a row the same token of the original: from the start and from the end of a sequence. */
function aligned(row, original) {
  const found = row.ids.map(() => null);
  row.sequences.forEach((now, s) => {
    const was = original.sequences[s];
    if (!was) return;
    const most = Math.min(now.stop - now.start, was.stop - was.start);
    let n = 0, m = 0;
    while (n < most && row.ids[now.start + n] === original.ids[was.start + n]) found[now.start + n] = was.start + n++;
    while (n + m < most && row.ids[now.stop - 1 - m] === original.ids[was.stop - 1 - m]) {
      m++;
      found[now.stop - m] = was.stop - m;
    }
  });
  return found;
}

/** Text tokens of a row, with what a label needs. */
function tokensOf({ spec, special }, row) {
  const types = row.ids.map((id) => (special.has(id) && special.get(id) !== "unknown" ? special.get(id) : "text"));
  return row.ids.map((id, i) => {
    const text = spec.tokens[id] ?? "", kind = types[i];
    // A token without the mark of the end belongs to one word with the next.
    const joined = spec.rules !== "characters" && kind === "text" && types[i + 1] === "text" && id !== spec.special.unknown && !text.endsWith(END_OF_WORD);
    return { id, text, kind, joined };
  });
}

/** A list of numbers in the state, such as 3,5. */
const listed = (text, count) => [...new Set(text.split(",").map((each) => index(each, count)).filter((each) => each !== null))];

function LiveView() {
  useStore();
  const name = html`<code data-lit>gptjax.Changes</code>`, count = data.model.parameters;
  if (data.weights) return html`<${Lab} />`;
  if (data.model.one_matrix || data.model.head === "flatten") return html`<p>${fill(t("live_kind"), { name })}</p>`;
  if (count > 2e7) return html`<p>${fill(t("live_large"), { count: whole(count), name })}</p>`;
  if (count <= 2e6) return html`<p>${fill(t("live_unfit"), { name })}</p>`;
  return html`<p>${fill(t("live_none"), { flag: html`<code data-lit>--weights</code>` })}</p>`;
}

function Lab() {
  const state = useStore("off", "mute");
  const box = useRef(), version = useRef(0);
  const [own, setOwn] = useState(null);
  const [texts, setTexts] = useState(givenTexts);
  const [now, setNow] = useState(null);
  const [short, setShort] = useState(false);
  const [failed, setFailed] = useState(false);
  const fail = (error) => {
    console.error(error);
    setFailed(true);
  };
  const off = useMemo(() => listed(state.off, L * H), [state.off]);
  useEffect(() => whenSeen(box.current, () => lab(0).then(setOwn, fail)), []);
  useEffect(() => {
    if (!own) return undefined;
    const mine = ++version.current;
    const compute = async () => {
      const edited = texts.some((text, i) => text !== givenTexts[i]);
      const row = edited ? Live.rowOf(own.model, own.spec.special, columnsOf(own, texts)) : own.row;
      const few = !data.task && row.ids.length < 2;
      setShort(few);
      if (few) return;
      const hidden = listed(state.mute, row.ids.length).filter((i) => canHide(row, i));
      const work = Live.forward(own.model, row, { factors: factorsOf(off), hidden });
      const found = await Live.complete(work, () => version.current !== mine);
      if (found) setNow({ row, hidden, tokens: tokensOf(own, row), same: aligned(row, own.row), edited, ...answerOf(found.value), ms: found.ms });
    };
    const timer = setTimeout(() => compute().catch(fail), now ? 120 : 0);
    return () => clearTimeout(timer);
  }, [own, texts, state.off, state.mute]);
  const change = (i, text) => {
    setTexts((old) => old.map((each, n) => (n === i ? text : each)));
    store.set({ mute: "" }); // the tokens have other places now
  };
  const reset = () => {
    setTexts(givenTexts);
    store.set({ mute: "", off: "" });
  };
  const canEdit = data.weights.input === null || own === null || own.spec.rules !== null;
  return html`<div ref=${box}>
    <p>${t("live_intro")}</p>
    <h3>${t("live_text")}</h3>
    ${own && own.spec.rules === null ? html`<p class="notice">${t("live_words_unknown")}</p>` : ""}
    ${own && own.spec.rules !== null && !own.spec.exact ? html`<p class="notice">${t("live_words_rough")}</p>` : ""}
    <div class="live-texts">${data.input.columns.map((column, i) => html`<label><span class="name" data-lit><bdi>${show(column.name)}</bdi></span>
      <textarea data-lit dir="auto" spellcheck="false" rows=${Math.min(8, 2 + Math.floor(texts[i].length / 80))} value=${texts[i]} disabled=${!own || own.spec.rules === null} onInput=${(event) => change(i, event.target.value)} /></label>`)}</div>
    <p class="live-buttons"><button type="button" class="plain" id="live-reset" onClick=${reset} disabled=${texts === givenTexts && !state.off && !state.mute}>${t("live_reset")}</button></p>
    ${short ? html`<p class="notice">${t("live_short")}</p>` : ""}
    ${now && now.row.cut ? html`<p class="notice">${t("answer_cut")}</p>` : ""}
    ${now ? html`<${NowAnswer} own=${own} now=${now} texts=${texts} /><${NowTokens} own=${own} now=${now} /><${Switches} off=${off} /><${Writer} own=${own} texts=${texts} off=${off} />`
      : html`<p class=${failed ? "notice" : "soft"} aria-live="polite">${t(failed ? "failed" : "live_wait")}</p>`}
  </div>`;
}

/** The ids of each column. */
const columnsOf = (own, texts) => {
  const columns = data.weights.input ? data.weights.input.columns : [data.input.columns[0].name];
  return columns.map((name) => own.tokenizer.encode(texts[data.input.columns.findIndex((column) => column.name === name)]));
};

const canHide = (row, i) => i < row.ids.length && !row.sequences.some((sequence) => sequence.extract === i);

function factorsOf(off) {
  const factors = new Float32Array(L * H).fill(1);
  for (const head of off) factors[head] = 0;
  return factors;
}

function NowAnswer({ own, now, texts }) {
  useStore();
  const { original } = own;
  const best = (each) => each.probabilities.indexOf(Math.max(...each.probabilities));
  const names = isChoice ? own.model.input.columns.slice(1).map((name) => texts[data.input.columns.findIndex((column) => column.name === name)]) : options;
  const quote = (text) => html`<bdi class="quote" data-lit>${shorten(show(text), 60)}</bdi>`;
  let verdict = "", rows = [];
  if (now.probabilities) {
    verdict = best(now) === best(original) ? fill(t("live_same"), { now: quote(names[best(now)]) }) : fill(t("live_other"), { now: quote(names[best(now)]), before: quote(options[best(original)]) });
    rows = now.probabilities.map((p, i) => ({ name: show(names[i]), value: p, ghost: original.probabilities[i], text: percent(p), mark: i === best(now) }));
  } else if (now.task) verdict = fill(t("live_number"), { now: number(now.task[0]), before: number(original.task[0]) });
  else {
    const [p, q] = [softmax(now.last), softmax(original.last)];
    const order = Array.from(p.keys()).sort((a, b) => p[b] - p[a]).slice(0, 6);
    rows = order.map((id) => ({ name: shorten(spelled(plain(own.spec.tokens[id] ?? "")), 24), value: p[id], ghost: q[id], text: percent(p[id]) }));
  }
  return html`<h3>${t("live_answer")}</h3>
    <p class="readout" aria-live="polite" id="live-answer">${verdict}${verdict ? gap() : ""}${fill(t("live_mean"), { now: number(now.mean), before: number(original.mean) })}</p>
    ${rows.length ? html`<${Figure} caption=${`${now.task ? "" : t("live_next")}${now.task ? "" : gap()}${t("live_ghost")}`}><${Bars} most=${now.task ? 1 : Math.max(...rows.map((row) => Math.max(row.value, row.ghost)))} name=${t("live_answer")} rows=${rows} /></${Figure}>` : ""}
    <p class="soft" id="live-time">${fill(t("live_time"), { count: now.row.ids.length, ms: html`<span class="given" data-lit>${now.ms.toFixed(now.ms < 10 ? 1 : 0)}</span>` })}${gap()}<${Rounded} original=${original} /></p>`;
}

/** How far the numbers of the page are from those of the model, for the original text. */
function Rounded({ original }) {
  const nats = Math.max(0, ...original.surprise.map((value, i) => (value === null ? 0 : Math.abs(value - data.lm.surprise[i]))));
  const parts = [fill(t("live_rounded"), { nats: number(nats, 2) })];
  if (original.probabilities) parts.push(fill(t("live_rounded_p"), { share: number(Math.max(...original.probabilities.map((p, i) => Math.abs(p - data.answer.probabilities[i]))), 2) }));
  else if (original.task) parts.push(fill(t("live_rounded_number"), { value: number(Math.abs(original.task[0] - data.answer.prediction), 2) }));
  return html`${parts.map((part, i) => html`${i ? gap() : ""}${part}`)}`;
}

/** The tokens of the changed row. A click hides one, and the colour is the change of its surprise. */
function NowTokens({ own, now }) {
  useStore();
  const { row, tokens, hidden, of, same } = now;
  const before = same.map((i) => (i === null ? null : own.original.of[i]));
  const changes = of.map((value, i) => (value === null || before[i] === null ? null : value - before[i]));
  // Rounding alone must not be coloured.
  const most = Math.max(0.05, largest(changes.map((value) => value ?? 0)));
  const toggle = (i) => {
    if (!canHide(row, i)) return;
    store.set({ mute: (hidden.includes(i) ? hidden.filter((each) => each !== i) : [...hidden, i]).sort((a, b) => a - b).join(",") });
  };
  const at = (event) => {
    const element = event.target.closest("[data-i]");
    return element ? Number(element.dataset.i) : null;
  };
  const says = (i) => (of[i] === null ? t("not_predicted") : `${number(of[i], 3)} ${t("nats")}${before[i] === null ? "" : ` (${t("live_before")} ${number(before[i], 3)})`}`);
  return html`<h3>${t("live_tokens")}</h3>
    <p>${t("live_tokens_text")}${data.task ? html`${gap()}${t("live_extract")}` : ""}</p>
    <div class="tokens" id="live-tokens" role="group" aria-label=${t("live_tokens")} onClick=${(event) => { const i = at(event); if (i !== null) toggle(i); }}
      onKeyDown=${(event) => {
        if (event.key === "Enter" || event.key === " ") {
          event.preventDefault();
          const i = at(event);
          if (i !== null) toggle(i);
        } else rove(event, ".token");
      }}>
      ${row.sequences.map((sequence, s) => html`<div class="sequence">${row.sequences.length > 1 ? html`<span class="name">${t("sequence")} <span data-lit>${s + 1}</span></span>` : ""}
        ${tokens.slice(sequence.start, sequence.stop).map((token, n) => {
          const i = sequence.start + n, isHidden = hidden.includes(i);
          return html`<span class=${`token ${token.kind === "text" ? "" : "special"} ${token.joined ? "joined" : ""} ${isHidden ? "muted" : ""} ${same[i] === null ? "new" : ""}`} data-i=${i} role="button" tabindex=${i === 0 ? 0 : -1}
            data-lit=${token.kind === "text"} aria-pressed=${isHidden ? "true" : "false"} aria-disabled=${canHide(row, i) ? undefined : "true"} title=${says(i)} aria-label=${`${label(token)}: ${isHidden ? `${t("live_hidden")}, ` : ""}${says(i)}`}
            style=${changes[i] === null ? "" : tint(signColour((-0.95 * changes[i]) / most))}><bdi>${label(token, 60)}</bdi></span>`;
        })}</div>`)}
    </div>
    <p class="legend"><${Scale} from=${`+${number(most, 2)}`} to=${`−${number(most, 2)}`} colour=${(x) => signColour(0.95 * (2 * x - 1))} /> ${t("nats")}${same.includes(null) ? html`${gap()}· <span class="token new">${t("live_new")}</span>` : ""}</p>
    <${Behind} title=${t("live_tokens")} head=${[t("place"), t("token"), t("live_before"), t("live_now"), t("change_column"), t("live_hidden")]}
      rows=${() => tokens.map((token, i) => [i, label(token), number(before[i]), number(of[i]), number(changes[i]), hidden.includes(i) ? t("yes") : t("no")])} />`;
}

/** A point for each head: full is on. */
function Switches({ off }) {
  useStore();
  const toggle = (event) => {
    const item = event.target.closest("[data-off]");
    if (!item) return false;
    const heads = item.dataset.off.split(",").map(Number), all = heads.every((head) => off.includes(head));
    const others = off.filter((head) => !heads.includes(head));
    store.set({ off: (all ? others : [...others, ...heads]).sort((a, b) => a - b).join(",") });
    return true;
  };
  return html`<h3>${t("live_heads")}</h3>
    <p>${t("live_heads_text")}</p>
    <div class="picker-box"><div class="picker" id="live-heads" role="group" aria-label=${t("live_heads")} style=${`grid-template-columns:auto repeat(${H},minmax(0,22px))`} onClick=${toggle}
      onKeyDown=${(event) => { if (event.key === "Enter" || event.key === " ") { if (toggle(event)) event.preventDefault(); } else rove(event, "[data-off]"); }}>
      ${Array.from({ length: L }, (_, l) => {
        const all = Array.from({ length: H }, (_each, h) => l * H + h);
        const left = all.filter((head) => !off.includes(head)).length;
        return html`<span class="picker-name switch-name" role="switch" data-off=${all.join(",")} tabindex=${l ? -1 : 0} aria-checked=${left ? "true" : "false"} aria-label=${`${t("block")} ${l}`}>${t("block")} <span data-lit>${l}</span></span>
          ${all.map((head) => html`<span class=${`dot ${off.includes(head) ? "off" : "full"}`} role="switch" data-off=${head} tabindex="-1" aria-checked=${off.includes(head) ? "false" : "true"}
            aria-label=${`${t("block")} ${l}, ${t("head")} ${head % H}`} title=${headName(head)} />`)}`;
      })}
    </div><p class="legend"><i class="dot full" />${t("live_on")} <i class="dot off" />${t("live_off")}</p></div>`;
}

/** Draws text after the reader's text, one token at a time. */
function Writer({ own, texts, off }) {
  const state = useStore("temperature", "topk", "topp");
  const [count, setCount] = useState("40");
  const [seed, setSeed] = useState("0");
  const [out, setOut] = useState(null);
  const [busy, setBusy] = useState(false);
  const stopped = useRef(false);
  const settings = { temperature: Math.max(0, Number(state.temperature) || 0), topk: Math.max(0, Math.round(Number(state.topk)) || 0), topp: Math.min(1, Math.max(0.01, Number(state.topp) || 1)) };
  useEffect(() => () => { stopped.current = true; }, []);
  const write_ = async () => {
    const { spec, tokenizer, model } = own;
    const known = spec.rules === null ? own.row.ids.slice(own.row.sequences[0].start, own.row.sequences[0].stop).filter((id) => !own.special.has(id)) : tokenizer.encode(texts[0]);
    const breaks = spec.rules === null ? [] : tokenizer.encode("\n");
    const prompt = known.length ? known : breaks.length ? breaks : [spec.special.start];
    const banned = [...own.special.keys()];
    for (let id = spec.tokens.length; id < model.vocabulary; id++) banned.push(id);
    const wanted = Math.max(1, Math.min(2000, Math.round(Number(count)) || 40)), ids = [];
    const first = tokenizer.decode(known), begun = performance.now();
    // A word is complete only when its end is drawn, so the whole text is decoded again.
    const shown = () => setOut({ first, rest: tokenizer.decode([...known, ...ids]).slice(first.length), count: ids.length, ms: performance.now() - begun });
    stopped.current = false;
    setBusy(true);
    shown();
    await Live.complete(
      Live.generate(model, prompt, { count: wanted, seed: (Math.round(Number(seed)) || 0) >>> 0, banned, factors: factorsOf(off), ...settings }),
      () => stopped.current, (id) => { ids.push(id); shown(); });
    shown();
    setBusy(false);
  };
  const slider = (field, min, max, step, text) => html`<label class="slider"><span>${t(field)}</span>
    <input type="range" min=${min} max=${max} step=${step} value=${state[field]} onInput=${(event) => store.set({ [field]: String(Number(event.target.value)) })} /><span data-lit class="knob">${text}</span></label>`;
  const field = (name, value, set, most) => html`<label class="small-field">${t(name)} <input type="number" id=${name.replace("_", "-")} min="0" max=${most} value=${value} onInput=${(event) => set(event.target.value)} /></label>`;
  return html`<h3>${t("live_sample")}</h3>
    <p>${t("live_sample_text")}</p>
    <div class="knobs">
      ${slider("temperature", 0, 2, 0.05, settings.temperature.toFixed(2))}
      ${slider("topk", 0, 50, 1, settings.topk ? String(settings.topk) : "∞")}
      ${slider("topp", 0.01, 1, 0.01, settings.topp.toFixed(2))}
    </div>
    <p class="live-buttons">${field("live_count", count, setCount, 2000)}${field("live_seed", seed, setSeed, 4294967295)}
      <button type="button" class="plain main" id="live-draw" onClick=${write_} disabled=${busy}>${t("live_draw")}</button>
      <button type="button" class="plain" id="live-stop" onClick=${() => { stopped.current = true; }} disabled=${!busy}>${t("live_stop")}</button></p>
    ${out ? html`<blockquote id="live-written" tabindex="0" aria-busy=${busy ? "true" : "false"}><p data-lit dir="auto"><span class="soft-text">${show(out.first)}</span><span>${show(out.rest)}</span></p></blockquote>
      <p class="soft" role="status">${busy ? "" : fill(t("live_rate"), { count: out.count, ms: number(out.ms / Math.max(1, out.count), 2) })}</p>` : ""}`;
}
