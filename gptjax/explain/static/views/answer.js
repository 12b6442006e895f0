// View 1: the answer first.

function Answer() {
  useStore();
  const { answer, losses, input, model } = data;
  const right = isRegression ? false : trueOption >= 0 ? trueOption === predicted : String(input.label) === String(answer && answer.prediction);
  const after = data.lm.top[lastText].slice(0, 6).map((each) => ({
    name: piece(each), value: Math.exp(each.logit - data.lm.logsumexp[lastText]),
  }));
  return html`
    <p class="lead">${t(data.task ? "answer_lead_task" : "answer_lead_lm")}</p>
    <div class="given-texts">${input.columns.map((column) => html`<blockquote tabindex="0"><span class="name" data-lit><bdi>${show(column.name)}</bdi></span>
      <p data-lit dir="auto">${show(column.text)}</p></blockquote>`)}</div>
    ${input.cut ? html`<p class="notice">${t("answer_cut")}</p>` : ""}
    ${answer && html`<div class="verdict">
      <p>${t(isRegression ? "answer_number" : "answer_label")}</p>
      <p class=${`prediction ${!isRegression && option(predicted, answer.prediction).length > 40 ? "long" : ""}`} data-lit><bdi>${isRegression ? number(answer.prediction) : option(predicted, answer.prediction)}</bdi></p>
      ${input.label !== null ? html`<p>${fill(t(isRegression ? "true_number" : right ? "true_same" : "true_other"), { label: html`<bdi class="quote" data-lit>${option(trueOption, input.label)}</bdi>` })}</p>`
        : html`<p class="soft">${t("true_unknown")}</p>`}
    </div>`}
    ${answer && answer.probabilities && html`<${Figure} caption=${t("answer_bars_caption")}>
      <${Bars} most=${1} name=${t("probabilities")} rows=${options.map((each, i) => ({
        name: show(each), value: answer.probabilities[i], text: percent(answer.probabilities[i]),
        mark: i === predicted, note: i === trueOption ? t("true_mark") : "",
      }))} /></${Figure}>`}
    ${!answer && html`<${Figure} caption=${t("answer_next_caption")}>
      <${Bars} most=${Math.max(...after.map((row) => row.value))} name=${t("next_tokens")} rows=${after.map((row) => ({ ...row, text: percent(row.value) }))} /></${Figure}>`}
    <h3>${t("losses")}</h3>
    <p>${t(data.task ? (losses.task === null ? "losses_unlabelled" : isRegression ? "losses_regression" : "losses_task") : "losses_lm")}${data.task && losses.lambda === 0 ? `${gap()}${t("losses_zero")}` : ""}</p>
    <${Formula} of=${data.task ? "loss" : "loss_lm"} block />
    <div class="equation" role="group" aria-label=${t("losses")}>
      ${losses.total === null ? "" : html`<span class="term"><b data-lit>${number(losses.total)}</b><small>${t("loss_total")}</small></span><span>=</span>`}
      ${data.task && losses.total !== null ? html`${losses.task_weight !== 1 ? html`<span class="term"><b data-lit>${number(losses.task_weight)}</b></span><span>×</span>` : ""}<span class="term task"><b data-lit>${number(losses.task)}</b><small>${t("loss_task")}</small></span><span>+</span>
        <span class="term"><b data-lit>${number(losses.lambda)}</b><small data-lit>λ</small></span><span>×</span>` : ""}
      <span class="term lm"><b data-lit>${number(losses.lm)}</b><small>${t("loss_lm")}</small></span>
    </div>
    ${losses.task !== null && !isRegression && model.temperature !== 1 ? html`<p class="soft">${t("loss_temperature")}</p>` : ""}
    <p class="soft">${losses.lm < Math.log(model.vocab_size) ? fill(t("perplexity"), { value: number(Math.exp(losses.lm)) }) : fill(t("perplexity_bad"), { vocabulary: whole(model.vocab_size), guess: number(Math.log(model.vocab_size)) })}</p>
    <details class="behind"><summary>${t("model")}</summary><table><tbody>
      ${[["program", data.program], ["checkpoint", show(data.checkpoint)], ["parameters", whole(model.parameters)], ["layers", model.layers],
        ["heads", model.heads], ["width", model.width], ["head_width", model.head_width], ["ffn_width", model.ffn_width],
        ["vocab_size", whole(model.vocab_size)], ["context_length", whole(model.context_length)], ["activation", model.activation],
        ...(data.task && !isRegression ? [["temperature_fitted", number(model.temperature)]] : [])].map(([key, value]) => html`<tr><th scope="row">${t(`model_${key}`)}</th><td data-lit>${value}</td></tr>`)}
    </tbody></table></details>`;
}
