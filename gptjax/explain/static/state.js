// The state of the page: what the reader chose. It lives in the hash of the address.
// What the pointer is over is not state: it changes often and belongs to one view.

const { html, render, useState, useEffect, useLayoutEffect, useRef, useMemo } = htmPreact;

const DEFAULTS = {
  lang: document.documentElement.lang.startsWith("zh") ? "zh" : "en",
  theme: "auto", // auto, light or dark
  at: "", // the view that was chosen in the rail
  token: "", // the locked token
  key: "", // the locked key of a query
  head: "", // LAYER.HEAD of the head in view 5
  block: "0", // the block in the step table
  word: "", // the word whose merges are shown
  sort: "order", // the order of the heads
  hide: "0", // 1: the heads are drawn without the first token
  order: "weight", // the order of the keys of a query
  temperature: "1",
  topk: "0",
  topp: "1",
  checkpoint: "", // the index of the checkpoint that is compared
  end: "0", // 1: the LM head after the last token
  off: "", // the heads that are off in the last view, as numbers LAYER * H + HEAD
  mute: "", // the tokens that are hidden in the last view
};

const store = {
  state: { ...DEFAULTS },
  listeners: new Set(),
  /** Changes some fields, writes the hash and calls the listeners. */
  set(changes) {
    const changed = Object.keys(changes).filter((name) => this.state[name] !== String(changes[name]));
    if (!changed.length) return;
    for (const name of changed) this.state[name] = String(changes[name]);
    this.write();
    for (const listener of [...this.listeners]) listener(changed);
  },
  write() {
    const parts = new URLSearchParams();
    for (const name in DEFAULTS) {
      if (this.state[name] !== DEFAULTS[name]) parts.set(name, this.state[name]);
    }
    // A page inside a notebook has no address of its own. There the state is not kept.
    try {
      history.replaceState(null, "", `#${parts}`);
    } catch {}
  },
  read() {
    const parts = new URLSearchParams(location.hash.slice(1));
    const changes = {};
    for (const name in DEFAULTS) changes[name] = parts.get(name) ?? DEFAULTS[name];
    if (!(changes.lang in LANGUAGES)) changes.lang = DEFAULTS.lang;
    this.set(changes);
  },
};

/** Returns the state, and renders again when one of the named fields changes. */
function useStore(...names) {
  const [, again] = useState(0);
  useLayoutEffect(() => {
    const listener = (changed) => {
      if (changed.some((name) => name === "lang" || name === "theme" || names.includes(name))) {
        again((count) => count + 1);
      }
    };
    store.listeners.add(listener);
    return () => store.listeners.delete(listener);
  }, []);
  return store.state;
}

/** Returns an integer in [0, count), or null if the text is not one. */
function index(text, count) {
  return /^\d+$/.test(text) && Number(text) < count ? Number(text) : null;
}

// ---- the token under the pointer, for each view

const hovers = new Map();

function hoverOf(view) {
  if (!hovers.has(view)) hovers.set(view, { token: null, key: null, listeners: new Set() });
  return hovers.get(view);
}

function hover(view, token, key = null) {
  const state = hoverOf(view);
  if (state.token === token && state.key === key) return;
  state.token = token;
  state.key = key;
  for (const listener of [...state.listeners]) listener();
}

/** Returns {token, key, locked}: what the pointer is over in this view, else what is locked, else `fallback`. */
function useToken(view, fallback) {
  const state = useStore("token", "key");
  const [, again] = useState(0);
  useLayoutEffect(() => {
    const listener = () => again((count) => count + 1);
    hoverOf(view).listeners.add(listener);
    return () => hoverOf(view).listeners.delete(listener);
  }, [view]);
  const count = data.tokens.length;
  const locked = index(state.token, count);
  const over = hoverOf(view);
  const token = over.token ?? locked ?? fallback;
  const key = over.token === null || over.token === locked ? over.key ?? index(state.key, count) : over.key;
  return { token, key, locked };
}

function lock(token, key = "") {
  const same = store.state.token === String(token) && store.state.key === String(key);
  store.set(same ? { token: "", key: "" } : { token, key });
}

// ---- light and dark

const darkQuery = matchMedia("(prefers-color-scheme: dark)");
let printing = false;

function isDark() {
  if (printing) return false;
  return store.state.theme === "auto" ? darkQuery.matches : store.state.theme === "dark";
}

function applyTheme() {
  document.documentElement.dataset.theme = isDark() ? "dark" : "light";
  buildPalette(isDark());
}

function applyLanguage() {
  document.documentElement.lang = store.state.lang === "zh" ? "zh-Hans" : "en";
  document.title = `${t("title")} · gptjax`;
}
