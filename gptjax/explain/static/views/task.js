// View 9: the task head, and which words made its answer.

const METHODS = ["integrated_gradients", "gradient_x_input", "leave_one_out"];

function Task() {
  useStore("token");
  const { answer, attribution, model, losses, input } = data;
  if (!data.task) return html`<p>${t("task_none")}</p>`;
  const tau = model.temperature;
  const powers = answer.logits.map((logit) => Math.exp((logit - Math.max(...answer.logits)) / tau));
  const reads = `reads_${isChoice ? "choices" : data.sequences.length > 1 ? (/^window /.test(data.sequences[0].name) ? "windows" : "sum") : model.head}`;
  return html`
    <p>${t(reads)}${gap()}${t("task_intro")}</p>
    <${Formula} of="task_head" block />
    ${isRegression ? html`<p>${fill(t("task_number"), { value: number(answer.prediction) })}${gap()}${losses.task === null ? "" : fill(t("task_square"), { loss: number(losses.task), label: show(input.label) })}</p>` : html`
    <${Formula} of="task_softmax" block />
    <p>${fill(t("task_softmax"), { temperature: number(tau) })}${gap()}${losses.task === null ? "" : fill(t("task_cross"), { loss: number(losses.task) })}</p>
    <${Figure} caption=${t("task_caption")}><div class="scroll" tabindex="0" role="region" aria-label=${t("logits")}><table class="logits"><thead><tr>${["answer", "logit", "scaled", "power", "probability"].map((each) => html`<th scope="col">${t(`logit_${each}`)}</th>`)}<th /></tr></thead>
      <tbody>${options.map((each, c) => html`<tr class=${c === predicted ? "mark" : ""}><th scope="row" data-lit><bdi>${shorten(show(each), 80)}</bdi></th>
        <td class="n" data-lit>${number(answer.logits[c])}</td><td class="n" data-lit>${number(answer.logits[c] / tau)}</td><td class="n" data-lit>${number(powers[c])}</td><td class="n" data-lit>${percent(answer.probabilities[c])}</td>
        <td class="inline-bar"><span class="bar-track" aria-hidden="true"><span class="bar-fill" style=${`width:${(100 * answer.probabilities[c]).toFixed(2)}%`} /></span>${c === trueOption ? html`<small>${t("true_mark")}</small>` : ""}</td></tr>`)}</tbody></table></div></${Figure}>`}
    ${attribution && html`<${Attribution} />`}`;
}

function Attribution() {
  const state = useStore();
  const { attribution } = data;
  const fallback = useMemo(() => {
    const values = attribution.methods.integrated_gradients;
    return values.reduce((best, value, i) => (Math.abs(value) > Math.abs(values[best]) ? i : best), 0);
  }, []);
  const { token } = useToken("task", fallback);
  const methods = METHODS.filter((method) => attribution.methods[method]);
  const scales = methods.map((method) => largest(attribution.methods[method]));
  const styles = useMemo(() => methods.map((method, m) => attribution.methods[method].map((value) => tint(signColour(0.95 * value / scales[m])))), [palette.dark]);
  const titles = useMemo(() => methods.map((method) => attribution.methods[method].map((value, i) => (data.tokens[i].kind === "text" ? number(value, 3) : "–"))), []);
  const columns = useMemo(() => methods.map((method, m) => html`<div class="method"><h4>${t(`method_${method}`)}</h4><p>${fill(t(`method_text_${method}`), { steps: attribution.steps })}</p>
      <${Tokens} view="task" name=${t(`method_${method}`)} styles=${styles[m]} titles=${titles[m]} fallback=${fallback} compact />
      <p class="legend"><${Scale} from=${number(-scales[m], 2)} to=${number(scales[m], 2)} colour=${(x) => signColour(0.95 * (2 * x - 1))} /></p></div>`), [state.lang, styles]);
  const strongest = useMemo(() => data.tokens.map((_, i) => i).filter((i) => data.tokens[i].kind === "text").sort((a, b) => Math.abs(attribution.methods.integrated_gradients[b]) - Math.abs(attribution.methods.integrated_gradients[a])).slice(0, 12), []);
  const total = attribution.methods.integrated_gradients.reduce((a, b) => a + b, 0);
  const shareError = attribution.difference ? Math.abs(attribution.error / attribution.difference) : null;
  return html`<h3>${t("attribution")}</h3>
    <p>${attribution.target === null ? t("attribution_number") : fill(t("attribution_text"), { target: html`<bdi class="quote" data-lit>${option(attribution.output, attribution.target)}</bdi>` })}</p>
    <p class="hint">${t("hint_tokens")}</p>
    <${Figure} wide caption=${t("attribution_caption")}><div class="methods">${columns}</div>
      <p class="readout" aria-live="polite"><${Quote} i=${token} />: ${methods.map((method, m) => html`<span class="value"><span>${t(`method_${method}`)}</span> <b data-lit>${data.tokens[token].kind === "text" ? number(attribution.methods[method][token], 3) : "–"}</b></span> `)}</p></${Figure}>
    <h3>${t("strongest")}</h3>
    <p>${t("strongest_text")}</p>
    <div class="scroll" tabindex="0" role="region" aria-label=${t("strongest")}><table class="strongest"><thead><tr><th scope="col">${t("token")}</th>${methods.map((method) => html`<th scope="col">${t(`method_${method}`)}</th>`)}</tr></thead><tbody>
      ${strongest.map((i) => html`<tr><th scope="row"><${Quote} i=${i} /></th>${methods.map((method, m) => {
        const value = attribution.methods[method][i], share = Math.abs(value) / scales[m];
        return html`<td><div class="pair"><span class=${`two-sided ${value < 0 ? "negative" : ""}`} aria-hidden="true"><span style=${`width:${(50 * share).toFixed(1)}%`} /></span><small data-lit>${number(value, 3)}</small></div></td>`;
      })}</tr>`)}</tbody></table></div>
    <h3>${t("agreement")}</h3>
    <p>${t("agreement_text")}</p>
    <${Bars} signed most=${1} name=${t("agreement")} rows=${Object.entries(attribution.agreement).map(([pair, value]) => ({ name: pair.split("/").map((method) => t(`method_${method}`)).join(" · "), lit: false, value: value ?? 0, text: value === null ? "–" : value.toFixed(3).replace("-", "−") }))} />
    <p>${fill(t("completeness"), { sum: number(total), difference: number(attribution.difference), error: html`<b data-lit id="completeness">${number(attribution.error, 2)}</b>`, share: shareError === null ? "–" : percent(shareError), steps: attribution.steps})}</p>
    <${Behind} title=${t("attribution")} head=${[t("place"), t("token"), ...methods.map((method) => t(`method_${method}`))]} rows=${() => data.tokens.map((each, i) => [i, label(each), ...methods.map((method) => (each.kind === "text" ? number(attribution.methods[method][i]) : "–"))])} />`;
}
