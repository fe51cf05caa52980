// The browser of one dictionary's latents: unpacked data, a virtual list, the chosen latent's panel.

const ROW = 58; // the height of a row, as the style sheet has it
const STACKED = matchMedia("(max-width: 52rem)"); // the list above the panel, as the style sheet has it

function bytes(base64) {
  const text = atob(base64);
  const array = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i += 1) array[i] = text.charCodeAt(i);
  return array;
}

// The packed JSON, with every context knowing where its tokens begin.
function unpack(text) {
  const data = JSON.parse(text);
  const raw = bytes(data.context_tokens);
  data.contextTokens = data.wide ? new Uint32Array(raw.buffer) : new Uint16Array(raw.buffer);
  data.contextActivations = bytes(data.context_activations);
  let start = 0;
  for (const latent of data.latents) {
    latent.contexts = latent.contexts.map(([length, peak]) => {
      const context = { start, end: start + length, peak };
      start += length;
      return context;
    });
  }
  return data;
}

const peakOf = (data, { start, end }) => {
  let at = start;
  for (let i = start; i < end; i += 1) if (data.contextActivations[i] > data.contextActivations[at]) at = i;
  return at;
};

const searchable = (text) => text.replace(/\s+/g, " ").toLowerCase();

// Lower-case text per latent and scope. Contexts, and runs of firing tokens, are kept apart by newlines, so that a
// phrase is found only where it stands.
function index(data) {
  return data.latents.map((latent) => {
    const contexts = latent.contexts.map(({ start, end }) => {
      let whole = "";
      let fires = "";
      for (let i = start; i < end; i += 1) {
        const token = data.tokens[data.contextTokens[i]];
        whole += token;
        fires += data.contextActivations[i] > 0 ? token : "\n";
      }
      return [searchable(whole), fires.split(/\n+/).map(searchable).join("\n")];
    });
    return {
      promoted: latent.promoted.map(([token]) => searchable(data.tokens[token])).join("\n"),
      contexts: contexts.map(([whole]) => whole).join("\n"),
      fires: contexts.map(([, fires]) => fires).join("\n"),
    };
  });
}

const ORDERS = {
  "density-down": (a, b) => b.density - a.density || a.id - b.id,
  "density-up": (a, b) => a.density - b.density || a.id - b.id,
  "max-down": (a, b) => b.max - a.max || a.id - b.id,
  "max-up": (a, b) => a.max - b.max || a.id - b.id,
  "id-up": (a, b) => a.id - b.id,
};

class LatentBrowser {
  // `navigate(id, kind)` is told of every choice: "open" makes a step in the history, "move" joins the last one.
  constructor(panel, key, navigate) {
    this.panel = panel;
    this.key = key;
    this.navigate = navigate;
    this.data = unpack(panel.querySelector("script.data").textContent);
    this.data.latents.forEach((latent, position) => (latent.position = position));
    this.byId = new Map(this.data.latents.map((latent) => [latent.id, latent]));
    this.texts = null;
    this.bins = null;
    this.shown = [];
    this.current = null;
    for (const name of ["query", "scope", "sort", "clear", "count", "reader", "list", "detail", "latent"]) {
      this[name] = panel.querySelector(`.browser .${name}`);
    }
    this.name = panel.querySelector(".latent-name");
    this.space = html("div", { class: "space", role: "presentation" });
    this.list.append(this.space);
    this.drawCharts();
    this.listen();
    this.refresh();
    window.requestIdleCallback?.(() => this.index());
  }

  drawCharts() {
    const curves = Object.entries(this.data.curves);
    this.panel
      .querySelector(".curves")
      .replaceChildren(...curves.map(([name, points]) => lineChart(name, points)));
    const browsable = new Map();
    for (const { bin } of this.data.latents) browsable.set(bin, (browsable.get(bin) ?? 0) + 1);
    this.histogram = new Histogram(
      this.panel.querySelector(".histogram"),
      this.data.histogram,
      browsable,
      (bins) => this.filter(bins),
    );
  }

  listen() {
    let timer = 0;
    this.query.addEventListener("input", () => {
      clearTimeout(timer);
      timer = setTimeout(() => this.refresh(), 120);
    });
    this.scope.addEventListener("change", () => this.refresh());
    this.sort.addEventListener("change", () => this.refresh());
    this.clear.addEventListener("click", () => this.clearFilters());
    this.list.addEventListener("scroll", () => this.drawRows(), { passive: true });
    this.list.addEventListener("click", (event) => {
      const row = event.target.closest("[role=option]");
      if (row) this.choose(this.shown[Number(row.dataset.at)], "open");
    });
    this.panel.querySelector(".previous").addEventListener("click", () => this.move(-1));
    this.panel.querySelector(".next").addEventListener("click", () => this.move(1));
    this.latent.addEventListener("pointerover", (event) => this.read(event.target));
    this.latent.addEventListener("click", (event) => this.read(event.target));
    new ResizeObserver(() => this.drawRows()).observe(this.list);
  }

  index() {
    this.texts ??= index(this.data);
    return this.texts;
  }

  filter(bins) {
    this.bins = bins;
    this.histogram.show(bins);
    this.refresh();
  }

  clearFilters() {
    this.query.value = "";
    this.scope.value = "all";
    this.filter(null);
    this.list.focus({ preventScroll: true });
  }

  get filtered() {
    return this.query.value.trim() !== "" || this.bins !== null;
  }

  matcher() {
    const wanted = searchable(this.query.value.trim());
    if (wanted === "") return () => true;
    const texts = this.index();
    const scopes = this.scope.value === "all" ? ["promoted", "contexts"] : [this.scope.value];
    const id = this.scope.value === "all" ? wanted.match(/^(#?)(\d+)$/) : null;
    const isId = (latent) => id && (id[1] ? String(latent.id) === id[2] : String(latent.id).startsWith(id[2]));
    return (latent) => isId(latent) || scopes.some((scope) => texts[latent.position][scope].includes(wanted));
  }

  refresh() {
    const matches = this.matcher();
    const [first, last] = this.bins ?? [DEAD, Infinity];
    this.shown = this.data.latents
      .filter((latent) => first <= latent.bin && latent.bin <= last && matches(latent))
      .sort(ORDERS[this.sort.value]);
    const within = this.bins ? `, ${this.histogram.range(...this.bins)}` : "";
    const all = thousands(this.data.latents.length);
    this.count.textContent = this.filtered ? `${thousands(this.shown.length)} of ${all} latents${within}` : `${all} latents`;
    this.clear.hidden = !this.filtered;
    this.space.style.height = `${ROW * this.shown.length}px`;
    this.list.classList.toggle("empty", this.shown.length === 0);
    this.list.scrollTop = 0;
    this.drawRows();
  }

  drawRows() {
    const first = Math.max(0, Math.floor(this.list.scrollTop / ROW) - 4);
    const last = Math.min(this.shown.length, Math.ceil((this.list.scrollTop + this.list.clientHeight) / ROW) + 4);
    const rows = [];
    for (let at = first; at < last; at += 1) rows.push(this.row(this.shown[at], at));
    this.space.replaceChildren(...rows);
    const active = rows.find((row) => row.getAttribute("aria-selected") === "true");
    if (active) this.list.setAttribute("aria-activedescendant", active.id);
    else this.list.removeAttribute("aria-activedescendant");
  }

  row(latent, at) {
    const promoted = latent.promoted.slice(0, 5).map(([token]) => alone(this.data.tokens[token]));
    const row = html(
      "div",
      {
        role: "option",
        id: `${this.key}-option-${latent.id}`,
        "aria-selected": latent === this.current,
        "aria-setsize": this.shown.length,
        "aria-posinset": at + 1,
        "data-at": at,
      },
      html(
        "div",
        { class: "row-head" },
        html("b", {}, `#${latent.id}`),
        " ",
        html("bdi", { class: "row-peak" }, this.peakText(latent)),
        " ",
        html("span", { class: "row-number" }, this.sortedBy(latent)),
      ),
      html("div", { class: "row-tokens" }, ...(this.excerpt(latent) ?? [html("bdi", {}, promoted.join(" "))])),
    );
    row.style.top = `${ROW * at}px`;
    return row;
  }

  sortedBy(latent) {
    if (this.sort.value.startsWith("max")) return `max ${number(latent.max)}`;
    return latent.density === 0 ? "dead" : number(latent.density, 2);
  }

  peakText(latent) {
    const [context] = latent.contexts;
    if (!context || context.start === context.end) return "";
    return alone(this.data.tokens[this.data.contextTokens[peakOf(this.data, context)]]);
  }

  // While a search is on, the words around its first hit say why a latent is listed.
  excerpt(latent) {
    const wanted = searchable(this.query.value.trim());
    if (wanted === "") return null;
    const scopes = this.scope.value === "all" ? ["promoted", "contexts"] : [this.scope.value];
    for (const scope of scopes) {
      const text = this.index()[latent.position][scope];
      const at = text.indexOf(wanted);
      if (at < 0) continue;
      const from = Math.max(text.lastIndexOf("\n", at) + 1, at - 24);
      const line = text.indexOf("\n", at);
      const after = text.slice(at + wanted.length, Math.min(line < 0 ? text.length : line, at + wanted.length + 60));
      return [html("bdi", {}, shaped(text.slice(from, at)), html("mark", {}, shaped(wanted)), shaped(after))];
    }
    return null;
  }

  choose(latent, kind) {
    if (!latent) return;
    this.show(latent);
    this.navigate(latent.id, kind);
    if (kind === "open" && STACKED.matches) this.bringIntoView();
  }

  bringIntoView() {
    (STACKED.matches ? this.detail : this.reader).scrollIntoView();
  }

  move(step) {
    const at = this.shown.indexOf(this.current);
    const next = at < 0 ? (step > 0 ? 0 : this.shown.length - 1) : at + step;
    this.choose(this.shown[Math.min(this.shown.length - 1, Math.max(0, next))], "move");
  }

  open() {
    if (!this.current) return;
    this.navigate(this.current.id, "open");
    this.name.focus();
  }

  leave() {
    if (document.activeElement === this.list && this.filtered) this.clearFilters();
    this.list.focus({ preventScroll: true });
    this.list.scrollIntoView({ block: "nearest" });
  }

  get reading() {
    return this.detail.contains(document.activeElement);
  }

  // Shows a latent by id (a link, the history); one that is not browsable is said so.
  showId(id) {
    const latent = this.byId.get(id);
    if (latent) {
      this.show(latent);
      return;
    }
    this.current = null;
    this.drawRows();
    this.name.textContent = `Latent ${id}`;
    this.latent.replaceChildren(html("p", { class: "notice" }, "This latent is not among those in this file."));
  }

  showFirst() {
    if (!this.current && this.shown.length > 0) this.show(this.shown[0]);
  }

  show(latent) {
    this.current = latent;
    const at = this.shown.indexOf(latent);
    if (at >= 0) {
      const [top, height] = [ROW * at, this.list.clientHeight];
      if (top < this.list.scrollTop) this.list.scrollTop = top;
      else if (top + ROW > this.list.scrollTop + height) this.list.scrollTop = top + ROW - height;
    }
    this.drawRows();
    this.histogram.mark(latent.bin);
    this.name.textContent = `Latent ${latent.id}`;
    this.latent.replaceChildren(...this.panelOf(latent));
  }

  panelOf(latent) {
    const fact = (name, value) => html("div", {}, html("dt", {}, name), html("dd", {}, value));
    return [
      html(
        "dl",
        { class: "latent-facts" },
        fact("density", `${number(latent.density)} (${densityText(latent.density)})`),
        fact("largest activation", number(latent.max, 4)),
      ),
      html(
        "div",
        { class: "directions" },
        this.tokenTable("Promotes", "highest logits of its direction", latent.promoted),
        this.tokenTable("Suppresses", "lowest logits of its direction", latent.suppressed),
      ),
      html("h5", {}, "Where it fires most"),
      latent.contexts.length === 0
        ? html("p", { class: "notice" }, "No context: it did not fire on the text that was read.")
        : html("ol", { class: "contexts" }, ...latent.contexts.map((context) => this.contextOf(context, latent.max))),
    ];
  }

  tokenTable(name, explanation, pairs) {
    const largest = Math.max(...pairs.map(([, logit]) => Math.abs(logit)), 1e-9);
    const rows = pairs.map(([token, logit]) => {
      const row = html(
        "tr",
        {},
        html("th", { scope: "row" }, html("bdi", {}, alone(this.data.tokens[token]))),
        html("td", { class: "number" }, number(logit)),
      );
      row.style.setProperty("--share", percent(Math.abs(logit) / largest));
      return row;
    });
    const caption = html("caption", {}, html("b", {}, name), " ", html("span", { class: "role" }, explanation));
    return html("table", { class: "tokens" }, caption, html("tbody", {}, ...rows));
  }

  contextOf(context, max) {
    const peak = peakOf(this.data, context);
    const line = html("p", { class: "context", dir: "auto" });
    for (let i = context.start; i < context.end; i += 1) {
      const token = this.data.tokens[this.data.contextTokens[i]];
      const level = this.data.contextActivations[i];
      // The space before a word stays outside its colour, and is left out where the line begins.
      const [, space, text] = visible(token).match(/^( ?)(.*)$/su);
      if (i > context.start) line.append(space);
      if (level === 0) {
        line.append(text);
        continue;
      }
      const value = i === peak ? number(context.peak, 4) : `≈ ${number((max * level) / 255, 2)}`;
      const mark = html("mark", { title: value, "data-token": alone(token) }, text);
      mark.style.setProperty("--level", (level / 255).toFixed(3));
      if (i === peak) mark.classList.add("peak");
      line.append(mark);
    }
    const readout = html("output", { class: "readout" });
    const item = html("li", {}, line, readout);
    this.read(line.querySelector(".peak"), item);
    return item;
  }

  // The token under the pointer, and at first the peak, with its value.
  read(target, item = target.closest?.("li")) {
    if (!item || target?.tagName !== "MARK") return;
    const what = target.classList.contains("peak") ? "peak" : "fires";
    item
      .querySelector("output")
      .replaceChildren(`${what} ${target.title} on `, html("bdi", { class: "token" }, target.dataset.token));
  }
}
