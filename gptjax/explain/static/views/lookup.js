// View 3: the look-up is a one-hot vector times a matrix.

function Lookup() {
  useStore();
  const { token, key: _, locked } = useToken("lookup", firstText);
  const [figure, width] = useWidth();
  const { dimensions, norms, nearest } = data.embedding;
  const rowOf = (part, i) => part.subarray(i * dimensions, (i + 1) * dimensions);
  const parts = ["token", "position", "segment", "sum"].filter((part) => data.embedding[part] !== null);
  const scale = useMemo(() => Math.max(...parts.map((part) => largest(embeddingOf(part)))) * 0.8, []);
  const colour = (x) => signColour(Math.max(-1, Math.min(1, x / scale)));
  // The rows of the matrix that the text uses, sorted by id. A few neighbours of the token's row are drawn.
  const used = useMemo(() => {
    const first = new Map();
    data.tokens.forEach((each, i) => { if (!first.has(each.id)) first.set(each.id, i); });
    return [...first.entries()].sort((a, b) => a[0] - b[0]);
  }, []);
  const place = used.findIndex(([id]) => id === data.tokens[token].id);
  const shown = Math.min(used.length, 9);
  const from = Math.max(0, Math.min(used.length - shown, place - Math.floor(shown / 2)));
  const rows = used.slice(from, from + shown);
  const height = 22;
  const narrow = width < 520;
  const left = narrow ? 84 : 210, right = width - 8;
  const drawMatrix = (context) => {
    const e = embeddingOf("token");
    let y = 26;
    const hot = left - 44;
    write(context, t("one_hot"), hot + 10, 10, { align: "center", size: 11 });
    write(context, t("token_matrix"), (left + right) / 2, 10, { align: "center", size: 11 });
    const gap = (before, after) => {
      if (after - before > 1) {
        if (!narrow) write(context, "⋮", hot - 60, y + 6, { align: "center" });
        write(context, "⋮", hot + 10, y + 6, { align: "center" });
        write(context, "⋮", (left + right) / 2, y + 6, { align: "center" });
        y += 14;
      }
    };
    gap(-2, rows[0][0]);
    rows.forEach(([id, i], n) => {
      const lit = id === data.tokens[token].id;
      if (n) gap(rows[n - 1][0], id);
      context.globalAlpha = lit ? 1 : 0.38;
      const text = shorten(show(plain(data.tokens[i].text)), narrow ? 5 : 13);
      if (!narrow) write(context, `${id}  ${text}`, hot - 8, y + 8, { align: "right", colour: palette.text, weight: lit ? 650 : 400 });
      context.fillStyle = lit ? palette.orange : palette.masked;
      context.fillRect(hot, y, 20, 16);
      write(context, lit ? "1" : "0", hot + 10, y + 8.5, { align: "center", colour: lit ? palette.ground : palette.soft, weight: lit ? 700 : 400 });
      strip(context, rowOf(e, i), left, y, right - left, 16, colour);
      context.globalAlpha = 1;
      if (lit) {
        context.strokeStyle = palette.orange;
        context.lineWidth = 2;
        context.strokeRect(left - 2, y - 2, right - left + 4, 20);
      }
      y += height;
    });
    gap(rows[rows.length - 1][0], data.model.vocab_size);
    write(context, "×", left - 12, 26 + (y - 26) / 2, { size: 16, align: "center", colour: palette.text });
  };
  const drawSum = (context) => {
    parts.forEach((part, n) => {
      const y = 8 + n * 34 + (part === "sum" ? 8 : 0);
      if (part === "sum") {
        context.strokeStyle = palette.soft;
        context.beginPath();
        context.moveTo(left, y - 9);
        context.lineTo(right, y - 9);
        context.stroke();
      }
      write(context, `${part === "sum" ? "= " : n ? "+ " : ""}${t(`part_${part}`)}`, left - 10, y + 5, { align: "right", colour: palette.text, width: left - 12 });
      write(context, `‖·‖ = ${number(norms[part][token], 3)}`, left - 10, y + 19, { align: "right", size: 10.5, width: left - 12 });
      strip(context, rowOf(embeddingOf(part), token), left, y, right - left, 18, colour);
    });
  };
  const gaps = rows.reduce((count, row, n) => count + ((n ? row[0] - rows[n - 1][0] : 2) > 1 ? 1 : 0), 0) + 1;
  return html`
    <p>${t("lookup_intro")}${data.model.one_matrix ? html`${gap()}${t("one_matrix")}` : ""}</p>
    <${Formula} of="embedding" block />
    <p class="hint">${t("hint_tokens")}</p>
    <${Tokens} view="lookup" name=${t("tokens")} fallback=${firstText} />
    <${Figure} wide caption=${fill(t("lookup_caption"), { token: html`<${Quote} i=${token} />`, id: data.tokens[token].id, dimensions, width: data.model.width })}>
      <div ref=${figure}>
        <${Canvas} width=${width} height=${34 + rows.length * height + gaps * 14} draw=${drawMatrix} on=${[token]} label=${t("lookup_label")} />
        <${Canvas} width=${width} height=${parts.length * 34 + 16} draw=${drawSum} on=${[token]} label=${t("sum_label")} />
        <p class="legend"><${Scale} from=${number(-scale, 2)} to=${number(scale, 2)} colour=${(x) => signColour(2 * x - 1)} /></p>
      </div>
    </${Figure}>
    <p>${t(data.embedding.segment ? "sum_text_segment" : "sum_text")}</p>
    <h3>${t("nearest")}</h3>
    <p>${fill(t("nearest_text"), { token: html`<${Quote} i=${token} />` })}</p>
    <${Bars} most=${1} name=${t("nearest")} rows=${nearest[token].map((each) => ({ name: piece(each), value: each.cosine, text: number(each.cosine, 3) }))} />
    <${Behind} title=${t("lookup_table")} head=${[t("dimension"), ...parts.map((part) => t(`part_${part}`))]}
      rows=${() => Array.from({ length: dimensions }, (_, d) => [d, ...parts.map((part) => number(embeddingOf(part)[token * dimensions + d]))])} />`;
}
