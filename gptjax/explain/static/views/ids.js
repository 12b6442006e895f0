// View 2: from the text to ids.

/** Returns for each piece whether the merge that led to this step made it. */
function fresh(before, after) {
  const made = [];
  let i = 0;
  for (const piece of after) {
    made.push(before[i] !== piece);
    let length = 0;
    while (length < piece.length && i < before.length) length += before[i++].length;
  }
  return made;
}

const LONG_WORD = 40;

function Merges({ word }) {
  useStore();
  const { text, steps } = data.words[word];
  const ids = data.tokens.filter((token) => token.word === word);
  const cut = Array.from(text).length > LONG_WORD && steps.length === 2;
  const limit = 120, ends = 12; // the pieces of a row and the first and last rows that are shown
  const hidden = steps.length > 2 * ends + 2;
  return html`<div class="merges" id="merges">
    <p>${fill(t("merges_of"), { word: html`<bdi class="quote" data-lit>${shorten(show(text), 60)}</bdi>` })}</p>
    <ol start="0">${steps.map((pieces, s) => {
      const made = s ? fresh(steps[s - 1], pieces) : pieces.map(() => false);
      const last = s === steps.length - 1;
      if (hidden && s >= ends && s < steps.length - ends) return s === ends ? html`<li><span class="step">…</span></li>` : null;
      return html`<li><span class="step">${s === 0 ? t("characters") : last ? t("tokens_last") : fill(t("merge_step"), { number: s })}</span>
        <span class="pieces" data-lit>${pieces.slice(0, limit).map((each, i) => html`<span class=${`piece ${made[i] && !cut ? "made" : ""} ${last ? "final" : ""}`}><bdi>${show(each)}</bdi>
          ${last && ids[i] ? html`<small>${ids[i].id}</small>` : ""}</span>`)}${pieces.length > limit ? "…" : ""}</span></li>`;
    })}</ol>
    ${cut && html`<p class="soft">${t("merges_cut")}</p>`}
    ${steps.length === 1 && html`<p class="soft">${t("merges_none")}</p>`}
  </div>`;
}

function Ids() {
  const state = useStore("word");
  const fallback = useMemo(() => data.words.reduce((best, word, i) => {
    const size = word.steps.length;
    return best < 0 || (size > data.words[best].steps.length && size <= 12) ? i : best;
  }, -1), []);
  const word = index(state.word, data.words.length) ?? fallback;
  const where = useMemo(() => {
    const found = data.words.map(() => null);
    data.tokens.forEach((token, i) => { if (token.word !== null && found[token.word] === null) found[token.word] = i; });
    return found;
  }, []);
  const kinds = [...new Set(data.tokens.map((token) => token.kind))];
  return html`
    <p>${t("ids_intro")}</p>
    <h3>${t("words")}</h3>
    <p>${t("words_text")}</p>
    <div class="words" role="group" aria-label=${t("words")}
      onClick=${(event) => { const item = event.target.closest("[data-word]"); if (item) store.set({ word: item.dataset.word }); }}
      onKeyDown=${(event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); store.set({ word: event.target.dataset.word }); } else rove(event, "[data-word]"); }}>
      ${data.words.map((each, i) => html`<span role="button" data-word=${i} data-lit tabindex=${i === word ? 0 : -1} aria-pressed=${i === word ? "true" : "false"}
        class=${`word ${i === word ? "chosen" : ""}`}><bdi>${shorten(show(each.text), 60)}</bdi><small>${each.steps[each.steps.length - 1].length}</small></span>`)}
    </div>
    ${word >= 0 && html`<${Merges} word=${word} />`}
    <h3>${t("row")}</h3>
    <p>${t(data.sequences.length > 1 && !isChoice ? (/^window /.test(data.sequences[0].name) ? "row_windows" : "row_similarity") : isChoice ? "row_choices" : data.task ? "row_task" : "row_lm")}${gap()}${fill(t("row_count"), { count: T, limit: data.model.context_length })}</p>
    <p class="legend">${kinds.map((each) => html`<span class=${`kind ${each}`}>${t(`kind_${each}`)}</span> ${t(`about_${each}`)} `)}</p>
    <${Figure} wide caption=${t("row_caption")}>
      ${data.sequences.map((sequence, s) => html`<div class="packed" role="group" aria-label=${t("sequence")}>
        <span class="name">${sequence.name ? fill(t("sequence_named"), { number: s, name: html`<bdi data-lit>${sequenceName(s)}</bdi>` }) : fill(t("sequence_number"), { number: s })}</span>
        <div class="cells">${data.tokens.slice(sequence.start, sequence.stop).map((token) => html`<span class=${`cell ${token.kind} ${data.model.segment_types ? `type${token.type}` : ""}`}>
          <small data-lit>${token.position}</small><bdi data-lit=${token.kind === "text"}>${label(token, 18)}</bdi><small class="id" data-lit>${token.id}</small></span>`)}</div>
      </div>`)}
    </${Figure}>
    ${data.model.segment_types ? html`<p>${t("row_types")}</p>` : ""}
    <${Behind} title=${t("row")} head=${[t("place"), t("token"), t("id"), t("kind"), t("sequence"), t("position"), t("type"), t("seen")]}
      rows=${() => data.tokens.map((token, i) => [i, show(token.text), token.id, t(`kind_${token.kind}`), token.sequence, token.position, token.type, token.seen ? t("yes") : t("no")])} />`;
}
