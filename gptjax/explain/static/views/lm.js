// View 8: the LM head.

const neverDrawn = new Set(data.lm.never_drawn);

/** The kept tokens and their probabilities after temperature, top-k and top-p, as generate.py computes them.
 *
 * Special tokens are never drawn. Of the others the 50 largest logits travel. The rest is one entry: its probability
 * is exact at the temperature 1. At other temperatures it is that of equal logits. With top-k up to 50 nothing is left out. */
function sample(t_, { temperature, topk, topp }) {
  const top = data.lm.top[t_], drawn = top.filter((each) => !neverDrawn.has(each.id));
  const others = data.model.vocab_size - neverDrawn.size - drawn.length, all = data.lm.drawn_logsumexp[t_];
  const tau = Math.max(temperature, 1e-6), peak = drawn[0].logit;
  const inside = drawn.reduce((sum, each) => sum + Math.exp(each.logit - all), 0);
  const outside = Math.max(0, 1 - inside);
  // log of the mean of exp(logit) over the others
  const mean = others > 0 && outside > 1e-7 ? all + Math.log(outside / others) : -Infinity;
  let entries = drawn.map((each) => ({ each, power: Math.exp((each.logit - peak) / tau) }));
  let rest = mean > -Infinity ? others * Math.exp((mean - peak) / tau) : 0;
  if (temperature === 0) {
    entries = entries.map((entry, i) => ({ ...entry, power: i ? 0 : 1 }));
    rest = 0;
  }
  if (topk > 0) {
    const border = drawn[Math.min(topk, drawn.length) - 1].logit;
    entries = entries.map((entry) => (entry.each.logit >= border ? entry : { ...entry, power: 0 }));
    if (topk <= drawn.length) rest = 0;
  }
  let total = entries.reduce((sum, entry) => sum + entry.power, 0) + rest, beyond = false;
  if (topp < 1) {
    let before = 0;
    entries = entries.map((entry) => {
      const kept = before < topp ? entry : { ...entry, power: 0 };
      before += entry.power / total;
      return kept;
    });
    beyond = before < topp && rest > 0;
    if (!beyond) rest = 0;
    total = entries.reduce((sum, entry) => sum + entry.power, 0) + rest;
  }
  const shares = new Map(entries.map((entry) => [entry.each.id, entry.power / total]));
  return { entries: top.map((each) => ({ ...each, p: shares.get(each.id) ?? 0 })), rest: rest / total, others, beyond };
}

function LMHead() {
  const state = useStore("temperature", "topk", "topp", "end", "token");
  const { surprise, next } = data.lm;
  // The surprise of token i is that of the prediction that was made one token before.
  const of = useMemo(() => data.tokens.map((_, i) => (i > 0 && surprise[i - 1] !== null ? surprise[i - 1] : null)), []);
  const most = useMemo(() => Math.max(1, ...of.filter((value) => value !== null)), []);
  const styles = useMemo(() => of.map((value) => (value === null ? "" : tint(heatColour(0.9 * value / most)))), [state.theme, palette.dark]);
  const titles = useMemo(() => of.map((value) => (value === null ? t("not_predicted") : `${number(value, 3)} ${t("nats")}`)), [state.lang]);
  const fallback = surprising >= 0 ? surprising + 1 : 0;
  const { token, locked } = useToken("lm", fallback);
  const end = state.end === "1" && hoverOf("lm").token === null;
  const place = end ? lastText : of[token] !== null ? token - 1 : token;
  const target = end ? null : next[place];
  const settings = { temperature: Math.max(0, Number(state.temperature) || 0), topk: Math.max(0, Math.round(Number(state.topk)) || 0), topp: Math.min(1, Math.max(0.01, Number(state.topp) || 1)) };
  const result = sample(place, settings);
  const before = data.lm.top[place].map((each) => Math.exp(each.logit - data.lm.logsumexp[place]));
  const kept = result.entries.filter((each) => each.p > 0).length;
  const wanted = target ? result.entries.findIndex((each) => each.id === target.id) : -1;
  const rows = result.entries.slice(0, 10).map((each, i) => ({ name: piece(each), value: each.p, ghost: before[i], text: percent(each.p), empty: each.p === 0, mark: target && each.id === target.id, note: target && each.id === target.id ? t("true_next") : neverDrawn.has(each.id) ? t("never_drawn") : "" }));
  if (wanted >= 10) rows.push({ name: piece(target), value: result.entries[wanted].p, ghost: before[wanted], text: percent(result.entries[wanted].p), mark: true, note: t("true_next") });
  const shown = rows.reduce((sum, row) => sum + row.value, 0);
  const rest = Math.max(0, 1 - shown), ghostRest = Math.max(0, 1 - rows.reduce((sum, row) => sum + row.ghost, 0));
  rows.push({ name: fillText(t("all_others"), { count: whole(data.model.vocab_size - rows.length) }), lit: false, value: rest, ghost: ghostRest, text: percent(rest), empty: rest < 1e-9 });
  const slider = (field, min, max, step, text) => html`<label class="slider"><span>${t(field)}</span>
    <input type="range" min=${min} max=${max} step=${step} value=${state[field]} onInput=${(event) => store.set({ [field]: String(Number(event.target.value)) })} /><output data-lit>${text}</output></label>`;
  return html`
    <p>${t(data.model.tied ? "lm_intro" : "lm_intro_untied")}</p>
    <${Formula} of="lm_head" block />
    <h3>${t("surprise")}</h3>
    <p>${t("surprise_text")}</p>
    <${Formula} of="surprise" block />
    <p class="hint">${t("hint_lm")}</p>
    <${Tokens} view="lm" name=${t("tokens")} styles=${styles} titles=${titles} fallback=${fallback} />
    <p class="legend"><${Scale} from="0" to=${`${number(most, 3)}`} colour=${(x) => heatColour(0.9 * x)} /> ${t("nats")}</p>
    <${Mean} of=${of} token=${token} most=${most} />
    <h3>${t("next_tokens")}</h3>
    <p class="readout" aria-live="polite">${end ? t("lm_end") : target ? fill(t("lm_before"), { next: html`<${Quote} i=${place + 1} />`, token: html`<${Quote} i=${place} />`, surprise: number(surprise[place]), p: percent(Math.exp(-surprise[place])) }) : fill(t("lm_none"), { token: html`<${Quote} i=${place} />` })}</p>
    <label class="switch"><input type="checkbox" checked=${state.end === "1"} onChange=${(event) => store.set({ end: event.target.checked ? "1" : "0" })} /> ${t("lm_end_switch")}</label>
    <div class="sliders">
      ${slider("temperature", 0, 2, 0.05, settings.temperature.toFixed(2))}
      ${slider("topk", 0, 50, 1, settings.topk ? String(settings.topk) : "∞")}
      ${slider("topp", 0.01, 1, 0.01, settings.topp.toFixed(2))}
    </div>
    <${Formula} of="lm_softmax" block />
    <${Figure} caption=${html`${t("sampler_caption")}${gap()}${settings.temperature !== 1 && !(settings.topk > 0) && result.rest > 0 ? t("sampler_approximate") : ""}`}>
      <${Bars} name=${t("next_tokens")} most=${Math.max(...rows.map((row) => row.value), ...rows.map((row) => row.ghost), 0.05)} rows=${rows} /></${Figure}>
    <p class="soft">${result.rest > 0 ? fill(t("kept_all"), { count: whole(result.others) }) : fill(t("kept"), { count: kept })}${result.beyond ? html`${gap()}${t("topp_beyond")}` : ""}</p>
    <${Behind} title=${t("surprise")} head=${[t("place"), t("token"), t("surprise"), t("probability"), t("running_mean")]}
      rows=${() => { let sum = 0, count = 0; return data.tokens.map((each, i) => { if (of[i] !== null) { sum += of[i]; count++; } return [i, label(each), of[i] === null ? "–" : number(of[i]), of[i] === null ? "–" : percent(Math.exp(-of[i])), count ? number(sum / count) : "–"]; }); }} />`;
}

/** The surprise of each token and its running mean, which ends at the LM loss. */
function Mean({ of, token, most }) {
  useStore();
  const [figure, width] = useWidth();
  const height = 150, left = 34, right = 74, foot = 8;
  const step = (width - left - right) / T;
  const y = (value) => height - foot - (value / most) * (height - foot - 12);
  const draw = (context) => {
    for (const value of [0, most / 2, most]) {
      context.strokeStyle = palette.line;
      context.beginPath();
      context.moveTo(left, y(value));
      context.lineTo(width - right, y(value));
      context.stroke();
      write(context, number(value, 2), left - 6, y(value), { align: "right", size: 11 });
    }
    let sum = 0, count = 0;
    const line = [];
    of.forEach((value, i) => {
      if (value === null) return;
      sum += value;
      count++;
      line.push([left + (i + 0.5) * step, y(sum / count)]);
      context.fillStyle = `rgb(${heatColour(0.35 + 0.55 * value / most)})`;
      context.fillRect(left + i * step + (step > 4 ? 1 : 0), y(value), Math.max(step > 4 ? step - 2 : step, 0.7), y(0) - y(value));
    });
    context.strokeStyle = palette.blue;
    context.lineWidth = 2;
    context.beginPath();
    line.forEach(([px, py], n) => (n ? context.lineTo(px, py) : context.moveTo(px, py)));
    context.stroke();
    if (!line.length) return;
    const [px, py] = line[line.length - 1];
    context.fillStyle = palette.blue;
    context.beginPath();
    context.arc(px, py, 3.5, 0, 7);
    context.fill();
    write(context, number(sum / count), px + 8, py - 2, { colour: palette.blue, weight: 650 });
    write(context, t("loss_short"), px + 8, py + 13, { size: 11, width: width - px - 10 });
  };
  const over = (context) => {
    if (of[token] === null) return;
    context.strokeStyle = palette.text;
    context.strokeRect(left + token * step - 0.5, y(of[token]) - 1, Math.max(step, 2), y(0) - y(of[token]) + 1);
  };
  const at = (event) => {
    const i = Math.floor((event.clientX - event.currentTarget.getBoundingClientRect().left - left) / step);
    return i >= 0 && i < T ? i : null;
  };
  return html`<${Figure} wide caption=${fill(t("mean_caption"), { loss: number(data.losses.lm) })}>
    <div class="layers-of-canvas pointer" ref=${figure} style=${`height:${height}px`} onPointerMove=${(event) => hover("lm", at(event))} onPointerLeave=${() => hover("lm", null)}
      onClick=${(event) => { const i = at(event); if (i !== null) { hover("lm", null); lock(i); } }}>
      <${Canvas} width=${width} height=${height} draw=${draw} label=${t("mean_label")} /><${Canvas} width=${width} height=${height} draw=${over} on=${[token]} /></div></${Figure}>`;
}
