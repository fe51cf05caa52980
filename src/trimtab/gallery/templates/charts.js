// Two small charts that follow the page's theme. Positions across are percentages, so they fit any width.

// [low, high] widened a little, and two to five round ticks inside.
function scale(values) {
  let low = Math.min(...values);
  let high = Math.max(...values);
  const margin = 0.05 * (high - low) || 0.5 * Math.abs(high) || 0.5;
  low -= margin;
  high += margin;
  const rough = (high - low) / 4;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => power * factor >= rough);
  const ticks = [];
  for (let i = Math.ceil(low / step); i * step <= high; i += 1) ticks.push(i * step);
  return { low, high, ticks, share: (value) => (value - low) / (high - low) };
}

const compact = (value) =>
  value >= 1e6 ? `${number(value / 1e6)} M` : value >= 1e3 ? `${number(value / 1e3)} k` : number(value);

// One named curve over tokens; the value under the pointer, else the last one, stands in its caption.
function lineChart(name, points) {
  const known = points.filter(([, y]) => y !== null);
  const readout = html("output", { class: "readout" });
  const caption = html("figcaption", {}, html("b", {}, name.replaceAll("_", " ")), " ", readout);
  if (known.length === 0) {
    readout.append("no finite value");
    return html("figure", { class: "curve" }, caption);
  }
  const last = known.at(-1);
  const say = ([x, y]) => (readout.textContent = `${number(y, 4)} at ${compact(x)} tokens`);
  say(last);

  const xs = known.map(([x]) => x);
  const [start, end] = [Math.min(...xs), Math.max(...xs)];
  const across = (x) => (end === start ? 0.5 : (x - start) / (end - start));
  const y = scale(known.map(([, value]) => value));
  const height = 120;
  const up = (value) => height * (1 - y.share(value));
  const path = points
    .map(([x, value], i) => {
      if (value === null) return "";
      const pen = i === 0 || points[i - 1][1] === null ? "M" : "L";
      return `${pen}${(1000 * across(x)).toFixed(1)} ${up(value).toFixed(2)}`;
    })
    .join("");
  const cursor = svg("line", { class: "cursor", y1: 0, y2: height, visibility: "hidden" });
  const picture = svg(
    "svg",
    {
      width: "100%",
      height: height + 18,
      role: "img",
      "aria-label": `${name.replaceAll("_", " ")}: from ${number(known[0][1])} at ${compact(known[0][0])} to ` +
        `${number(last[1])} at ${compact(last[0])} tokens`,
    },
    ...y.ticks.map((tick) => svg("line", { class: "grid", x1: 0, x2: "100%", y1: up(tick), y2: up(tick) })),
    svg(
      "svg",
      { width: "100%", height, viewBox: `0 0 1000 ${height}`, preserveAspectRatio: "none" },
      svg("path", { class: "line", d: path, "vector-effect": "non-scaling-stroke" }),
    ),
    ...y.ticks.map((tick) => svg("text", { x: -6, y: up(tick) + 4, "text-anchor": "end" }, number(tick))),
    svg("text", { x: 0, y: height + 14 }, compact(start)),
    svg("text", { x: "100%", y: height + 14, "text-anchor": "end" }, `${compact(end)} tokens`),
    cursor,
  );
  picture.addEventListener("pointermove", (event) => {
    const box = picture.getBoundingClientRect();
    const share = (event.clientX - box.left) / box.width;
    const near = known.reduce((a, b) => (Math.abs(across(b[0]) - share) < Math.abs(across(a[0]) - share) ? b : a));
    const at = percent(across(near[0]));
    fill(cursor, { x1: at, x2: at, visibility: "visible" }, []);
    say(near);
  });
  picture.addEventListener("pointerleave", () => {
    cursor.setAttribute("visibility", "hidden");
    say(last);
  });
  return html("figure", { class: "curve" }, caption, picture);
}

const DEAD = -1;

// Bars of log10(density) that can be chosen; the dead stand apart at the left. `choose` gets [first, last] or null.
class Histogram {
  constructor(host, { low, per_decade: perDecade, counts, dead }, browsable, choose) {
    Object.assign(this, { low, perDecade, choose, chosen: null });
    const height = 96;
    const top = 26;
    const tallest = Math.max(1, dead, ...counts);
    const left = dead > 0 ? 0.13 : 0;
    const width = (1 - left) / counts.length;
    const bar = (bin, count, x, w) => {
      const tall = count === 0 ? 0 : Math.max(2, (height * count) / tallest);
      const label = `${this.range(bin, bin)}: ${thousands(count)} latents, ${thousands(browsable.get(bin) ?? 0)} browsable`;
      return svg(
        "g",
        { class: "bar", role: "button", tabindex: -1, "aria-pressed": "false", "aria-label": label, "data-bin": bin },
        svg("title", {}, label),
        svg("rect", { class: "hit", x: percent(x), width: percent(w), y: 0, height: top + height }),
        svg("rect", {
          class: "column",
          x: percent(x + 0.06 * w),
          width: percent(0.88 * w),
          y: top + height - tall,
          height: tall,
        }),
        svg("text", { class: "tally", x: percent(x + w / 2), y: top + height - tall - 4 }, thousands(count)),
      );
    };
    this.bars = counts.map((count, bin) => bar(bin, count, left + bin * width, width)).filter((_, i) => counts[i] > 0);
    const middle = 0.03;
    const extras = [];
    if (dead > 0) {
      this.bars.unshift(bar(DEAD, dead, 0, 2 * middle));
      extras.push(svg("text", { x: percent(middle), y: top + height + 14, "text-anchor": "middle" }, "dead"));
    }
    this.at = (bin) => (bin === DEAD ? middle : left + (bin + 0.5) * width);
    for (let exponent = low; exponent <= 0; exponent += 1) {
      const x = left + (exponent - low) * perDecade * width;
      const anchor = exponent === 0 ? "end" : exponent === low && left === 0 ? "start" : "middle";
      const label = exponent === 0 ? "1" : `10${superscript(exponent)}`;
      extras.push(svg("text", { x: percent(x), y: top + height + 14, "text-anchor": anchor }, label));
    }
    this.marker = svg(
      "svg",
      { class: "marker", overflow: "visible" },
      svg("path", { d: "M-5 0h10L0 7z" }),
      svg("line", { y1: 7, y2: top + height }),
    );
    this.picture = svg(
      "svg",
      { width: "100%", height: top + height + 20, role: "group", "aria-label": "Firing densities, log scale" },
      svg("line", { class: "base", x1: 0, x2: "100%", y1: top + height + 0.5, y2: top + height + 0.5 }),
      ...extras,
      this.marker,
      ...this.bars,
    );
    this.bars[0]?.setAttribute("tabindex", 0);
    this.picture.addEventListener("click", (event) => this.pick(event.target.closest(".bar"), event.shiftKey));
    this.picture.addEventListener("keydown", (event) => this.press(event));
    host.replaceChildren(this.picture);
  }

  range(first, last) {
    if (last === DEAD) return "dead";
    const edge = (bin) => number(10 ** (this.low + bin / this.perDecade), 2);
    return `${first === DEAD ? "dead, and up to " : `density ${edge(first)} to `}${edge(last + 1)}`;
  }

  pick(bar, extend) {
    if (!bar) return;
    const bin = Number(bar.dataset.bin);
    const [first, last] = this.chosen ?? [bin, bin];
    if (extend && this.chosen) this.choose([Math.min(first, bin), Math.max(last, bin)]);
    else this.choose(this.chosen && first === bin && last === bin ? null : [bin, bin]);
  }

  press(event) {
    const index = this.bars.indexOf(event.target);
    if (event.key === "Enter" || event.key === " ") this.pick(event.target, event.shiftKey);
    else if (event.key === "ArrowLeft") this.focus(index - 1);
    else if (event.key === "ArrowRight") this.focus(index + 1);
    else return;
    event.preventDefault();
    event.stopPropagation();
  }

  focus(index) {
    const bar = this.bars[Math.min(this.bars.length - 1, Math.max(0, index))];
    for (const other of this.bars) other.setAttribute("tabindex", other === bar ? 0 : -1);
    bar.focus();
  }

  show(chosen) {
    this.chosen = chosen;
    for (const bar of this.bars) {
      const bin = Number(bar.dataset.bin);
      bar.setAttribute("aria-pressed", chosen !== null && chosen[0] <= bin && bin <= chosen[1]);
    }
    this.picture.classList.toggle("filtered", chosen !== null);
  }

  mark(bin) {
    this.marker.setAttribute("x", percent(this.at(bin)));
  }
}
