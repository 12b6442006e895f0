// View 12.
function LiveView() { return html`<p>…</p>`; }
