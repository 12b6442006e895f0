// View 10: one training step on this text.

const SUBLAYERS = ["qkv", "attention_out", "norm1", "ffn_in", "ffn_out", "norm2"];

function Training() {
  useStore();
  const { training } = data;
  if (!training) return html`<p>${t("training_none")}</p>`;
  const { norms, cosine, before, after } = training;
  const losses = data.task ? ["task", "lm"] : ["lm"];
  const rows = losses.map((loss) => ({ name: t(`loss_${loss}`), lit: false, value: norms[loss], text: number(norms[loss], 3) }));
  if (data.task) rows.push({ name: t("loss_total"), lit: false, value: norms.total, text: number(norms.total, 3) });
  const clipped = training.clip_norm && norms.total > training.clip_norm;
  return html`
    <p>${t("training_intro")}${gap()}${t(training.from_run ? "training_of_run" : "training_imported")}</p>
    <p>${t(data.task ? "training_two" : "training_one")}</p>
    <${Formula} of=${data.task ? "gradient" : "gradient_lm"} block />
    <${Figure} caption=${t("gradient_norms_caption")}><${Bars} name=${t("gradient_norms")} rows=${rows} /></${Figure}>
    ${cosine !== null && cosine !== undefined ? html`<p>${fill(t("training_angle"), { angle: `${number((Math.acos(Math.max(-1, Math.min(1, cosine))) * 180) / Math.PI, 3)}°`, cosine: number(cosine, 3) })}${gap()}${t(cosine > 0.1 ? "angle_help" : cosine < -0.1 ? "angle_against" : "angle_neither")}</p>` : ""}
    <h3>${t("gradient_where")}</h3>
    <p>${t("gradient_where_text")}</p>
    ${losses.map((loss) => html`<${GradientGrid} loss=${loss} />`)}
    ${losses.map((loss) => html`<${HeadGrid} loss=${loss} />`)}
    <${Behind} title=${t("gradient_where")} head=${[t("col_step"), t("block"), ...losses.map((loss) => t(`loss_${loss}`)), t("update_norm"), t("weight_norm")]}
      rows=${() => training.groups.map((each) => [t(`group_${each.name}`), each.layer === null ? "–" : each.layer, ...losses.map((loss) => number(each[loss])), number(each.update), number(each.weight)])} />
    <h3>${t("update")}</h3>
    <p>${fill(t("update_text"), { rate: number(training.learning_rate, 3) })}${clipped ? html`${gap()}${fill(t("update_clipped"), { norm: number(norms.total, 3), clip: number(training.clip_norm, 3) })}` : ""}${training.frozen ? html`${gap()}${fill(t("update_frozen"), { count: training.frozen })}` : ""}</p>
    <${Formula} of="adam" block />
    <h3>${t("after")}</h3>
    <p>${t("after_text")}</p>
    <div class="scroll" tabindex="0" role="region" aria-label=${t("after")}><table class="logits"><thead><tr><th />${["before_column", "after_column", "change_column"].map((each) => html`<th scope="col" class="n">${t(each)}</th>`)}</tr></thead><tbody>
      ${(data.task ? ["total", "task", "lm"] : ["lm"]).map((loss) => html`<tr><th scope="row">${t(`loss_${loss}`)}</th><td class="n" data-lit>${number(before[loss])}</td><td class="n" data-lit>${number(after[loss])}</td><td class="n" data-lit>${number(after[loss] - before[loss], 3)}</td></tr>`)}
      ${isRegression ? html`<tr><th scope="row">${t("answer_number")}</th><td class="n" data-lit>${number(before.answer[0])}</td><td class="n" data-lit>${number(after.answer[0])}</td><td class="n" data-lit>${number(after.answer[0] - before.answer[0], 3)}</td></tr>` : ""}</tbody></table></div>
    ${data.task && !isRegression ? html`<${Figure} caption=${t("after_bars_caption")}><${Bars} most=${1} name=${t("probabilities")} rows=${options.map((each, i) => ({
      name: show(each), value: after.answer[i], ghost: before.answer[i], text: percent(after.answer[i]), mark: i === trueOption, note: i === trueOption ? t("true_mark") : "",
    }))} /></${Figure}>` : ""}
    <${Change} />`;
}

/** Norms of a gradient: a row for each block, a column for each of its parts. */
function GradientGrid({ loss }) {
  useStore("theme");
  const { groups } = data.training;
  const most = Math.max(...groups.map((each) => each[loss]), 1e-12);
  const cell = (each) => html`<td class="n" style=${tint(heatColour(0.9 * Math.sqrt(each[loss] / most)))} data-lit>${number(each[loss], 2)}</td>`;
  const others = groups.filter((each) => each.layer === null);
  return html`<${Figure} wide caption=${fill(t("gradient_grid_caption"), { loss: html`<b>${t(`loss_${loss}`)}</b>` })}>
    <div class="scroll" tabindex="0" role="region" aria-label=${t(`loss_${loss}`)}><table class="grid"><thead><tr><th scope="col">${t("block")}</th>${SUBLAYERS.map((part) => html`<th scope="col" class="n">${t(`group_${part}`)}</th>`)}</tr></thead><tbody>
      ${Array.from({ length: L }, (_, layer) => html`<tr><th scope="row" data-lit>${layer}</th>${SUBLAYERS.map((part) => cell(groups.find((each) => each.layer === layer && each.name === part)))}</tr>`)}</tbody></table>
    <table class="grid"><tbody>${others.map((each) => html`<tr><th scope="row">${t(`group_${each.name}`)}</th>${cell(each)}</tr>`)}</tbody></table></div></${Figure}>`;
}

/** Norms of a gradient: a row for each block, a column for each head. */
function HeadGrid({ loss }) {
  useStore("theme");
  const rows = data.training.heads[loss];
  const most = Math.max(...rows.flat(), 1e-12);
  return html`<${Figure} wide caption=${fill(t("head_grid_caption"), { loss: html`<b>${t(`loss_${loss}`)}</b>` })}>
    <div class="scroll" tabindex="0" role="region" aria-label=${t("rail_heads")}><table class="grid"><thead><tr><th scope="col">${t("block")}</th>${rows[0].map((_, head) => html`<th scope="col" class="n">${t("head")} <span data-lit>${head}</span></th>`)}</tr></thead><tbody>
      ${rows.map((row, layer) => html`<tr><th scope="row" data-lit>${layer}</th>${row.map((norm) => html`<td class="n" style=${tint(heatColour(0.9 * Math.sqrt(norm / most)))} data-lit>${number(norm, 2)}</td>`)}</tr>`)}</tbody></table></div></${Figure}>`;
}

/** The tokens, coloured by the change of their surprise. */
function Change() {
  const state = useStore();
  const { before, after } = data.training;
  // The surprise at a place is that of the token after it.
  const changes = data.tokens.map((_, i) => (i && before.surprise[i - 1] !== null ? after.surprise[i - 1] - before.surprise[i - 1] : null));
  const most = largest(changes.map((change) => change ?? 0));
  const fallback = changes.reduce((best, change, i) => (Math.abs(change ?? 0) > Math.abs(changes[best] ?? 0) ? i : best), 0);
  const { token } = useToken("training", fallback);
  const styles = useMemo(() => changes.map((change) => (change === null ? "" : tint(signColour((-0.95 * change) / most)))), [palette.dark]);
  const titles = useMemo(() => changes.map((change) => (change === null ? "–" : number(change, 3))), []);
  const list = useMemo(() => html`<${Tokens} view="training" name=${t("change_tokens")} styles=${styles} titles=${titles} fallback=${fallback} compact />`, [state.lang, styles]);
  return html`<h3>${t("change_tokens")}</h3><p>${t("change_text")}</p>
    <${Figure} caption=${t("change_caption")}>${list}
    <p class="readout" aria-live="polite"><${Quote} i=${token} />: ${changes[token] === null ? html`<span data-lit>–</span>` : html`<b data-lit>${number(before.surprise[token - 1], 4)} → ${number(after.surprise[token - 1], 4)}</b>`}</p></${Figure}>`;
}
