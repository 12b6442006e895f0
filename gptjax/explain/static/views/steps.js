// View 4: the steps of the computation, and the residual stream.

function Steps() {
  const state = useStore("block");
  const block = index(state.block, L) ?? 0;
  const { steps } = data;
  const total = steps.reduce((sum, step) => sum + step.flops, 0);
  const parameters = steps.reduce((sum, step) => sum + step.parameters, 0);
  const shown = steps.filter((step) => step.layer === null || step.layer === block);
  const row = (step) => html`<tr class=${step.layer === null ? "" : "in-block"}>
    <th scope="row">${t(`step_${step.name}`)}<small>${t(`step_about_${step.name}`)}</small></th>
    <td><${Formula} of=${step.name} /></td>
    <td class="n" data-lit>${step.shape.join(" × ")}</td><td class="n" data-lit>${step.parameters ? whole(step.parameters) : "–"}</td>
    <td class="n" data-lit title=${whole(step.flops)}>${step.flops ? short(step.flops) : "–"}</td><td class="n" data-lit>${number(step.norm, 3)}</td></tr>`;
  const groups = [["embedding_group", ["token_embedding", "position_embedding", "segment_embedding", "embedding"]],
    ["attention_group", ["qkv", "scores", "weights", "heads", "attention_out", "norm1"]],
    ["ffn_group", ["ffn_in", "activation", "ffn_out", "norm2"]], [data.task ? "heads_group" : "lm_head_group", ["lm_head", "task_head"]]];
  const share = groups.map(([key, names]) => ({ key, value: steps.filter((step) => names.includes(step.name)).reduce((sum, step) => sum + step.flops, 0) }));
  return html`
    <p>${fill(t("steps_intro"), { layers: L })}</p>
    <div class="aside-formulas"><${Formula} of="norm1" block /><${Formula} of="norm2" block /><${Formula} of="layer_norm" block /></div>
    <p>${t("steps_postln")}</p>
    <p class="pick"><label for="block">${t("block")}</label>
      <input id="block" type="range" min="0" max=${Math.max(0, L - 1)} value=${block} onInput=${(event) => store.set({ block: event.target.value })} /><output data-lit>${block}</output></p>
    <${Figure} wide caption=${t("steps_caption")}>
      <div class="scroll" tabindex="0" role="region" aria-label=${t("steps_caption")}><table class="steps">
        <thead><tr>${["step", "formula", "shape", "parameters", "flops", "norm"].map((each) => html`<th scope="col" class=${["step", "formula"].includes(each) ? "" : "n"}>${t(`col_${each}`)}</th>`)}</tr></thead>
        <tbody>${shown.map(row)}</tbody>
        <tfoot><tr><th scope="row" colspan="3">${t("steps_total")}</th><td class="n" data-lit>${whole(parameters)}</td><td class="n" data-lit title=${whole(total)}>${short(total)}</td><td /></tr></tfoot>
      </table></div>
    </${Figure}>
    <p>${t("flops_share")}</p>
    <${Bars} name=${t("flops_share")} rows=${share.map((each) => ({ name: t(each.key), lit: false, value: each.value, text: percent(each.value / total) }))} />
    <${Behind} title=${t("steps_all")} head=${[t("col_step"), t("block"), t("col_shape"), t("col_parameters"), t("col_flops"), t("col_norm")]}
      rows=${() => steps.map((step) => [t(`step_${step.name}`), step.layer === null ? "–" : step.layer, step.shape.join(" × "), whole(step.parameters), whole(step.flops), number(step.norm)])} />
    <h3>${t("ribbon")}</h3>
    <${Ribbon} />`;
}

function Ribbon() {
  useStore();
  const { token, locked } = useToken("ribbon", null);
  const [figure, width] = useWidth();
  const mean = (values) => values.reduce((a, b) => a + b, 0) / values.length;
  const pick = (values) => (token === null ? mean(values) : values[token]);
  const bars = data.ribbon.map((each) => ({ ...each, carried: pick(each.carried), added: pick(each.added) }));
  const top = Math.max(...bars.map((bar) => bar.carried + bar.added));
  const height = 240, foot = 44, left = 8, step = (width - left * 2) / bars.length;
  const y = (value) => 14 + (height - foot - 14) * (value / top);
  // A path along the tops of the parts: flat inside a sublayer, a curve between two.
  const edge = (heights, back) => {
    const points = [];
    heights.forEach((h, n) => points.push([left + n * step + step * 0.18, h], [left + (n + 1) * step - step * 0.18, h]));
    if (back) points.reverse();
    return points.map(([px, py], n) => {
      if (!n) return `${back ? "L" : "M"}${px.toFixed(1)} ${py.toFixed(1)}`;
      const [qx, qy] = points[n - 1];
      return n % 2 ? `L${px.toFixed(1)} ${py.toFixed(1)}` : `C${((px + qx) / 2).toFixed(1)} ${qy.toFixed(1)} ${((px + qx) / 2).toFixed(1)} ${py.toFixed(1)} ${px.toFixed(1)} ${py.toFixed(1)}`;
    }).join("");
  };
  const base = bars.map(() => 14), middle = bars.map((bar) => y(bar.carried)), bottom = bars.map((bar) => y(bar.carried + bar.added));
  const few = step > 46;
  return html`<p>${t("ribbon_text")}</p>
    <${Figure} wide caption=${token === null ? t("ribbon_caption_mean") : fill(t("ribbon_caption"), { token: html`<${Quote} i=${token} />` })}>
      <div ref=${figure}><svg class="ribbon" width=${width} height=${height} viewBox=${`0 0 ${width} ${height}`} role="img" aria-label=${t("ribbon")}>
        <path class="carried" d=${`${edge(base)}${edge(middle, true)}Z`} />
        <path class="added" d=${`${edge(middle)}${edge(bottom, true)}Z`} />
        ${bars.map((bar, n) => html`<g><title>${t(`sub_${bar.sublayer}`)} ${bar.layer}: ${number(bar.carried, 3)} + ${number(bar.added, 3)}</title>
          <rect x=${left + n * step} y="10" width=${step} height=${height - foot} fill="transparent" />
          <line class="norm" x1=${left + (n + 1) * step} x2=${left + (n + 1) * step} y1="14" y2=${height - foot} />
          ${few && bottom[n] - middle[n] > 15 && html`<text class="share" data-lit x=${left + (n + 0.5) * step} y=${(middle[n] + bottom[n]) / 2 + 4}>${(100 * bar.added / (bar.added + bar.carried)).toFixed(0)} %</text>`}
          ${few ? html`<text x=${left + (n + 0.5) * step} y=${height - 26}>${t(`sub_${bar.sublayer}`)}</text>` : ""}
          ${bar.sublayer === "attention" && html`<text data-lit x=${left + (n + 1) * step} y=${height - 8}>${bar.layer}</text>`}</g>`)}
      </svg></div>
      <p class="legend"><i class="key carried" />${t("carried")} <i class="key added" />${t("added")} <i class="key norm" />${t("norm_line")}</p>
    </${Figure}>
    <${Tokens} view="ribbon" name=${t("tokens")} compact />
    <${Behind} title=${t("ribbon")} head=${[t("block"), t("col_step"), t("carried"), t("added"), t("added_share")]}
      rows=${() => bars.map((bar) => [bar.layer, t(`sub_${bar.sublayer}`), number(bar.carried), number(bar.added), percent(bar.added / (bar.added + bar.carried))])} />`;
}
