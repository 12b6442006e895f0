// The formulas of the sublayers, in MathML. They are constants of this file; no text of the reader is in them.

const FORMULAS = (() => {
  const mi = (x) => `<mi>${x}</mi>`;
  const mn = (x) => `<mn>${x}</mn>`;
  const mo = (x) => `<mo>${x}</mo>`;
  const name = (x) => `<mi mathvariant="normal">${x}</mi>`;
  const sub = (a, b) => `<msub><mrow>${a}</mrow><mrow>${b}</mrow></msub>`;
  const sup = (a, b) => `<msup><mrow>${a}</mrow><mrow>${b}</mrow></msup>`;
  const subsup = (a, b, c) => `<msubsup><mrow>${a}</mrow><mrow>${b}</mrow><mrow>${c}</mrow></msubsup>`;
  const frac = (a, b) => `<mfrac><mrow>${a}</mrow><mrow>${b}</mrow></mfrac>`;
  const root = (a) => `<msqrt>${a}</msqrt>`;
  const within = (x, open = "(", close = ")") => `<mrow>${mo(open)}${x}${mo(close)}</mrow>`;
  const call = (f, x) => `${name(f)}${mo("&#x2061;")}${within(x)}`;
  const sum = (below) => `<munder>${mo("∑")}<mrow>${below}</mrow></munder>`;
  const is = mo("="), plus = mo("+"), minus = mo("−"), dot = mo("·"), comma = mo(",");
  const sij = sub(mi("s"), mi("i") + mi("j")), aij = sub(mi("a"), mi("i") + mi("j")), mij = sub(mi("m"), mi("i") + mi("j"));
  const at = (x, i) => sub(mi(x), mi(i));

  return {
    token_embedding: at("e", "t") + is + call("onehot", at("w", "t")) + sub(mi("W"), mi("e")),
    position_embedding: at("p", "t") + is + call("onehot", mi("t")) + sub(mi("W"), mi("p")),
    segment_embedding: at("g", "t") + is + call("onehot", sub(name("type"), mi("t"))) + sub(mi("W"), mi("g")),
    embedding: at("h", "t") + is + at("e", "t") + plus + at("p", "t") + (data.embedding.segment ? plus + at("g", "t") : ""),
    qkv: within(mi("q") + mo(";") + mi("k") + mo(";") + mi("v"), "[", "]") + is + mi("h") + sub(mi("W"), name("qkv")) + plus + mi("b"),
    scores: sij + is + frac(at("q", "i") + dot + at("k", "j"), root(mi("K"))) + plus + mij,
    weights: aij + is + frac(sup(mi("e"), sij), `<msub>${mo("∑")}${mi("n")}</msub>` + sup(mi("e"), sub(mi("s"), mi("i") + mi("n")))),
    heads: at("z", "i") + is + sum(mi("j")) + aij + at("v", "j"),
    attention_out: call("Attention", mi("h")) + is + within(sup(mi("z"), mn(0)) + mo(";") + mi("…") + mo(";") + sup(mi("z"), mi("H") + minus + mn(1)), "[", "]") + sub(mi("W"), mi("o")) + plus + mi("b"),
    norm1: mi("h") + mo("←") + call("LayerNorm", mi("h") + plus + call("Attention", mi("h"))),
    ffn_in: mi("u") + is + mi("h") + sub(mi("W"), mn(1)) + plus + sub(mi("b"), mn(1)),
    activation: data.model.activation.startsWith("gelu")
      ? call("GELU", mi("u")) + is + frac(mi("u"), mn(2)) + within(mn(1) + plus + call("tanh", root(mn(2) + mo("/") + mi("π")) + within(mi("u") + plus + mn("0.044715") + sup(mi("u"), mn(3)))))
      : call("ReLU", mi("u")) + is + call("max", mn(0) + comma + mi("u")),
    ffn_out: call("FFN", mi("h")) + is + call(data.model.activation.startsWith("gelu") ? "GELU" : "ReLU", mi("u")) + sub(mi("W"), mn(2)) + plus + sub(mi("b"), mn(2)),
    norm2: mi("h") + mo("←") + call("LayerNorm", mi("h") + plus + call("FFN", mi("h"))),
    layer_norm: call("LayerNorm", mi("x")) + is + mi("γ") + frac(mi("x") + minus + mi("μ"), root(sup(mi("σ"), mn(2)) + plus + mi("ε"))) + plus + mi("β"),
    lm_head: name("logits") + is + mi("h") + (data.model.one_matrix ? `<msup>${within(sub(mi("W"), mi("e")) + mo(";") + sub(mi("W"), mi("p")), "[", "]")}${mi("⊤")}</msup>` : data.model.tied ? subsup(mi("W"), mi("e"), mi("⊤")) : sub(mi("W"), name("LM")) + plus + mi("b")),
    task_head: (() => {
      const kind = data.task ? data.task.kind : "", many = data.sequences.length > 1;
      const flat = within(at("h", "0") + mo(";") + mi("…") + mo(";") + sub(mi("h"), mi("S") + minus + mn(1)), "[", "]");
      const read = name(data.model.head === "mean" ? "mean" : "extract"), one = data.model.head === "flatten" ? flat : sub(mi("h"), read);
      const each = subsup(mi("h"), read, within(mi("s")));
      const all = kind === "multiple_choice" ? subsup(mi("h"), read, within(mi("c")))
        : !many ? one : kind === "similarity" || kind === "regression" ? within(sum(mi("s")) + each)
        : within(frac(mn(1), mn(data.sequences.length)) + sum(mi("s")) + each);
      return (kind === "multiple_choice" ? sub(mi("y"), mi("c")) : mi("y")) + is + all + sub(mi("W"), mi("y")) + plus + mi("b");
    })(),
    task_softmax: at("p", "c") + is + frac(sup(mi("e"), at("y", "c") + mo("/") + mi("τ")), `<msub>${mo("∑")}${mi("n")}</msub>` + sup(mi("e"), at("y", "n") + mo("/") + mi("τ"))),
    lm_softmax: call("p", mi("w")) + is + frac(sup(mi("e"), at("l", "w") + mo("/") + mi("τ")), `<msub>${mo("∑")}${mi("n")}</msub>` + sup(mi("e"), at("l", "n") + mo("/") + mi("τ"))),
    surprise: minus + name("log") + `<mspace width="0.2em"/>` + call("p", sub(mi("w"), mi("t") + plus + mn(1))) + is + call("logsumexp", mi("l")) + minus + sub(mi("l"), sub(mi("w"), mi("t") + plus + mn(1))),
    loss: mi("L") + is + sub(mi("L"), name("task")) + plus + mi("λ") + dot + sub(mi("L"), name("LM")),
    gradient: mo("∇") + mi("L") + is + mo("∇") + sub(mi("L"), name("task")) + plus + mi("λ") + mo("∇") + sub(mi("L"), name("LM")),
    gradient_lm: mo("∇") + mi("L") + is + mo("∇") + sub(mi("L"), name("LM")),
    adam: mi("θ") + mo("←") + mi("θ") + minus + mi("η") + within(frac(`<mover>${mi("m")}${mo("^")}</mover>`, root(`<mover>${mi("v")}${mo("^")}</mover>`) + plus + mi("ε")) + plus + mi("δ") + mi("θ")),
    loss_lm: mi("L") + is + sub(mi("L"), name("LM")),
  };
})();

/** A formula of this file. */
function Formula({ of, block = false }) {
  const element = useRef();
  useLayoutEffect(() => {
    const text = `<math xmlns="http://www.w3.org/1998/Math/MathML"${block ? ' display="block"' : ""}><mrow>${FORMULAS[of]}</mrow></math>`;
    const parsed = new DOMParser().parseFromString(text, "application/xml");
    element.current.replaceChildren(document.importNode(parsed.documentElement, true));
  }, [of]);
  return html`<span class=${`formula ${block ? "block" : ""}`} data-lit ref=${element} />`;
}
