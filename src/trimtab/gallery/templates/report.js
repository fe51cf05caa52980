// Panels as tabs, links into them, keys, theme.

const panels = [...document.querySelectorAll("[data-panel]")];
const tabs = [...document.querySelectorAll("[role=tab]")];
const browsers = new Map();
let revealed = null; // the panel that is shown
let active = null; // its browser of latents, if it has one

function browserOf(panel) {
  const key = panel.dataset.panel;
  if (key === "methods") return null;
  if (!browsers.has(key)) {
    browsers.set(key, new LatentBrowser(panel, key, (id, kind) => remember(`#${key}/latent/${id}`, kind)));
  }
  return browsers.get(key);
}

let pending = 0;
let moving = false;

// A run of "move" steps makes one entry in the history, written when it pauses (browsers ration such writes).
function remember(hash, kind) {
  clearTimeout(pending);
  const write = () => {
    if (location.hash !== hash) history[moving ? "replaceState" : "pushState"](null, "", hash);
    moving = kind === "move";
  };
  if (kind === "move") {
    pending = setTimeout(write, 200);
    return;
  }
  moving = false;
  write();
}

function follow() {
  clearTimeout(pending);
  moving = false;
  const [, key, latent] = location.hash.match(/^#(methods|d\d+)(?:\/latent\/(\d+))?/) ?? [];
  const panel = panels.find((candidate) => candidate.dataset.panel === key) ?? revealed ?? panels[0];
  if (!panel) return;
  reveal(panel);
  if (latent !== undefined) {
    active?.showId(Number(latent));
  } else {
    active?.showFirst();
    if (key === "methods") document.getElementById(location.hash.slice(1))?.scrollIntoView();
  }
}

function reveal(panel) {
  for (const other of panels) other.hidden = other !== panel;
  for (const tab of tabs) {
    const chosen = tab.getAttribute("aria-controls") === panel.id;
    tab.setAttribute("aria-selected", chosen);
    tab.tabIndex = chosen ? 0 : -1;
    if (chosen) tab.parentElement.scrollLeft = tab.offsetLeft - tab.parentElement.offsetLeft;
  }
  revealed = panel;
  active = browserOf(panel);
  active?.drawRows();
}

for (const tab of tabs) {
  tab.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step) return;
    const next = tabs[(tabs.indexOf(tab) + step + tabs.length) % tabs.length];
    next.focus();
    next.click();
    event.preventDefault();
  });
}

window.addEventListener("hashchange", follow);
window.addEventListener("popstate", follow);

const help = document.getElementById("help");
document.getElementById("help-button").addEventListener("click", () => help.showModal());
document.getElementById("help-close").addEventListener("click", () => help.close());
help.addEventListener("click", (event) => event.target === help && help.close());

const PAGE = 10;

// What a key does in the list, and j and k everywhere but where one types.
function stepOf(key, inList) {
  if (key === "j" || (inList && key === "ArrowDown")) return 1;
  if (key === "k" || (inList && key === "ArrowUp")) return -1;
  return inList ? { PageDown: PAGE, PageUp: -PAGE, Home: -Infinity, End: Infinity }[key] : undefined;
}

// From the search one gets to the list: with what was found chosen, or with Escape as it was.
function leaveSearch(key) {
  active.refresh();
  active.leave();
  if (key !== "Escape" && !active.shown.includes(active.current)) active.move(1);
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || help.open) return;
  if (event.target.matches("input, select, textarea")) {
    if (event.target !== active?.query || !["Escape", "Enter", "ArrowDown"].includes(event.key)) return;
    leaveSearch(event.key);
    event.preventDefault();
    return;
  }
  if (event.key === "?") {
    help.showModal();
  } else if (active && event.key === "/") {
    active.query.focus();
    active.query.select();
  } else if (active && event.key === "Escape") {
    active.leave();
  } else if (active && event.key === "Enter" && event.target === active.list) {
    active.open();
  } else {
    const step = active && stepOf(event.key, event.target === active.list);
    if (!step) return;
    if (!active.reading) active.list.focus({ preventScroll: true });
    active.move(step);
  }
  event.preventDefault();
});

const themeButton = document.getElementById("theme-button");
const prefersDark = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (document.documentElement.dataset.theme ?? (prefersDark.matches ? "dark" : "light")) === "dark";
const nameTheme = () => (themeButton.textContent = isDark() ? "Light theme" : "Dark theme");

themeButton.addEventListener("click", () => {
  const theme = isDark() ? "light" : "dark";
  document.documentElement.dataset.theme = theme;
  try {
    localStorage.setItem("trimtab-theme", theme);
  } catch {
    // Storage is forbidden here: the choice holds until the page is left.
  }
  nameTheme();
});
prefersDark.addEventListener("change", nameTheme);

// On paper every panel stands, with its details open.
window.addEventListener("beforeprint", () => {
  for (const panel of panels) browserOf(panel)?.showFirst();
  for (const details of document.querySelectorAll("details:not([open])")) {
    details.open = true;
    details.dataset.printed = "";
  }
});
window.addEventListener("afterprint", () => {
  for (const details of document.querySelectorAll("details[data-printed]")) {
    details.open = false;
    delete details.dataset.printed;
  }
});

nameTheme();
follow();
if (location.hash.includes("/latent/")) active?.bringIntoView();
