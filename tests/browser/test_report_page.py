"""The report in Chromium: what a reader can do with it, and what its text must not do to him."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from trimtab.gallery.report import DictionaryPage

pytestmark = [
    pytest.mark.browser,
    # Playwright's synchronous interface leaves its event loop and pipe to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning"),
]

INTERACTIVE = {"button", "link", "textbox", "searchbox", "combobox", "listbox", "option", "tab", "DisclosureTriangle"}

# Every visible text with the contrast (WCAG 2.2) of its colour against what is painted behind it.
CONTRASTS = """() => {
  const parse = (text) => {
    const parts = text.match(/[\\d.e-]+/g).map(Number);
    const scale = text.startsWith("color(") ? 1 : 255;
    return { rgb: parts.slice(0, 3).map((part) => part / scale), alpha: parts[3] ?? 1 };
  };
  const over = (top, below) => top.rgb.map((part, i) => part * top.alpha + below[i] * (1 - top.alpha));
  const behind = (element) => {
    const below = element.parentElement ? behind(element.parentElement) : [1, 1, 1];
    return over(parse(getComputedStyle(element).backgroundColor), below);
  };
  const luminance = (rgb) => {
    const [r, g, b] = rgb.map((part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const element = node.parentElement;
    if (!node.data.trim() || !element.checkVisibility() || element.closest("script, style, .unseen")) continue;
    const back = behind(element);
    const style = getComputedStyle(element);
    const front = over(parse(element.namespaceURI.endsWith("svg") ? style.fill : style.color), back);
    const [light, dark] = [luminance(front), luminance(back)].sort((a, b) => b - a);
    found.push({ ratio: (light + 0.05) / (dark + 0.05), text: node.data.trim().slice(0, 40) });
  }
  return found;
}"""


class Watched:
    """A fresh page whose errors and requests are kept; they are checked when it is closed."""

    def __init__(self, browser: Browser, **options: Any) -> None:
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        self.page: Page = self.context.new_page()
        self.page.set_default_timeout(10_000)
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: self.complaints.append(dialog.message))
        self.context.on("request", lambda request: self.requests.append(request.url))

    def close(self) -> None:
        self.context.close()
        assert self.complaints == []
        assert [address for address in self.requests if not address.startswith(("file:", "data:"))] == []


@pytest.fixture
def watched(chromium: Browser) -> Iterator[Watched]:
    watched = Watched(chromium)
    yield watched
    watched.close()


@pytest.fixture
def page(watched: Watched, report_url: str) -> Page:
    watched.page.goto(report_url + "#d0")
    return watched.page


def rows(page: Page) -> list[int]:
    """The ids of the first listed latents."""
    names = page.locator("#panel-d0 [role=option] b").all_inner_texts()
    return [int(name.removeprefix("#")) for name in names]


def name(page: Page) -> Any:
    return page.locator("#panel-d0 .latent-name")


def count(page: Page) -> Any:
    return page.locator("#panel-d0 [role=status]")


def ordered(page: DictionaryPage, key: str, *, descending: bool) -> list[int]:
    sign = -1 if descending else 1
    return [latent["id"] for latent in sorted(page.latents, key=lambda latent: (sign * latent[key], latent["id"]))]


def words_of(page: DictionaryPage, latent: Any) -> list[str]:
    contexts = ["".join(page.tokens[token] for token in context["tokens"]) for context in latent["contexts"]]
    return [" ".join(text.lower().split()) for text in contexts]


def test_loads_from_a_file_quickly_and_asks_for_nothing(watched: Watched, report_url: str) -> None:
    start = time.perf_counter()
    watched.page.goto(report_url + "#d0")
    expect(name(watched.page)).to_have_text("Latent " + str(rows(watched.page)[0]))
    assert time.perf_counter() - start < 6
    assert watched.requests == [report_url]


def test_methods_show_verdicts_failures_and_the_full_run(watched: Watched, report_url: str) -> None:
    watched.page.goto(report_url)
    panel = watched.page.locator("#panel-methods")
    expect(panel).to_be_visible()
    expect(panel.locator(".overview .badge")).to_have_text(["~ inconclusive", "✕ not shown", "~ inconclusive"])
    expect(panel.locator(".committed .badge")).to_have_text("✓ shown")
    expect(panel.locator(".committed .is-method .mean-value")).to_have_text("0.764")
    expect(panel.locator(".failure")).to_contain_text("NaN at step 12 <b>of 300</b>")
    expect(panel.locator(".paper").first).to_contain_text("TopK lies below ReLU")
    facts = panel.locator("details").nth(1)
    facts.locator("summary").click()
    expect(facts).to_contain_text("made-up processor, 2 cores")
    panel.get_by_text("Other figures").click()
    expect(panel.get_by_role("columnheader", name="another long figure 7")).to_be_visible()
    assert watched.page.evaluate("document.documentElement.scrollWidth") <= 1280
    panel.get_by_role("link", name="Steering vectors").click()
    expect(panel.get_by_role("heading", name="Steering vectors")).to_be_in_viewport()


def test_tabs_follow_clicks_arrows_and_links(page: Page) -> None:
    page.get_by_role("tab", name="Layer 9").click()
    expect(page.locator("#panel-d1")).to_be_visible()
    expect(page.locator("#panel-d0")).to_be_hidden()
    assert page.url.endswith("#d1")
    page.get_by_role("tab", name="Layer 9").press("ArrowRight")
    expect(page.locator("#panel-methods")).to_be_visible()
    expect(page.get_by_role("tab", name="Methods")).to_be_focused()
    page.go_back()
    expect(page.locator("#panel-d1")).to_be_visible()
    page.keyboard.press("j")
    page.locator(".skip").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#panel-d1")).to_be_visible()


def test_the_list_sorts_and_holds_few_rows(page: Page, dictionaries: list[DictionaryPage]) -> None:
    sort = page.locator("#panel-d0 .sort")
    for value, key, descending in [
        ("density-down", "density", True),
        ("density-up", "density", False),
        ("max-down", "max_activation", True),
        ("max-up", "max_activation", False),
        ("id-up", "id", False),
    ]:
        sort.select_option(value)
        expected = ordered(dictionaries[0], key, descending=descending)
        # Keys travel with four digits, so neighbours that agree in these may change places.
        assert set(rows(page)[:8]) <= set(expected[:12])
        assert rows(page)[0] in expected[:2]
    assert len(rows(page)) < 60
    page.locator("#panel-d0 .list").press("End")
    expect(name(page)).to_have_text(f"Latent {expected[-1]}")
    assert rows(page)[-1] == expected[-1]
    last = page.locator("#panel-d0 [role=option]").last
    assert last.get_attribute("aria-posinset") == last.get_attribute("aria-setsize") == "2000"
    assert last.get_attribute("id") == page.locator("#panel-d0 .list").get_attribute("aria-activedescendant")


def test_search_finds_words_phrases_ids_and_says_how_many(page: Page, dictionaries: list[DictionaryPage]) -> None:
    query, scope = page.locator("#panel-d0 .query"), page.locator("#panel-d0 .scope")
    first = dictionaries[0]

    def promotes(latent: Any, word: str) -> bool:
        return any(word in first.tokens[token].lower() for token, _ in latent["promoted"])

    anywhere = [
        latent["id"]
        for latent in first.latents
        if promotes(latent, "king") or any("king" in text for text in words_of(first, latent))
    ]
    query.fill("KING")
    expect(count(page)).to_have_text(f"{len(anywhere):,} of 2,000 latents")
    assert set(rows(page)) <= set(anywhere)
    expect(page.locator("#panel-d0 .row-tokens mark").first).to_have_text("king")

    scope.select_option("promoted")
    expect(count(page)).to_have_text(f"{sum(promotes(latent, 'king') for latent in first.latents):,} of 2,000 latents")

    phrase = " ".join(words_of(first, first.latents[40])[2].split()[3:7])
    holders = [latent["id"] for latent in first.latents if any(phrase in text for text in words_of(first, latent))]
    scope.select_option("contexts")
    query.fill(phrase.replace(" ", "  "))
    expect(count(page)).to_have_text(f"{len(holders):,} of 2,000 latents")
    assert first.latents[40]["id"] in holders

    favourite = first.tokens[first.latents[40]["contexts"][0]["tokens"][17]].strip()
    scope.select_option("fires")
    query.fill(favourite)
    expect(count(page)).not_to_have_text(f"{len(holders):,} of 2,000 latents")
    for identity in rows(page)[:5]:
        latent = next(latent for latent in first.latents if latent["id"] == identity)
        fired = [
            first.tokens[token]
            for context in latent["contexts"]
            for token, activation in zip(context["tokens"], context["activations"], strict=True)
            if activation > 0
        ]
        assert any(favourite in token for token in fired)

    page.get_by_role("button", name="Show all").click()
    expect(count(page)).to_have_text("2,000 latents")
    query.fill(f"#{first.latents[7]['id']}")
    expect(count(page)).to_have_text("1 of 2,000 latents")
    query.fill("no such words anywhere")
    expect(count(page)).to_have_text("0 of 2,000 latents")
    assert rows(page) == []


def test_search_answers_at_once_on_two_thousand_latents(page: Page) -> None:
    page.locator("#panel-d0 .query").fill("the")
    expect(count(page)).to_have_text("2,000 of 2,000 latents")
    page.evaluate("""() => {
      const query = document.querySelector("#panel-d0 .query");
      window.longest = 0;
      new PerformanceObserver((list) => {
        for (const entry of list.getEntries()) window.longest = Math.max(window.longest, entry.duration);
      }).observe({ type: "longtask" });
      query.value = "golden";
      query.dispatchEvent(new Event("input"));
    }""")
    expect(count(page)).not_to_have_text("2,000 of 2,000 latents")
    assert page.evaluate("window.longest") < 500


def test_keys(page: Page) -> None:
    listed = rows(page)
    page.keyboard.press("j")
    page.keyboard.press("j")
    expect(name(page)).to_have_text(f"Latent {listed[2]}")
    page.keyboard.press("k")
    expect(name(page)).to_have_text(f"Latent {listed[1]}")
    page.keyboard.press("ArrowDown")
    expect(name(page)).to_have_text(f"Latent {listed[2]}")
    expect(page.locator("#panel-d0 .list")).to_be_focused()
    page.keyboard.press("Enter")
    expect(name(page)).to_be_focused()
    page.keyboard.press("j")
    expect(name(page)).to_have_text(f"Latent {listed[3]}")
    expect(name(page)).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.locator("#panel-d0 .list")).to_be_focused()

    page.keyboard.press("/")
    expect(page.locator("#panel-d0 .query")).to_be_focused()
    page.keyboard.type("jk king?/")
    expect(page.locator("#panel-d0 .query")).to_have_value("jk king?/")
    expect(name(page)).to_have_text(f"Latent {listed[3]}")
    page.locator("#panel-d0 .query").fill("golden")
    page.keyboard.press("Enter")
    expect(page.locator("#panel-d0 .list")).to_be_focused()
    found = rows(page)
    assert found[0] != listed[0]
    page.keyboard.press("Home")
    expect(name(page)).to_have_text(f"Latent {found[0]}")
    page.keyboard.press("Escape")
    expect(count(page)).to_have_text("2,000 latents")

    page.keyboard.press("?")
    expect(page.get_by_role("dialog", name="Keys")).to_be_visible()
    page.keyboard.press("j")
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog", name="Keys")).to_be_hidden()
    expect(name(page)).to_have_text(f"Latent {found[0]}")


def test_links_open_a_latent_and_the_history_goes_back(
    watched: Watched, report_url: str, dictionaries: list[DictionaryPage]
) -> None:
    page = watched.page
    first, second, third = (dictionaries[0].latents[i]["id"] for i in (100, 200, 300))
    page.goto(f"{report_url}#d0/latent/{first}")
    expect(name(page)).to_have_text(f"Latent {first}")
    expect(page.locator("#panel-d0 .reader")).to_be_in_viewport()
    expect(page.locator(f"#d0-option-{first}")).to_have_attribute("aria-selected", "true")
    page.evaluate(f"location.hash = '#d0/latent/{second}'")
    expect(name(page)).to_have_text(f"Latent {second}")
    page.locator("#panel-d0 .query").fill(f"#{third}")
    page.locator(f"#d0-option-{third}").click()
    expect(name(page)).to_have_text(f"Latent {third}")
    assert page.url.endswith(f"#d0/latent/{third}")
    page.go_back()
    expect(name(page)).to_have_text(f"Latent {second}")
    page.go_back()
    expect(name(page)).to_have_text(f"Latent {first}")
    page.go_forward()
    expect(name(page)).to_have_text(f"Latent {second}")

    shown = {latent["id"] for latent in dictionaries[0].latents}
    absent = next(identity for identity in range(4096) if identity not in shown)
    page.goto(f"{report_url}#d0/latent/{absent}")
    expect(page.locator("#panel-d0 .latent")).to_contain_text("not among those in this file")


def test_a_run_of_steps_is_one_entry_in_the_history(page: Page) -> None:
    listed = rows(page)
    page.locator("#panel-d0 [role=option]").nth(1).click()
    for _ in range(3):
        page.keyboard.press("j")
    page.wait_for_url(f"**#d0/latent/{listed[4]}")
    page.keyboard.press("j")
    page.wait_for_url(f"**#d0/latent/{listed[5]}")
    page.go_back()
    expect(name(page)).to_have_text(f"Latent {listed[1]}")


def test_the_histogram_filters(page: Page, dictionaries: list[DictionaryPage]) -> None:
    densities = [latent["density"] for latent in dictionaries[0].latents]
    bars = page.locator("#panel-d0 .bar")

    def bar(exponent: int, quarter: int) -> Any:
        low = math.floor(math.log10(min(density for density in dictionaries[0].densities if density > 0)))
        return page.locator(f"#panel-d0 .bar[data-bin='{4 * (exponent - low) + quarter}']")

    def within(low: float, high: float) -> str:
        return f"{sum(10**low <= density < 10**high for density in densities):,} of 2,000 latents"

    dead = sum(density == 0 for density in dictionaries[0].densities)
    assert bars.first.get_attribute("aria-label") == f"dead: {dead} latents, 0 browsable"
    bar(-3, 0).click()
    expect(count(page)).to_contain_text(within(-3, -2.75))
    expect(bar(-3, 0)).to_have_attribute("aria-pressed", "true")
    bar(-3, 2).click(modifiers=["Shift"])
    expect(count(page)).to_contain_text(within(-3, -2.25))
    bar(-3, 2).focus()
    page.keyboard.press("ArrowLeft")
    expect(bar(-3, 1)).to_be_focused()
    page.keyboard.press("Space")
    expect(count(page)).to_contain_text(within(-2.75, -2.5))
    page.keyboard.press("Enter")
    expect(count(page)).to_have_text("2,000 latents")
    bars.first.click()
    expect(count(page)).to_contain_text("0 of 2,000 latents, dead")


def test_contexts_mark_the_peak_and_tell_each_value(page: Page, dictionaries: list[DictionaryPage]) -> None:
    latent = dictionaries[0].latents[1]
    page.evaluate(f"location.hash = '#d0/latent/{latent['id']}'")
    item = page.locator("#panel-d0 .contexts li").first
    context = latent["contexts"][0]
    peak = max(context["activations"])
    word = dictionaries[0].tokens[context["tokens"][17]].strip()
    expect(item.locator(".peak")).to_have_text(word)
    assert item.locator(".peak").get_attribute("title") == f"{peak:.4g}"
    expect(item.locator("output")).to_have_text(f"peak {peak:.4g} on ·{word}")
    assert item.locator("mark").count() == sum(activation > 0 for activation in context["activations"])
    others = [activation for activation in context["activations"] if 0 < activation < peak]
    titles = [mark.get_attribute("title") for mark in item.locator("mark:not(.peak)").all()]
    for title, activation in zip(titles, others, strict=True):
        assert float(title.removeprefix("≈ ")) == pytest.approx(activation, abs=peak / 255 + 0.06 * activation)
    item.locator("mark:not(.peak)").first.hover()
    expect(item.locator("output")).to_contain_text("fires ≈")
    assert "↵" in "".join(page.locator("#panel-d0 .context").all_inner_texts())


def test_hostile_strings_are_shown_and_never_run(page: Page, hostile_latent: int) -> None:
    page.evaluate(f"location.hash = '#d0/latent/{hostile_latent}'")
    line = page.locator("#panel-d0 .context").first
    expect(line).to_contain_text("</script><script>window.hacked = true</script>")
    expect(line).to_contain_text("<img src=x onerror='window.hacked = true'>")
    expect(line).to_contain_text("line↵break⇥tab⟨202E⟩right to left override")
    expect(line).to_contain_text("⟨0000⟩nul⟨2028⟩separator")
    expect(line).to_contain_text("🦊👩\u200d🚀שלוםمرحبا")
    expect(line).to_contain_text("···")
    page.locator("#panel-d0 .query").fill("<script>window.hacked")
    expect(count(page)).to_have_text("1 of 2,000 latents")
    expect(page.locator("#panel-d0 .row-tokens mark")).to_have_text("<script>window.hacked")
    expect(page.locator("#panel-d0 h2")).to_have_text("Layer 6 </title><script>window.hacked = true</script>")
    assert page.title() == "A report \ufffd <b>"
    assert page.evaluate("window.hacked === undefined && document.images.length === 0")
    assert page.evaluate("document.querySelectorAll('script:not([type])').length") == 2


def test_inline_handlers_and_foreign_scripts_are_forbidden(chromium: Browser, report_url: str) -> None:
    watched = Watched(chromium)
    watched.page.goto(report_url)
    watched.page.evaluate("""() => {
      const script = document.createElement("script");
      script.textContent = "window.hacked = true";
      document.body.append(script);
      const image = document.createElement("img");
      image.src = "https://example.org/x.png";
      document.body.append(image);
    }""")
    assert watched.page.evaluate("window.hacked") is None
    watched.page.wait_for_timeout(50)
    assert len([text for text in watched.complaints if "Content Security Policy" in text]) == 2
    watched.context.close()


def test_the_theme_follows_the_system_until_it_is_chosen(chromium: Browser, report_url: str) -> None:
    watched = Watched(chromium, color_scheme="dark")
    page = watched.page
    page.goto(report_url)
    background = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(background)
    page.emulate_media(color_scheme="light")
    light = page.evaluate(background)
    assert dark != light
    page.emulate_media(color_scheme="dark")
    assert page.evaluate(background) == dark
    page.get_by_role("button", name="Light theme").click()
    assert page.evaluate(background) == light
    page.reload()
    assert page.evaluate(background) == light
    page.get_by_role("button", name="Dark theme").click()
    assert page.evaluate(background) == dark
    watched.close()


def test_a_phone_never_scrolls_sideways(chromium: Browser, report_url: str, hostile_latent: int) -> None:
    watched = Watched(chromium, viewport={"width": 375, "height": 812}, has_touch=True, is_mobile=True)
    page = watched.page
    for fragment in ("#methods", "#d0", f"#d0/latent/{hostile_latent}", "#d1"):
        page.goto(report_url + fragment)
        expect(page.locator(".panel:visible")).to_have_count(1)
        page.evaluate("document.querySelectorAll('details').forEach((details) => (details.open = true))")
        assert page.evaluate("document.documentElement.scrollWidth") == 375
    panel = page.locator("#panel-d1")
    panel.locator("[role=option]").nth(2).tap()
    expect(panel.locator(".latent-name")).to_be_in_viewport()
    below = panel.locator(".detail").bounding_box()["y"] - panel.locator(".list").bounding_box()["y"]
    assert below > 100
    panel.get_by_role("button", name="Next").tap()
    assert page.evaluate("document.documentElement.scrollWidth") == 375
    watched.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("fragment", ["#methods", "#d0"])
def test_every_text_has_contrast(chromium: Browser, report_url: str, scheme: Any, fragment: str) -> None:
    watched = Watched(chromium, color_scheme=scheme)
    watched.page.goto(report_url + fragment)
    expect(watched.page.locator(".panel:visible")).to_have_count(1)
    contrasts = watched.page.evaluate(CONTRASTS)
    assert len(contrasts) > 50
    assert [found for found in contrasts if found["ratio"] < 4.5] == []
    watched.close()


@pytest.mark.parametrize("fragment", ["#methods", "#d0"])
def test_every_control_has_a_name_and_the_page_its_landmarks(watched: Watched, report_url: str, fragment: str) -> None:
    watched.page.goto(report_url + fragment)
    expect(watched.page.locator(".panel:visible")).to_have_count(1)
    nodes = watched.context.new_cdp_session(watched.page).send("Accessibility.getFullAXTree")["nodes"]
    told = [
        (node["role"]["value"], node.get("name", {}).get("value", "").strip())
        for node in nodes
        if not node["ignored"] and "role" in node
    ]
    controls = [(role, text) for role, text in told if role in INTERACTIVE]
    assert len(controls) > 5
    assert [role for role, text in controls if not text] == []
    roles = {role for role, _ in told}
    assert {"banner", "main", "navigation", "contentinfo", "tablist", "tabpanel", "heading"} <= roles
    assert [role for role, text in told if role == "image" and not text] == []
    wanted = {"#methods": {"table", "article", "complementary"}, "#d0": {"search", "listbox", "status", "region"}}
    assert wanted[fragment] <= roles


def test_focus_is_visible_and_motion_can_be_refused(chromium: Browser, report_url: str) -> None:
    watched = Watched(chromium, reduced_motion="reduce")
    page = watched.page
    page.goto(report_url + "#d0")
    for _ in range(11):  # skip link, help, theme, tab, bar, search, scope, order, list, previous, next
        page.keyboard.press("Tab")
        outlined = page.evaluate(
            "[document.activeElement, document.activeElement.querySelector('.hit')].filter((e) => e)"
            ".map((e) => getComputedStyle(e)).some((s) => s.outlineStyle === 'solid' || s.strokeWidth === '2px')"
        )
        assert outlined, page.evaluate("document.activeElement.outerHTML.slice(0, 200)")
    assert page.evaluate("document.activeElement.textContent") == "Next"
    moving = "[...document.querySelectorAll('*')].filter((e) => getComputedStyle(e).transitionDuration !== '0s').length"
    assert page.evaluate(moving) == 0
    page.emulate_media(reduced_motion="no-preference")
    assert page.evaluate(moving) > 0
    watched.close()


def test_paper_gets_every_panel_and_no_controls(page: Page) -> None:
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    page.emulate_media(media="print")
    expect(page.locator(".panel:visible")).to_have_count(3)
    expect(page.locator("#panel-d1 .context").first).to_be_visible()
    expect(page.locator("#panel-methods details dl").first).to_be_visible()
    expect(page.locator("#panel-d0 .list")).to_be_hidden()
    page.emulate_media(media="screen")
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    expect(page.locator("details[open]")).to_have_count(0)


def test_without_scripts_the_tables_stand(chromium: Browser, report_url: str) -> None:
    watched = Watched(chromium, java_script_enabled=False)
    watched.page.goto(report_url)
    expect(watched.page.locator("noscript p")).to_be_visible()
    expect(watched.page.locator("#panel-methods .overview")).to_be_visible()
    expect(watched.page.locator("#panel-d1 .metrics")).to_contain_text("0.7634")
    expect(watched.page.locator("#panel-d1 .browser")).to_be_hidden()
    watched.close()
