// The page: a rail of the steps, and the views one below the other.

const VIEWS = [["answer", Answer], ["ids", Ids], ["lookup", Lookup], ["steps", Steps], ["head", Head], ["heads", Heads], ["layers", Layers], ["lm", LMHead], ["task", Task], ["training", Training], ["time", Time], ["live", LiveView]];
// The number of views before the first that needs the large arrays.
const LIGHT = VIEWS.findIndex(([name]) => name === "head");

/** Scrolls to a view. The rail marks it, and the hash keeps it. */
function go(view, element = `view-${view}`) {
  store.set({ at: view });
  const target = document.getElementById(element);
  if (!target) return;
  target.scrollIntoView({ block: "start", behavior: matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth" });
  const heading = document.getElementById(`view-${view}`).querySelector("h2");
  heading.focus({ preventScroll: true });
}

function Rail({ current }) {
  const state = useStore();
  const [open, setOpen] = useState(innerWidth > 900);
  return html`<nav class="rail" aria-label=${t("rail")}>
    <details open=${open} class="rail-box" onToggle=${(event) => setOpen(event.target.open)}><summary>${t("rail")}</summary>
      <ol>${VIEWS.map(([name], n) => html`<li><a href=${`#at=${name}`} class=${current === name ? "current" : ""} aria-current=${current === name ? "step" : undefined}
        onClick=${(event) => { event.preventDefault(); if (innerWidth <= 900) setOpen(false); go(name); }}><span data-lit>${n + 1}</span> ${t(`rail_${name}`)}</a></li>`)}</ol>
    </details>
    <div class="switches">
      <div class="switch-row" role="group" aria-label=${t("language")}>${Object.entries(LANGUAGES).map(([code, text]) => html`<button type="button" lang=${code} data-lit data-language=${code} aria-pressed=${state.lang === code ? "true" : "false"} onClick=${() => store.set({ lang: code })}>${text}</button>`)}</div>
      <div class="switch-row" role="group" aria-label=${t("theme")}>${["auto", "light", "dark"].map((theme) => html`<button type="button" data-choose=${theme} aria-pressed=${state.theme === theme ? "true" : "false"} onClick=${() => store.set({ theme })}>${t(`theme_${theme}`)}</button>`)}</div>
    </div>
  </nav>`;
}

/** A view that fails shows one line, and the others stay. */
class Safe extends htmPreact.Component {
  componentDidCatch(error) {
    console.error(error);
    this.setState({ failed: true });
  }
  render() {
    return this.state.failed ? html`<p class="notice">${t("failed")}</p>` : this.props.children;
  }
}

function Page() {
  const state = useStore();
  const [count, setCount] = useState(1);
  const [current, setCurrent] = useState("answer");
  const [failed, setFailed] = useState(false);
  mountAll = () => !isComplete || setCount(VIEWS.length);
  // The first view is painted at once. The others follow one by one.
  useEffect(() => {
    if (count === 1) requestAnimationFrame(() => performance.mark("first view"));
    if (count === 1 && document.readyState === "loading") {
      document.addEventListener("DOMContentLoaded", () => setCount(2));
      return undefined;
    }
    if (count === LIGHT && !isComplete) {
      readMore().then(() => setCount(LIGHT + 1), (error) => {
        console.error(error);
        setFailed(true);
      });
      return undefined;
    }
    if (count < VIEWS.length) {
      const timer = setTimeout(() => setCount((n) => Math.min(VIEWS.length, n + 1)), 0);
      return () => clearTimeout(timer);
    }
    performance.mark("all views");
    document.documentElement.dataset.ready = "1";
    if (store.state.at && store.state.at !== "answer") {
      const target = document.getElementById(`view-${store.state.at}`);
      if (target) target.scrollIntoView();
    }
  }, [count]);
  useEffect(() => {
    const follow = () => {
      let found = "answer";
      for (const [name] of VIEWS) {
        const box = document.getElementById(`view-${name}`);
        if (box && box.getBoundingClientRect().top < innerHeight * 0.35) found = name;
      }
      setCurrent(found);
    };
    addEventListener("scroll", follow, { passive: true });
    return () => removeEventListener("scroll", follow);
  }, []);
  return html`<div class="layout">
    <${Rail} current=${current} />
    <main>
      <header><p class="kicker" data-lit>gptjax explain</p><h1>${t("title")}</h1><p class="lead">${t("subtitle")}</p></header>
      ${VIEWS.map(([name, View], n) => html`<section id=${`view-${name}`} aria-labelledby=${`title-${name}`}>
        <h2 id=${`title-${name}`} tabindex="-1"><span class="number" data-lit>${n + 1}</span> ${t(`title_${name}`)}</h2>
        ${n < count ? html`<${Safe}><${View} /></${Safe}>` : html`<p class=${failed ? "notice" : "soft"}>${failed ? t("failed_rest") : "…"}</p>`}
      </section>`)}
      <footer><p>${t("footer")}</p></footer>
    </main>
  </div>`;
}

let mountAll = () => {};

store.read();
applyTheme();
applyLanguage();
store.listeners.add((changed) => {
  if (changed.includes("theme")) applyTheme();
  if (changed.includes("lang")) applyLanguage();
});
const retheme = () => {
  applyTheme();
  for (const listener of [...store.listeners]) listener(["theme"]);
};
darkQuery.addEventListener("change", retheme);
addEventListener("hashchange", () => {
  store.read();
  const target = document.getElementById(`view-${store.state.at}`);
  if (target) target.scrollIntoView();
});
addEventListener("beforeprint", () => {
  printing = true;
  mountAll();
  retheme();
  drawAll();
});
addEventListener("afterprint", () => {
  printing = false;
  retheme();
});
const place = document.getElementById("page");
place.replaceChildren();
render(html`<${Page} />`, place);
