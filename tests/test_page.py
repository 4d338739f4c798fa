"""The page in a real browser: a pointer on a token shades exactly what it attends to, and nothing is fetched.

Needs Chromium and the package playwright, which drives it: pip install playwright (without its own browsers).
"""

import re
import shutil
from itertools import pairwise

import pytest
import torch

from flash_entmax import entmax_attention, inspection
from flash_entmax.show import page
from flash_entmax.testing import iid_inputs, topic_inputs

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
FLAGS = [
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
WORDS = "It was the best of times, it was the worst of times;\nit was the age of wisdom."
HOSTILE = [
    "</script><script>document.title='taken'</script>", "<!--", "<b>bold</b>", "&amp;", "\u2028", "\ud83d", "é🙂",
    "\n\n",
]  # fmt: skip
CODE = 2e-5  # how far a probability in the page may be off


def record(length: int, layers: int = 3, heads: int = 4, **options) -> list[inspection.RecordedCall]:
    with inspection.record() as calls:
        for layer in range(layers):
            query, key, value = iid_inputs(1, heads, length, 16, seed=layer)
            entmax_attention(query * (1 + layer), key, value, is_causal=True, **options)
    return calls


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium here")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield running
        running.close()


class Reader:
    """A person at the page, who counts what it fetches and what it complains about."""

    def __init__(self, browser, path, **settings) -> None:
        self.context = browser.new_context(viewport={"width": 1300, "height": 800}, **settings)
        self.tab = self.context.new_page()
        self.requests, self.complaints = [], []
        self.tab.on("request", lambda request: self.requests.append(request.url))
        self.tab.on("console", lambda message: self.complaints.append(message.text))
        self.tab.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.path = path

    def open(self, fragment: str = "") -> "Reader":
        self.tab.goto("about:blank")  # another fragment alone would not load the page again
        self.tab.goto(self.path.as_uri() + fragment)
        self.wait()
        return self

    def wait(self, layer: int | None = None, head: int | None = None) -> None:
        shown = "" if layer is None else f'="{layer} {head}"'
        self.tab.wait_for_selector(f"body[data-shown{shown}]")

    def token(self, index: int):
        return self.tab.locator(f'.token[data-index="{index}"]')

    def shaded(self) -> dict[int, float]:
        """Of the tokens that look other than a token that nobody touched: their probability."""
        found = self.tab.eval_on_selector_all(
            ".token",
            """all => all.filter(t => getComputedStyle(t).backgroundColor !== "rgba(0, 0, 0, 0)"
                || t.classList.contains("key")).map(t => [+t.dataset.index, +t.dataset.probability])""",
        )
        return dict(found)

    def listed(self) -> list[tuple[int, float]]:
        found = self.tab.eval_on_selector_all(
            "#keys button", "all => all.map(b => [+b.dataset.key, +b.querySelector('output').textContent])"
        )
        return [tuple(pair) for pair in found]

    def summary(self) -> str:
        return self.tab.inner_text("#summary")

    def fragment(self) -> str:
        return self.tab.evaluate("location.hash")

    def close(self) -> None:
        self.context.close()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    tokens = re.findall(r"\s*\w+|\s*[^\w\s]", WORDS)
    calls = record(len(tokens))
    path = page.save_page(tmp_path_factory.mktemp("page") / "new" / "page.html", tokens, calls, title="Times")
    return path, tokens, calls


@pytest.fixture
def reader(browser, written):
    reader = Reader(browser, written[0])
    yield reader.open()
    reader.close()


def exact(call: inspection.RecordedCall, head: int, query: int) -> dict[int, float]:
    row = call.rows(0, head).to_dense()[query]
    return {int(key): float(row[key]) for key in row.nonzero().flatten()}


def check_shown(reader: Reader, expected: dict[int, float]) -> None:
    assert reader.shaded() == pytest.approx(expected, abs=CODE)
    listed = reader.listed()
    assert dict(listed) == pytest.approx(expected, abs=CODE + 5e-5)
    assert all(first >= second for (_, first), (_, second) in pairwise(listed))


def test_hovering_shows_exactly_what_a_token_attends_to(reader, written):
    _, tokens, calls = written
    for query in (0, 9, len(tokens) - 1):
        reader.token(query).hover()
        expected = exact(calls[0], 0, query)
        check_shown(reader, expected)
        assert reader.summary().startswith(f"attends to {len(expected)} of {query + 1} token")
        assert "asking" in reader.token(query).get_attribute("class")
        assert reader.tab.locator(".asking.token").count() == 1
    assert 1 < len(expected) < len(tokens)
    tip = reader.tab.inner_text("#tip")
    assert tip.endswith(f": {len(expected)} keys")


def test_it_opens_with_the_last_token(reader, written):
    """Chosen, not pinned: the address stays as it is, and a pointer on another token shows that one."""
    _, tokens, calls = written
    last = len(tokens) - 1
    check_shown(reader, exact(calls[0], 0, last))
    assert "asking" in reader.token(last).get_attribute("class")
    assert reader.tab.inner_text("#asking").endswith(f"at position {last}")
    assert reader.tab.inner_text("#help").startswith("Point at any token")
    assert reader.fragment() == ""
    assert not reader.tab.is_visible("#unpin")


def test_it_opens_with_the_head_that_is_asked_for(browser, tmp_path):
    """Where the address names another, with that."""
    calls = record(20)
    path = page.save_page(tmp_path / "page.html", ["a "] * 20, calls, title="", start=(2, 3))
    reader = Reader(browser, path).open()
    assert reader.tab.get_attribute("body", "data-shown") == "2 3"
    check_shown(reader, exact(calls[2], 3, 19))
    assert reader.open("#head=1").tab.get_attribute("body", "data-shown") == "2 1"
    assert reader.open("#layer=1").tab.get_attribute("body", "data-shown") == "1 0"
    reader.close()


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """A page of 30 layers of 16 heads, the calls of a module with a long name."""
    calls = record(8, 30, 16)
    for call in calls:
        call.name = f"model.language_model.layers.{call.number}.self_attention.core"
    tokens = [f"word{n} " for n in range(8)]
    return page.save_page(tmp_path_factory.mktemp("deep") / "page.html", tokens, calls, title="deep")


INSIDE = """cell => {
    const [own, box] = [cell, cell.parentElement].map(e => e.getBoundingClientRect());
    const heads = [...cell.parentElement.querySelectorAll(".top.left")].map(e => e.getBoundingClientRect())[0];
    return own.top >= heads.bottom - 2 && own.bottom <= box.bottom && own.left >= heads.right - 2
        && own.right <= box.right && own.bottom <= innerHeight;
}"""


def test_the_grid_scrolls_to_the_head_that_is_shown(browser, deep):
    """By the address and by the menu; the numbers of layers and heads stay in sight, and the page where it is."""
    reader = Reader(browser, deep).open("#layer=23&head=14&token=3")
    pressed = reader.tab.locator('#grid [aria-pressed="true"]')
    assert pressed.get_attribute("aria-label").startswith("layer 23, head 14")
    assert pressed.evaluate(INSIDE)
    for layer, head in ((29, 15), (0, 15), (0, 0), (15, 8)):
        reader.tab.select_option("#layer", str(layer))
        reader.tab.select_option("#head", str(head))
        reader.wait(layer, head)
        assert pressed.get_attribute("aria-label").startswith(f"layer {layer}, head {head}:")
        assert pressed.evaluate(INSIDE), (layer, head)
    assert reader.tab.evaluate("scrollX + scrollY") == 0
    reader.close()


@pytest.mark.parametrize("width", [1300, 390])
def test_nothing_is_cut_off(browser, deep, width):
    """The layer's name, the menus and the title, in a narrow window as well."""
    reader = Reader(browser, deep)
    reader.tab.set_viewport_size({"width": width, "height": 800})
    reader.open("#layer=23")
    assert reader.tab.inner_text("#name") == "model.language_model.layers.23.self_attention.core"
    for selector in ("#name", "#layer", "#head", "h1", "header p", ".menus"):
        fits = "e => e.scrollWidth <= e.clientWidth + 1 && e.getBoundingClientRect().right <= innerWidth"
        assert reader.tab.eval_on_selector(selector, fits), selector
    assert reader.tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    reader.close()


def test_nothing_is_fetched_and_nothing_complains(reader, written):
    reader.token(5).hover()
    reader.token(5).click()
    reader.tab.wait_for_timeout(300)
    assert [url for url in reader.requests if url != "about:blank"] == [written[0].as_uri()]
    assert reader.complaints == []
    source = written[0].read_text()
    assert "default-src 'none'" in source
    assert not re.search(r"https?://|src=|@import", source.replace("script-src", ""))


def test_layer_and_head_are_chosen_by_menu_and_by_grid(reader, written):
    _, _, calls = written
    reader.token(9).hover()
    reader.tab.select_option("#layer", "1")
    reader.wait(1, 0)
    reader.tab.select_option("#head", "3")
    reader.wait(1, 3)
    check_shown(reader, exact(calls[1], 3, 9))
    assert reader.fragment() == "#layer=1&head=3"
    cell = reader.tab.locator('#grid button[data-layer="2"][data-head="1"]')
    assert cell.inner_text() == f"{calls[2].keys_per_query[1]:.1f}"
    cell.click()
    reader.wait(2, 1)
    check_shown(reader, exact(calls[2], 1, 9))
    assert reader.tab.input_value("#layer") == "2"
    assert reader.tab.locator('#grid [aria-pressed="true"]').count() == 1


def test_a_click_pins_and_the_address_restores(reader, written, browser):
    _, _, calls = written
    reader.tab.select_option("#layer", "2")
    reader.wait(2, 0)
    reader.token(11).click()
    expected = exact(calls[2], 0, 11)
    assert reader.fragment() == "#layer=2&head=0&token=11"
    far = next(key for key in range(12) if key not in expected)
    reader.token(far).hover()
    check_shown(reader, expected)
    assert reader.tab.inner_text("#tip").endswith("exactly 0")
    near = max(expected, key=expected.get)
    if near != 11:
        reader.token(near).hover()
        assert float(reader.tab.inner_text("#tip").split()[-1]) == pytest.approx(expected[near], abs=1e-4)

    reader.open("#layer=2&head=3&token=12")
    check_shown(reader, exact(calls[2], 3, 12))
    reader.tab.evaluate("location.hash = '#layer=1&head=1&token=4'")
    reader.wait(1, 1)
    check_shown(reader, exact(calls[1], 1, 4))
    reader.tab.keyboard.press("Escape")
    assert reader.fragment() == "#layer=1&head=1"
    reader.token(2).hover()
    check_shown(reader, exact(calls[1], 1, 2))
    reader.open("#layer=7&head=99&token=-3")
    check_shown(reader, exact(calls[0], 0, len(written[1]) - 1))
    assert not reader.tab.is_visible("#unpin")
    assert reader.complaints == []


def test_a_state_space_layer_lists_what_is_left_as_other(browser, written, tmp_path):
    """Beside a layer of attention, whose words come back with it."""
    pytest.importorskip("transformers")
    from mixers import WIDTH, mixer_of

    from flash_entmax.integrations import state_space

    _, tokens, calls = written
    mixer = mixer_of("MambaMixer")
    with torch.no_grad(), inspection.record(mixer, layers=state_space.recorder(covered=0.9)) as found:
        mixer(torch.randn(1, len(tokens), WIDTH, generator=torch.Generator().manual_seed(0)))
    found[0].number = 7
    path = page.save_page(tmp_path / "page.html", tokens, [calls[0], found[0]], title="Both")
    reader = Reader(browser, path).open("#layer=7")
    expected, last = exact(found[0], 0, len(tokens) - 1), len(tokens) - 1
    check_shown(reader, expected)
    left = 1 - sum(expected.values())
    assert len(expected) < len(tokens)
    assert reader.summary() == f"90 % of its output: {len(expected)} of {len(tokens)} tokens"
    words = reader.tab.inner_text("#other").split()
    assert words[0::2] == ["other:", "in", "tokens"]
    assert float(words[1]) == pytest.approx(left, abs=2e-4)
    assert int(words[3]) == len(tokens) - len(expected)
    assert reader.tab.inner_text("#untouched") == "other, at most 10 %"
    assert reader.tab.inner_text("#amount").lower() == "share"
    reader.token(last).click()
    reader.token(next(key for key in range(last) if key not in expected)).hover()
    assert reader.tab.inner_text("#tip").endswith(": other")
    reader.tab.select_option("#layer", "0")
    reader.wait(0, 0)
    assert reader.summary().startswith("attends to ")
    assert reader.tab.locator("#other").count() == 0
    assert reader.tab.inner_text("#untouched") == "exactly zero"
    assert reader.complaints == []
    reader.close()


def test_a_listed_key_can_be_followed(reader, written):
    reader.token(12).click()
    key, _ = next(pair for pair in reader.listed() if pair[0] != 12)
    reader.tab.locator(f'#keys button[data-key="{key}"]').click()
    check_shown(reader, exact(written[2][0], 0, key))
    assert reader.fragment().endswith(f"token={key}")


def test_keyboard(reader, written):
    _, tokens, calls = written
    reader.tab.keyboard.press("Tab")
    for key in ("ArrowRight", "ArrowRight", "ArrowRight", "ArrowLeft"):
        reader.tab.keyboard.press(key)
    check_shown(reader, exact(calls[0], 0, 2))
    reader.tab.keyboard.press("Enter")
    assert reader.fragment().endswith("token=2")
    reader.tab.keyboard.press("End")
    check_shown(reader, exact(calls[0], 0, 2))
    reader.tab.keyboard.press("Escape")
    reader.tab.keyboard.press("ArrowUp")
    above = int(reader.tab.evaluate("document.activeElement.dataset.index"))
    assert 0 <= above < tokens.index("\nit")
    check_shown(reader, exact(calls[0], 0, above))
    assert tokens[above].strip() in reader.tab.text_content("#spoken")


def test_touch(browser, written):
    reader = Reader(browser, written[0], has_touch=True).open()
    reader.token(8).tap()
    check_shown(reader, exact(written[2][0], 0, 8))
    assert reader.fragment().endswith("token=8")
    reader.token(8).tap()
    assert reader.fragment() == "#layer=0&head=0"
    reader.close()


CONTRAST = """all => all.map(t => {
    const light = c => c.match(/[\\d.]+/g).slice(0, 3).map(x => x / 255)
        .map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4)
        .reduce((sum, x, i) => sum + x * [0.2126, 0.7152, 0.0722][i], 0);
    const style = getComputedStyle(t), pair = [light(style.color), light(style.backgroundColor)].sort((a, b) => b - a);
    return (pair[0] + 0.05) / (pair[1] + 0.05);
})"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(browser, written, scheme):
    """Ink on every shade, and on the cells of the grid: at least 4.5 to 1, as WCAG asks of text."""
    reader = Reader(browser, written[0], color_scheme=scheme).open("#layer=2&head=0&token=12")
    for selector in (".token.key", "#grid button", "#tip"):
        ratios = reader.tab.eval_on_selector_all(selector, CONTRAST)
        assert min(ratios) >= 4.5, selector
    grounds = reader.tab.evaluate("getComputedStyle(document.querySelector('.reading')).backgroundColor")
    red = int(re.search(r"\d+", grounds)[0])
    assert red > 200 if scheme == "light" else red < 60
    reader.close()


def test_text_is_only_text(browser, tmp_path):
    """Tokens and title that look like HTML, JSON's and JavaScript's traps, half a character."""
    title = "<i>title</i></title><script>boom()</script>{{facts}}"
    path = page.save_page(tmp_path / "page.html", HOSTILE, record(len(HOSTILE), 1, 1), title=title, note="<u>note</u>")
    reader = Reader(browser, path).open()
    assert reader.tab.title() == title
    assert reader.tab.inner_text("h1") == title
    assert reader.tab.inner_text("header p") == "<u>note</u>"
    shown = reader.tab.eval_on_selector_all(".token", "all => all.map(t => t.textContent)")
    assert shown == [token.replace("\ud83d", "?").replace("\n", "↵\n") for token in HOSTILE]
    reader.token(2).click()
    assert reader.tab.inner_text("#asking code") == "<b>bold</b>"
    assert reader.complaints == []
    reader.close()


def test_a_long_text(browser, tmp_path):
    """Of 2,000 tokens, and a token that attends to more keys than are listed."""
    with inspection.record() as calls:
        entmax_attention(*topic_inputs(1, 2, 2000, 32, 1), is_causal=True, scale=0.001)
    path = page.save_page(tmp_path / "page.html", [f"word{n} " for n in range(2000)], calls, title="long")
    reader = Reader(browser, path).open("#head=1&token=1990")
    expected = exact(calls[0], 1, 1990)
    assert reader.shaded() == pytest.approx(expected, abs=CODE)
    assert len(reader.listed()) == 500
    assert reader.tab.inner_text("#keys li:last-child") == f"and {len(expected) - 500} more"
    assert 0 < reader.tab.evaluate("document.querySelector('.asking').getBoundingClientRect().top") < 800
    reader.open()
    assert 0 < reader.tab.evaluate("document.querySelector('.asking').getBoundingClientRect().top") < 800
    reader.close()
