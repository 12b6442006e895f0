// View 6: all heads.

const PATTERNS = ["previous", "first", "same", "delimiter", "extract", "entropy"];

/** The lower triangle of a head as a small picture: the largest weight of each square of cells. */
function thumbnail(context, head, size, hide) {
  const triangle = triangleOf(head), seen = visible(0);
  const firsts = data.tokens.map((token) => data.sequences[token.sequence].start);
  const n = Math.min(T, Math.max(1, Math.round(size * Math.min(devicePixelRatio || 1, 2))));
  const cells = new Uint8Array(n * n), known = new Uint8Array(n * n);
  let most = 1;
  for (let i = 0; i < T; i++) {
    const start = rowStart(i), y = Math.floor((i * n) / T) * n;
    for (let j = 0; j <= i; j++) {
      if (!seen[start + j]) continue;
      const at = y + Math.floor((j * n) / T);
      known[at] = 1;
      if (hide && j === firsts[i]) continue;
      const weight = triangle[start + j];
      if (weight > cells[at]) cells[at] = weight;
      if (weight > most) most = weight;
    }
  }
  const image = new ImageData(n, n), masked = maskedColour();
  for (let at = 0; at < n * n; at++) {
    const c = known[at] ? weightColour(Math.sqrt(cells[at] / most)) : masked;
    image.data.set(c, at * 4);
    image.data[at * 4 + 3] = 255;
  }
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = n;
  canvas.getContext("2d").putImageData(image, 0, 0);
  context.imageSmoothingEnabled = false;
  context.drawImage(canvas, 0, 0, size, size);
}

function Thumb({ head, hide, size, score, chosen, first }) {
  return html`<button type="button" class=${`thumb ${chosen ? "chosen" : ""}`} data-head=${head} tabindex=${first ? 0 : -1}
    aria-label=${`${t("block")} ${Math.floor(head / H)}, ${t("head")} ${head % H}${score ? `, ${score}` : ""}`}>
    <${Canvas} width=${size} height=${size} draw=${(context) => thumbnail(context, head, size, hide)} on=${[head, hide]} />
    <span data-lit><b>${headName(head)}</b>${score ? ` ${score}` : ""}</span>${travels.has(head) ? html`<i class="dot full" />` : ""}</button>`;
}

function Heads() {
  const state = useStore("sort", "hide", "head");
  const hide = state.hide === "1";
  const head = chosenHead(state.head);
  const [figure, width] = useWidth();
  const known = PATTERNS.filter((pattern) => data.patterns.some((each) => each[pattern] !== null));
  const sort = known.includes(state.sort) ? state.sort : "order";
  const heads = data.patterns.map((each) => ({ ...each, number: each.layer * H + each.head }));
  if (sort !== "order") heads.sort((a, b) => (b[sort] ?? -1) - (a[sort] ?? -1));
  else heads.sort((a, b) => a.number - b.number);
  const columns = sort === "order" ? H : Math.max(1, Math.floor(width / 76));
  const size = Math.max(34, Math.min(H <= 4 ? 110 : 84, Math.floor(width / columns) - 10));
  const open = (event) => {
    const item = event.target.closest("[data-head]");
    if (!item) return;
    store.set({ head: headName(Number(item.dataset.head)) });
    go("head", "one-head");
  };
  return html`
    <p>${fill(t("heads_intro"), { layers: L, heads: H })}</p>
    <div class="controls"><${Choice} name=${t("sort_by")} field="sort" values=${[["order", t("by_order")], ...known.map((each) => [each, t(`pattern_${each}`)])]} />
      <label class="switch"><input type="checkbox" checked=${hide} onChange=${(event) => store.set({ hide: event.target.checked ? "1" : "0" })} /> ${t("hide_first")}</label></div>
    <p class="soft">${t(`about_pattern_${sort}`)}${gap()}${hide ? t("about_hide") : ""}</p>
    <${Figure} wide caption=${t("heads_caption")}>
      <div ref=${figure}><div class="thumbs" role="group" aria-label=${t("all_heads")} style=${`grid-template-columns:repeat(${columns},${size + 6}px)`} onClick=${open}
        onKeyDown=${(event) => rove(event, ".thumb")}>
        ${heads.map((each, n) => html`<${Thumb} key=${each.number} head=${each.number} hide=${hide} size=${size} first=${n === 0} chosen=${each.number === head}
          score=${sort === "order" ? "" : number(each[sort], 2)} />`)}
      </div></div>
      <p class="legend"><i class="dot full" />${t("dot_full")}</p>
    </${Figure}>
    <${Behind} title=${t("all_heads")} head=${[t("head"), ...known.map((each) => t(`pattern_${each}`))]} rows=${() => heads.map((each) => [headName(each.number), ...known.map((pattern) => number(each[pattern], 3))])} />`;
}
