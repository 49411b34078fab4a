"""The page in a browser: typed into, stopped, asked again, reloaded.

Needs playwright and a Chromium (make test-browser). Screenshots go to the folder that
GPT_JAX_SCREENSHOTS names, to be looked at.
"""

import itertools
import os
import shutil
import threading
from pathlib import Path

import pytest

from gpt_jax import microscope
from tests import runs_to_evaluate, serving
from tests.serving import alone, running, wait_until

playwright = pytest.importorskip(
    "playwright.sync_api", reason="needs playwright: make test-browser"
)
CONTEXT = 2048
WIDTHS = {"desktop": (1280, 800), "phone": (390, 844)}
SCHEMES = {"desktop": "light", "phone": "dark"}


@pytest.fixture(scope="module")
def live():
    with running(serving.make_engine(CONTEXT, [2], 8)) as found:
        yield found


@pytest.fixture(scope="module")
def chromium():
    names = ("chromium", "chromium-browser", "google-chrome")
    system = next(filter(None, map(shutil.which, names)), None)
    with playwright.sync_playwright() as started:
        path = system or started.chromium.executable_path
        if not Path(path).is_file():
            pytest.skip("needs Chromium: make test-browser")
        browser = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def looked(tmp_path_factory):
    """The page of the microscope, of a small run."""
    folder = runs_to_evaluate.make(tmp_path_factory.mktemp("run") / "small")
    return microscope.page.make(microscope.look(folder, ["ab ab"], history=False))[0]


@pytest.fixture(params=WIDTHS)
def page(request, chromium, live):
    width, height = WIDTHS[request.param]
    context = chromium.new_context(
        viewport={"width": width, "height": height},
        color_scheme=SCHEMES[request.param],
    )
    found = context.new_page()
    found.set_default_timeout(20_000)
    found.problems = []
    found.on("console", lambda m: m.type == "error" and found.problems.append(m.text))
    found.on("pageerror", lambda error: found.problems.append(str(error)))
    found.goto(live.url)
    playwright.expect(found.locator("#send")).to_be_enabled()
    found.name = request.param
    yield found
    assert found.problems == []
    context.close()


def settings(page, **values):
    """Opens the settings and sets them."""
    if page.locator("#settings").is_hidden():
        page.click("#settings-toggle")
    for name, value in values.items():
        box = page.locator(f"#{name}")
        if isinstance(value, bool):
            box.set_checked(value)
        else:
            box.fill(str(value))
    if page.name == "phone":  # where they cover the page
        page.click("#settings-toggle")


def send(page, text):
    page.fill("#input", text)
    page.click("#send")


def done(page):
    playwright.expect(page.locator("#status")).to_contain_text("Done")


def answers(page):
    return page.locator(".turn.assistant > div")


def shoot(page, name):
    folder = os.environ.get("GPT_JAX_SCREENSHOTS")
    if folder:
        page.screenshot(path=f"{folder}/{name}-{page.name}.png")


def test_a_conversation_streams_and_outlives_a_reload(page, live):
    page.select_option("#model", "chatty")
    settings(page, temperature=0, max_tokens=30, system="be brief")
    send(page, "Hello")
    done(page)
    wanted = alone("be brief\nHello\n", CONTEXT, max_new=30).text
    assert answers(page).inner_text() == wanted
    shoot(page, "chat")
    page.reload()
    playwright.expect(answers(page)).to_have_text(wanted, use_inner_text=True)
    assert page.locator("#model").input_value() == "chatty"
    assert page.locator("#temperature").input_value() == "0"
    page.click("#fresh")
    assert answers(page).count() == 0
    page.reload()
    playwright.expect(page.locator("#send")).to_be_enabled()
    assert answers(page).count() == 0


def test_a_text_can_be_stopped_and_asked_for_again(page, live, monkeypatch):
    go_on, steps, step = threading.Event(), itertools.count(), live.engine._slots.step

    def held(**told):  # else the text may have ended before the click
        if next(steps) >= 20:
            go_on.wait(60)
        return step(**told)

    monkeypatch.setattr(live.engine._slots, "step", held)
    settings(page, max_tokens=2000, temperature=1)
    send(page, "Once")
    playwright.expect(page.locator("#stop")).to_be_enabled()
    page.wait_for_function("document.querySelector('.assistant > div').textContent")
    page.click("#stop")
    playwright.expect(page.locator("#status")).to_have_text("Stopped.")
    go_on.set()
    wait_until(lambda: live.engine.running == 0, 10)
    before = answers(page).inner_text()
    assert page.locator(".turn small").last.inner_text() == "stopped"
    settings(page, max_tokens=20)
    page.click("#again")
    done(page)
    assert answers(page).count() == 1 and answers(page).inner_text() != before


def test_tokens_are_coloured_and_tell_what_else_was_likely(page):
    page.select_option("#model", "chatty")
    settings(page, temperature=0, max_tokens=25, tokens=True)
    send(page, "Once upon")
    done(page)
    tokens = page.locator(".token")
    text = "".join(tokens.all_text_contents())
    assert text == answers(page).inner_text() and tokens.count() > 5
    tokens.nth(2).hover()
    tip = page.locator("#tip")
    playwright.expect(tip).to_be_visible()
    assert tip.locator("tr").count() >= 5 and tip.locator(".own").count() == 1
    assert "%" in tip.inner_text()
    shoot(page, "tokens")
    tokens.nth(2).focus()  # and without a mouse
    page.keyboard.press("ArrowRight")
    assert tokens.nth(3).evaluate("token => token === document.activeElement")
    playwright.expect(tip).to_be_visible()


def test_a_text_is_looked_at_in_a_tab_of_its_own(page, live, monkeypatch, looked):
    for served in live.models.values():
        monkeypatch.setitem(vars(served), "look", lambda prompt, against: looked)
    page.reload()
    page.click("#tab-look")
    page.fill("#look-prompt", "ab ab")
    shoot(page, "look-empty")
    page.click("#look-send")
    inside = page.frame_locator("#look-page")
    playwright.expect(inside.locator("#tokens button").first).to_be_visible()
    assert inside.locator("#tokens button").count() == 5
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    shoot(page, "look")
    page.locator("#tab-look").press("ArrowLeft")
    playwright.expect(page.locator("#input")).to_be_visible()
    assert page.locator("#look").is_hidden()


def test_an_error_of_the_server_is_told_in_its_words(page):
    settings(page, max_tokens=5)
    send(page, "x" * (CONTEXT + 1))
    playwright.expect(page.locator("#status")).to_contain_text("context")
    assert page.locator("#status").get_attribute("class") == "bad"
    page.problems.clear()  # the browser notes the status 400 as well


def test_every_control_has_a_name_and_fits_the_width(page):
    settings(page)
    if page.locator("#settings").is_hidden():
        page.click("#settings-toggle")
    shoot(page, "settings")
    controls = page.locator("button, input, select, textarea")
    for i in range(controls.count()):
        named = "e => e.labels?.[0]?.textContent.trim() || e.textContent.trim()"
        assert controls.nth(i).evaluate(named)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_what_is_written_is_never_markup(page):
    page.select_option("#model", "chatty")
    settings(page, max_tokens=1)
    send(page, "<img src=x onerror=alert(1)>")
    done(page)
    assert page.locator("#history img").count() == 0
    assert "<img" in page.locator(".turn.user > div").inner_text()
