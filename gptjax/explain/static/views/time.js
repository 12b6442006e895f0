// View 11: the same text in other checkpoints, and another text in this model.

const { checkpoints, left_out: leftOut, other: otherText } = data.comparison;

/** The name of a checkpoint: its stage and step, or its path. */
function checkpointName(each) {
  if (!each.stage) return shorten(show(each.path), 60);
  const alone = new Set(checkpoints.filter((one) => one.stage).map((one) => one.path.split("/checkpoints/")[0])).size < 2;
  const run = alone ? "" : ` · ${shorten(show(each.path.split("/checkpoints/")[0].split("/").pop()), 30)}`;
  return fillText(t("checkpoint_name"), { stage: t(`stage_${each.stage}`), step: each.step }) + run;
}

function Time() {
  useStore();
  return html`
    <p>${t("time_intro")}</p>
    ${checkpoints.length ? html`<${Checkpoints} />` : html`<p class="notice">${fill(t("time_none"), { keep: html`<code data-lit>--config.checkpoint.keep_newest=20</code>`, compare: html`<code data-lit>--compare=runs/a,runs/b</code>` })}</p>`}
    ${leftOut.map((each) => html`<p class="notice">${fill(t("time_left_out"), { name: html`<bdi class="quote" data-lit>${show(each.name)}</bdi>`, reason: html`<bdi class="quote" data-lit>${show(each.reason)}</bdi>` })}</p>`)}
    <h3>${t("other_text")}</h3>
    ${otherText ? html`<${Other} />` : html`<p class="notice">${fill(t("other_none"), { flag: html`<code data-lit>--other_text='…'</code>` })}</p>`}`;
}

function Checkpoints() {
  const state = useStore("checkpoint", "token");
  const own = checkpoints.findIndex((each) => each.shown);
  const before = own > 0 ? own - 1 : checkpoints.findIndex((each) => !each.shown);
  const place = index(state.checkpoint, checkpoints.length) ?? before;
  const here = checkpoints[place], mine = checkpoints[own];
  const losses = (data.task ? ["total", "task", "lm"] : ["lm"]).filter((loss) => checkpoints.some((each) => each.losses[loss] !== null));
  const choose = (i) => store.set({ checkpoint: String(i) });
  const difference = (a, b) => (a === null || b === null ? null : a - b);
  return html`<h3>${t("checkpoints")}</h3>
    <p>${fill(t("checkpoints_text"), { count: checkpoints.length })}</p>
    <label class="slider wide-slider"><span>${t("checkpoint")}</span>
      <input type="range" id="checkpoint-slider" min="0" max=${checkpoints.length - 1} step="1" value=${place} aria-valuetext=${checkpointName(here)} onInput=${(event) => choose(Number(event.target.value))} />
      <output><b>${checkpointName(here)}</b>${here.shown ? html` <span class="soft">(${t("shown_here")})</span>` : ""}</output></label>
    <${LossLine} losses=${losses} place=${place} own=${own} choose=${choose} />
    <div class="scroll" tabindex="0" role="region" aria-label=${t("losses")}><table class="logits"><thead><tr><th />
      <th scope="col" class="n">${checkpointName(here)}</th><th scope="col" class="n">${t("shown_here")}</th><th scope="col" class="n">${t("change_column")}</th></tr></thead><tbody>
      ${losses.map((loss) => html`<tr><th scope="row">${t(`loss_${loss}`)}</th><td class="n" data-lit>${number(here.losses[loss])}</td><td class="n" data-lit>${number(mine.losses[loss])}</td><td class="n" data-lit>${number(difference(mine.losses[loss], here.losses[loss]), 3)}</td></tr>`)}
      ${isRegression && here.answer ? html`<tr><th scope="row">${t("answer_number")}</th><td class="n" data-lit>${number(here.answer[0])}</td><td class="n" data-lit>${number(mine.answer[0])}</td><td class="n" data-lit>${number(mine.answer[0] - here.answer[0], 3)}</td></tr>` : ""}</tbody></table></div>
    ${data.task && !here.answer ? html`<p class="soft">${t("no_task_head")}</p>` : ""}
    ${data.task && !isRegression && here.answer ? html`<${Figure} caption=${t("checkpoint_bars_caption")}><${Bars} most=${1} name=${t("probabilities")} rows=${options.map((each, i) => ({
      name: show(each), value: here.answer[i], ghost: mine.answer[i], text: percent(here.answer[i]), mark: i === trueOption, note: i === trueOption ? t("true_mark") : "" }))} /></${Figure}>` : ""}
    <${SurpriseChange} here=${here} mine=${mine} />
    <${WhereItChanged} here=${here} />`;
}

/** The losses of all checkpoints. A click chooses one. */
function LossLine({ losses, place, own, choose }) {
  useStore();
  const [figure, width] = useWidth();
  const height = 150, left = 44, right = 110, top = 10, foot = 8;
  const count = checkpoints.length;
  const x = (i) => left + ((i + 0.5) * (width - left - right)) / count;
  const most = Math.max(...losses.flatMap((loss) => checkpoints.map((each) => each.losses[loss] ?? 0)));
  const y = (value) => height - foot - (value / most) * (height - foot - top);
  const colours = { total: palette.text, task: palette.orange, lm: palette.blue };
  const draw = (context) => {
    for (const value of [0, most / 2, most]) {
      context.strokeStyle = palette.line;
      context.beginPath();
      context.moveTo(left, y(value));
      context.lineTo(width - right, y(value));
      context.stroke();
      write(context, number(value, 2), left - 6, y(value), { align: "right", size: 11 });
    }
    const ends = [];
    for (const loss of losses) {
      context.strokeStyle = context.fillStyle = colours[loss];
      context.lineWidth = 2;
      context.setLineDash(loss === "total" ? [5, 4] : []);
      context.beginPath();
      let last = null;
      checkpoints.forEach((each, i) => {
        const value = each.losses[loss];
        // A line joins the checkpoints of one stage.
        if (value !== null) last !== null && checkpoints[last].stage === each.stage && checkpoints[last].losses[loss] !== null ? context.lineTo(x(i), y(value)) : context.moveTo(x(i), y(value));
        last = i;
      });
      context.stroke();
      context.setLineDash([]);
      let end = null;
      checkpoints.forEach((each, i) => {
        if (each.losses[loss] === null) return;
        context.beginPath();
        context.arc(x(i), y(each.losses[loss]), i === own ? 5 : 3, 0, 7);
        context.fill();
        end = each.losses[loss];
      });
      if (end !== null) ends.push([y(end), loss]);
    }
    // The names must not lie on each other.
    ends.sort((a, b) => a[0] - b[0]);
    ends.forEach((each, i) => { if (i) each[0] = Math.max(each[0], ends[i - 1][0] + 15); });
    for (const [at, loss] of ends) write(context, t(`loss_${loss}`), width - right + 8, at, { colour: colours[loss], size: 12, width: right - 10 });
  };
  const over = (context) => {
    context.strokeStyle = palette.soft;
    context.setLineDash([3, 3]);
    context.beginPath();
    context.moveTo(x(place), top - 6);
    context.lineTo(x(place), height - foot);
    context.stroke();
    context.setLineDash([]);
  };
  const at = (event) => Math.max(0, Math.min(count - 1, Math.floor(((event.clientX - event.currentTarget.getBoundingClientRect().left - left) / (width - left - right)) * count)));
  return html`<${Figure} wide caption=${t("checkpoint_losses_caption")}>
    <div class="layers-of-canvas pointer" ref=${figure} style=${`height:${height}px`} onClick=${(event) => choose(at(event))}>
      <${Canvas} width=${width} height=${height} draw=${draw} label=${t("checkpoint_losses_caption")} /><${Canvas} width=${width} height=${height} draw=${over} on=${[place]} /></div>
    <${Behind} title=${t("checkpoints")} head=${[t("checkpoint"), ...losses.map((loss) => t(`loss_${loss}`)), ...(data.task ? (isRegression ? [t("answer_number")] : options.map((each) => show(each))) : [])]}
      rows=${() => checkpoints.map((each) => [checkpointName(each), ...losses.map((loss) => number(each.losses[loss])), ...(data.task ? (each.answer ?? (isRegression ? [null] : options.map(() => null))).map((p) => (p === null ? "–" : isRegression ? number(p) : percent(p))) : [])])} />
  </${Figure}>`;
}

/** The tokens, coloured by the change of their surprise from a checkpoint to the model of the page. */
function SurpriseChange({ here, mine }) {
  const state = useStore();
  const changes = useMemo(() => data.tokens.map((_, i) => (i && mine.surprise[i - 1] !== null ? mine.surprise[i - 1] - here.surprise[i - 1] : null)), [here]);
  const most = largest(changes.map((change) => change ?? 0));
  const fallback = surprising >= 0 ? surprising + 1 : 0;
  const { token } = useToken("time", fallback);
  const styles = useMemo(() => changes.map((change) => (change === null ? "" : tint(signColour((-0.95 * change) / most)))), [changes, palette.dark]);
  const titles = useMemo(() => changes.map((change) => (change === null ? "–" : number(change, 3))), [changes]);
  const list = useMemo(() => html`<${Tokens} view="time" name=${t("change_tokens")} styles=${styles} titles=${titles} fallback=${fallback} compact />`, [state.lang, styles]);
  const before = Math.max(0, token - 1);
  const next = token ? data.lm.next[before] : null;
  return html`<h4>${t("time_surprise")}</h4><p>${t("time_surprise_text")}</p>
    <${Figure} caption=${t("time_change_caption")}>${list}
      <p class="readout" aria-live="polite"><${Quote} i=${token} />: ${changes[token] === null ? html`<span data-lit>–</span>` : html`<b data-lit>${number(here.surprise[before])} → ${number(mine.surprise[before])}</b>`}</p></${Figure}>
    ${token ? html`<${Figure} wide caption=${fill(t("time_next_caption"), { token: html`<${Quote} i=${before} />` })}><div class="scroll" tabindex="0" role="region" aria-label=${t("next_tokens")}><table class="lens">
      <thead><tr><th scope="col">${t("checkpoint")}</th><th scope="col">${t("surprise")}</th>${[1, 2, 3].map((n) => html`<th scope="col" data-lit>${n}</th>`)}</tr></thead>
      <tbody>${checkpoints.map((each) => html`<tr><th scope="row">${checkpointName(each)}${each.shown ? html` <b data-lit>●</b>` : ""}</th><td class="n" data-lit>${number(each.surprise[before], 3)}</td>
        ${each.next[before].map((one) => html`<td data-lit class=${next && one.id === next.id ? "true" : ""} style=${tint(weightColour(Math.sqrt(one.p) * 0.9))}><bdi>${piece(one, 14)}</bdi><small>${percent(one.p)}</small></td>`)}</tr>`)}</tbody></table></div></${Figure}>` : ""}`;
}

/** How far the heads and the states of a checkpoint are from those of the model of the page. */
function WhereItChanged({ here }) {
  useStore("theme");
  if (here.shown) return html`<h4>${t("time_where")}</h4><p class="soft">${t("time_where_same")}</p>`;
  if (!here.heads && !here.states) return html`<h4>${t("time_where")}</h4><p class="soft">${t("time_where_other")}</p>`;
  return html`<h4>${t("time_where")}</h4><p>${t("time_where_text")}</p>
    ${here.states ? html`<${Figure} caption=${t("time_states_caption")}><${Bars} most=${1} signed=${here.states.some((each) => each < 0)} name=${t("time_states")} rows=${here.states.map((each, n) => ({ name: layerName(n), lit: false, value: each, text: number(each, 3) }))} /></${Figure}>` : ""}
    ${here.heads ? html`<${Figure} wide caption=${t("time_heads_caption")}><div class="scroll" tabindex="0" role="region" aria-label=${t("rail_heads")}><table class="grid"><thead><tr><th scope="col">${t("block")}</th>${here.heads[0].map((_, head) => html`<th scope="col" class="n">${t("head")} <span data-lit>${head}</span></th>`)}</tr></thead><tbody>
      ${here.heads.map((row, layer) => html`<tr><th scope="row" data-lit>${layer}</th>${row.map((each) => html`<td class="n" style=${tint(heatColour(0.9 * Math.sqrt(each)))} data-lit>${number(each, 2)}</td>`)}</tr>`)}</tbody></table></div></${Figure}>` : ""}`;
}

/** Another text beside that of the page. */
function Other() {
  const state = useStore();
  const { columns, answer, losses, surprise, match, distance, task, tokens } = otherText;
  const labels = tokens.map((token) => label(token, 30));
  const changed = columns.filter((column, i) => column.text !== (data.input.columns[i] || {}).text);
  const most = largest(distance.flat().map((value) => value ?? 0));
  const [figure, width] = useWidth();
  const left = 78, count = tokens.length, cell = Math.min(30, (width - left - 2) / count), row = Math.max(14, Math.min(22, 260 / distance.length));
  const slant = cell < 16 ? 0 : 54;
  const height = distance.length * row + 4 + slant;
  const draw = (context) => {
    distance.forEach((values, n) => {
      write(context, layerName(n), left - 6, slant + 2 + (n + 0.5) * row, { align: "right", size: 11, width: left - 8 });
      values.forEach((value, i) => {
        const [px, py, w] = [left + i * cell, slant + 2 + n * row, cell > 4 ? cell - 1 : cell + 0.3];
        if (value === null) hatch(context, px, py, w, row - 1);
        else {
          context.fillStyle = `rgb(${heatColour(0.95 * Math.sqrt(value / most))})`;
          context.fillRect(px, py, w, row - 1);
        }
      });
    });
    if (!slant) return;
    labels.forEach((text, i) => {
      context.save();
      context.translate(left + (i + 0.5) * cell, slant - 2);
      context.rotate(-0.9);
      write(context, shorten(text, 9), 0, 0, { size: 10, colour: match[i] === null ? palette.orange : palette.soft, weight: match[i] === null ? 700 : 400 });
      context.restore();
    });
  };
  const list = useMemo(() => html`<p class="tokens compact plain">${labels.map((text, i) => html`<span class=${`token ${match[i] === null ? "new" : ""} ${tokens[i].kind !== "text" ? "special" : ""}`} data-lit=${tokens[i].kind === "text"}><bdi>${text}</bdi></span>`)}</p>`, [state.lang]);
  return html`<p>${t("other_text_text")}</p>
    <div class="given-texts">${changed.map((column) => html`<blockquote tabindex="0"><span class="name" data-lit><bdi>${show(column.name)}</bdi></span><p data-lit dir="auto">${show(column.text)}</p></blockquote>`)}</div>
    ${otherText.cut ? html`<p class="notice">${t("answer_cut")}</p>` : ""}
    <${Figure} caption=${t("other_tokens_caption")}>${list}</${Figure}>
    ${answer && !isRegression ? html`<${Figure} caption=${t("other_bars_caption")}><${Bars} most=${1} name=${t("probabilities")} rows=${answer.map((p, i) => ({
      name: isChoice ? show(data.task.labels[i]) : show(options[i]), value: p, ghost: data.answer.probabilities[i], text: percent(p), mark: p === Math.max(...answer) }))} /></${Figure}>` : ""}
    <div class="scroll" tabindex="0" role="region" aria-label=${t("losses")}><table class="logits"><thead><tr><th /><th scope="col" class="n">${t("this_text")}</th><th scope="col" class="n">${t("other_text")}</th><th scope="col" class="n">${t("change_column")}</th></tr></thead><tbody>
      ${isRegression ? html`<tr><th scope="row">${t("answer_number")}</th><td class="n" data-lit>${number(data.answer.prediction)}</td><td class="n" data-lit>${number(answer[0])}</td><td class="n" data-lit>${number(answer[0] - data.answer.prediction, 3)}</td></tr>` : ""}
      ${(data.task ? ["task", "lm"] : ["lm"]).filter((loss) => losses[loss] !== null).map((loss) => html`<tr><th scope="row">${t(`loss_${loss}`)}</th><td class="n" data-lit>${number(data.losses[loss])}</td><td class="n" data-lit>${number(losses[loss])}</td><td class="n" data-lit>${number(losses[loss] - data.losses[loss], 3)}</td></tr>`)}</tbody></table></div>
    <h4>${t("spread")}</h4><p>${t("spread_text")}</p>
    <${Figure} wide caption=${t("spread_caption")}><div ref=${figure}><${Canvas} width=${width} height=${height} draw=${draw} on=${[cell]} label=${t("spread_caption")} /></div>
      <p class="legend"><${Scale} from="0" to=${number(most, 2)} colour=${(x) => heatColour(0.95 * Math.sqrt(x))} /> ${t("spread_unit")}</p></${Figure}>
    <${Behind} title=${t("spread")} head=${[t("place"), t("token"), t("surprise"), ...distance.map((_, n) => layerName(n))]}
      rows=${() => tokens.map((_, i) => [i, labels[i], i && surprise[i - 1] !== null ? number(surprise[i - 1]) : "–", ...distance.map((values) => number(values[i], 3))])} />
    ${task && !isRegression && data.lens.task ? html`<${Behind} title=${t("task_lens")} head=${[t("col_layer"), ...(isChoice ? data.task.labels : options).flatMap((each) => [show(each), `${show(each)} (${t("other_text")})`])]}
      rows=${() => task.map((each, n) => [layerName(n), ...each.flatMap((p, i) => [percent(data.lens.task[n][i]), percent(p)])])} />` : ""}`;
}
