// View 7: what each layer would answer.

const CLASS_COLOURS = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8c8c8c", "#b8a800"];
const layerName = (l) => (l === 0 ? t("embedding_row") : `${t("block")} ${l - 1}`);

function Layers() {
  useStore();
  const fallback = surprising >= 0 ? Math.min(lastText, surprising) : firstText;
  const { token, locked } = useToken("layers", fallback);
  const { top, rank, task } = data.lens;
  const next = data.lm.next[token];
  const list = useMemo(() => html`<${Tokens} view="layers" name=${t("tokens")} fallback=${fallback} compact />`, [store.state.lang]);
  return html`
    <p>${t("layers_intro")}</p>
    <p class="notice">${t("layers_postln")}</p>
    <h3>${t("logit_lens")}</h3>
    <p>${t("logit_lens_text")}</p>
    <p class="hint">${t("hint_tokens")}</p>
    ${list}
    <${RankMap} token=${token} />
    <p class="readout" aria-live="polite">${next ? fill(t("lens_after"), { token: html`<${Quote} i=${token} />`, next: html`<bdi class="quote" data-lit>${piece(next)}</bdi>` }) : fill(t("lens_after_last"), { token: html`<${Quote} i=${token} />` })}</p>
    <${Figure} wide caption=${t("lens_caption")}><div class="scroll" tabindex="0" role="region" aria-label=${t("logit_lens")}><table class="lens">
      <thead><tr><th scope="col">${t("col_layer")}</th><th scope="col">${t("col_rank")}</th>${[1, 2, 3, 4, 5].map((n) => html`<th scope="col" data-lit>${n}</th>`)}</tr></thead>
      <tbody>${top.map((rows, l) => html`<tr><th scope="row">${layerName(l)}</th><td class="n" data-lit>${rank[l][token] === null ? "–" : whole(rank[l][token])}</td>
        ${rows[token].map((each) => html`<td data-lit class=${next && each.id === next.id ? "true" : ""} style=${tint(weightColour(Math.sqrt(each.p) * 0.9))}><bdi>${piece(each, 14)}</bdi><small>${percent(each.p)}</small></td>`)}</tr>`)}</tbody>
    </table></div></${Figure}>
    ${task && html`<${TaskLens} task=${task} />`}`;
}

function RankMap({ token }) {
  useStore();
  const [figure, width] = useWidth();
  const { rank } = data.lens;
  const left = 78, row = Math.max(12, Math.min(22, 260 / (L + 1))), cell = Math.min(26, (width - left - 2) / T);
  const height = (L + 1) * row + 4;
  const scale = Math.log(data.model.vocab_size);
  const draw = (context) => {
    for (let l = 0; l <= L; l++) {
      write(context, layerName(l), left - 6, 2 + (l + 0.5) * row, { align: "right", size: 11, width: left - 8 });
      for (let i = 0; i < T; i++) {
        const r = rank[l][i];
        context.fillStyle = r === null ? palette.masked : `rgb(${weightColour(1 - Math.log(r) / scale)})`;
        context.fillRect(left + i * cell, 2 + l * row, cell > 4 ? cell - 1 : cell + 0.3, row - 1);
        if (cell > 22 && r !== null) {
          write(context, r > 999 ? "·" : String(r), left + (i + 0.45) * cell, 2 + (l + 0.47) * row, { size: 9, align: "center", colour: Math.log(r) / scale < 0.45 ? palette.ground : palette.text });
        }
      }
    }
  };
  const over = (context) => {
    context.strokeStyle = palette.orange;
    context.lineWidth = 2;
    context.strokeRect(left + token * cell - 1, 1, Math.max(cell, 2) + 1, height - 3);
  };
  const at = (event) => {
    const i = Math.floor((event.clientX - event.currentTarget.getBoundingClientRect().left - left) / cell);
    return i >= 0 && i < T ? i : null;
  };
  return html`<${Figure} wide caption=${t("rank_caption")}><div ref=${figure} class="layers-of-canvas pointer" style=${`height:${height}px`}
    onPointerMove=${(event) => hover("layers", at(event))} onPointerLeave=${() => hover("layers", null)} onClick=${(event) => { const i = at(event); if (i !== null) { hover("layers", null); lock(i); } }}>
      <${Canvas} width=${width} height=${height} draw=${draw} on=${[cell]} label=${t("rank_caption")} /><${Canvas} width=${width} height=${height} draw=${over} on=${[token]} /></div>
    <p class="legend"><${Scale} from=${whole(data.model.vocab_size)} to="1" colour=${weightColour} /> ${t("col_rank")}</p>
    <${Behind} title=${t("rank_table")} head=${[t("place"), t("token"), ...data.lens.rank.map((_, l) => layerName(l))]} rows=${() => data.tokens.map((each, i) => [i, label(each), ...rank.map((row_) => whole(row_[i]))])} />
  </${Figure}>`;
}

function TaskLens({ task }) {
  useStore();
  const top = isRegression ? Math.max(...task.map((each) => Math.abs(each[0]))) : 1;
  return html`<h3>${t("task_lens")}</h3><p>${t(isRegression ? "task_lens_number" : "task_lens_text")}</p>
    <${Figure} caption=${t("task_lens_caption")}>
      ${isRegression ? html`<${Bars} signed most=${top} name=${t("task_lens")} rows=${task.map((each, l) => ({ name: layerName(l), lit: false, value: each[0], text: number(each[0]), mark: l === L }))} />`
      : html`<div class="stack" role="img" aria-label=${t("task_lens_caption")}>${task.map((each, l) => html`<div class="stack-row"><span>${layerName(l)}</span><span class="stack-track">
          ${each.map((p, c) => html`<span class="stack-part" style=${`width:${(100 * p).toFixed(3)}%;background-color:${CLASS_COLOURS[c % CLASS_COLOURS.length]}`} title=${`${show(options[c])}: ${percent(p)}`}>${p > 0.12 ? html`<span data-lit>${(100 * p).toFixed(0)} %</span>` : ""}</span>`)}</span></div>`)}</div>
        <p class="legend">${options.map((option, c) => html`<span><i class="key" style=${`background-color:${CLASS_COLOURS[c % CLASS_COLOURS.length]}`} /><bdi data-lit>${shorten(show(option), 60)}</bdi></span> `)}</p>`}
    </${Figure}>
    <${Behind} title=${t("task_lens")} head=${[t("col_layer"), ...(isRegression ? [html`<span>${t("col_number")}</span>`] : options.map((option) => html`<span data-lit>${show(option)}</span>`))]}
      rows=${() => task.map((each, l) => [layerName(l), ...each.map((p) => number(p))])} />`;
}
