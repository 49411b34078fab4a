"""The page in a browser: typed into, stopped, asked again, reloaded, in two tabs.

Needs playwright and a Chromium (make test-browser); see browser.py.
"""

import itertools
import json
import re
import threading

import pytest

from gpt_jax import microscope
from gpt_jax.generation import OWN, Generation
from gpt_jax.sampling import OFF
from tests import browser, runs_to_evaluate, serving
from tests.browser import expect
from tests.serving import alone, running, wait_until
from tests.test_page_markdown import MARKDOWN

CONTEXT = 2048
WIDTHS = {"desktop": (1280, 800), "phone": (390, 844)}
SCHEMES = {"desktop": "light", "phone": "dark"}
# As the makers of `chatty` say: the temperature lies between two steps of its slider.
DRAWN = Generation({**OFF, "temperature": 0.63, "top_p": 0.95}, published=True)
ALLOWED = ["clipboard-read", "clipboard-write"]


@pytest.fixture(scope="module")
def live():
    with running(serving.make_engine(CONTEXT, [2], 8), drawn=DRAWN) as found:
        yield found


@pytest.fixture(scope="module")
def chromium():
    with browser.chromium() as started:
        yield started


@pytest.fixture(scope="module")
def looked(tmp_path_factory):
    """The page of the microscope, of a small run."""
    folder = runs_to_evaluate.make(tmp_path_factory.mktemp("run") / "small")
    return microscope.page.make(microscope.look(folder, ["ab ab"], history=False))[0]


def opened(chromium, name):
    """A browser of its own, on a desk or a phone."""
    width, height = WIDTHS[name]
    return chromium.new_context(
        viewport={"width": width, "height": height},
        color_scheme=SCHEMES[name],
        has_touch=name == "phone",
        permissions=ALLOWED,
    )


def tab(context, live, name, address=""):
    """A tab with the page, whose models are known."""
    found = context.new_page()
    found.set_default_timeout(20_000)
    found.name, found.problems = name, browser.problems(found)
    found.goto(live.url + address)
    expect(found.locator("#send")).to_be_enabled()
    return found


@pytest.fixture(params=WIDTHS)
def page(request, chromium, live):
    context = opened(chromium, request.param)
    found = tab(context, live, request.param)
    yield found
    assert found.problems == []
    context.close()


@pytest.fixture
def desk(chromium, live):
    """The page where there is room; for what has nothing to do with that."""
    context = opened(chromium, "desktop")
    found = tab(context, live, "desktop")
    yield found
    assert found.problems == []
    context.close()


def panel(page, name, shown=True):
    """Opens or closes the list or the settings, which cover the page of a phone."""
    if page.locator(f"#{name}").is_hidden() == shown:
        page.click(f"#{name}-toggle")


def settings(page, **values):
    """Opens the settings and sets them."""
    panel(page, "settings")
    for name, value in values.items():
        box = page.locator(f"#{name}")
        if isinstance(value, bool):
            box.set_checked(value)
        elif name in ("theme", "beside"):
            box.select_option(value)
        else:
            box.fill(str(value))
    if page.name == "phone":
        panel(page, "settings", shown=False)


def send(page, text):
    page.fill("#input", text)
    page.click("#send")


def done(page):
    expect(page.locator("#status")).to_contain_text("Done")


def say(page, text):
    """Sends a text and waits for the answer."""
    send(page, text)
    done(page)


def answers(page):
    return page.locator(".turn.assistant > div")


def shoot(page, name):
    browser.shoot(page, f"{name}-{page.name}")


def kept(page):
    """Returns the conversations that the browser keeps, each with its turns by time."""
    found = page.evaluate(
        """async () => {
          const store = await import("/store.js");
          return Promise.all((await store.all()).map((one) => store.get(one.id)));
        }"""
    )
    for one in found:
        one["turns"].sort(key=lambda turn: turn["made"])
    return found


def texts(page):
    """Returns (role, text) of every turn that is kept, by time."""
    return [(turn["role"], turn["text"]) for one in kept(page) for turn in one["turns"]]


def titles(page):
    panel(page, "list")
    return page.locator("#conversations .open")


def violations(page):
    """Returns what axe-core has against the page, by all its rules."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    found = axe.run(page, options={"iframes": False}).response["violations"]
    return [
        (one["id"], node["html"], node["failureSummary"])
        for one in found
        for node in one["nodes"]
    ]


# ---------------------------------------------------------------- one conversation


def test_a_conversation_streams_and_outlives_a_reload(page, live):
    page.select_option("#model", "chatty")
    settings(page, temperature=0, max_tokens=30, system="be brief")
    say(page, "Hello")
    wanted = alone("be brief\nHello\n", CONTEXT, max_new=30).text
    assert texts(page) == [("user", "Hello"), ("assistant", wanted)]
    shown = answers(page).inner_text()
    assert shown and page.locator(".turn small").last.inner_text().startswith("cut")
    shoot(page, "chat")
    page.reload()
    expect(answers(page)).to_have_text(shown, use_inner_text=True)
    assert page.locator("#model").input_value() == "chatty"
    assert page.locator("#temperature").input_value() == "0"
    page.click("#fresh")
    assert answers(page).count() == 0
    page.reload()
    expect(page.locator("#send")).to_be_enabled()
    assert answers(page).count() == 0
    page.go_back()
    expect(answers(page)).to_have_text(shown, use_inner_text=True)


def test_a_text_of_a_base_model_is_shown_as_it_is_and_goes_on(desk):
    settings(desk, temperature=0, max_tokens=20)
    say(desk, "Once **upon**")
    first = alone("Once **upon**", CONTEXT, max_new=20).text
    assert answers(desk).inner_text() == first
    assert desk.locator(".turn.user > div").inner_text() == "Once **upon**"
    desk.click("#send")  # nothing is added: the text goes on
    expect(answers(desk)).to_have_count(2)
    done(desk)
    again = alone("Once **upon**" + first, CONTEXT, max_new=20).text
    assert answers(desk).last.inner_text() == again
    font = "e => getComputedStyle(e).fontFamily"
    assert "mono" in answers(desk).first.evaluate(font)


def test_a_text_can_be_stopped_and_asked_for_again(page, live, monkeypatch):
    go_on, steps, step = threading.Event(), itertools.count(), live.engine._slots.step

    def held(**told):  # else the text may have ended before the click
        if next(steps) >= 20:
            go_on.wait(60)
        return step(**told)

    monkeypatch.setattr(live.engine._slots, "step", held)
    settings(page, max_tokens=2000, temperature=1)
    send(page, "Once")
    expect(page.locator("#stop")).to_be_enabled()
    expect(page.locator(".assistant > div").first).not_to_be_empty()
    page.click("#stop")
    expect(page.locator("#status")).to_have_text("Stopped.")
    go_on.set()
    wait_until(lambda: live.engine.running == 0, 10)
    before = answers(page).inner_text()
    assert page.locator(".turn small").last.inner_text() == "stopped"
    settings(page, max_tokens=20)
    page.click(".again")
    done(page)
    assert answers(page).count() == 1 and answers(page).inner_text() != before
    assert page.locator(".count").inner_text() == "2/2"
    page.click(".back")
    assert answers(page).inner_text() == before


def test_what_is_told_of_an_answer_is_what_the_server_counted(desk):
    settings(desk, temperature=0, max_tokens=40)
    say(desk, "Once")
    note = desk.locator(".turn.assistant small").inner_text()
    found = re.search(r"40 tokens, ([\d.]+) tokens/s, the first after (\d+) ms", note)
    assert found and float(found[1]) > 0


def test_an_example_is_asked_with_one_click(page):
    page.select_option("#model", "chatty")
    settings(page, max_tokens=2)
    expect(page.locator("#examples button")).to_have_count(3)
    shoot(page, "empty")
    text = page.locator("#examples button").first.inner_text()
    page.click("#examples button >> nth=0")
    done(page)
    assert page.locator(".turn.user > div").inner_text() == text
    assert page.locator("#welcome").is_hidden()


def test_an_error_of_the_server_leaves_the_message_to_be_mended(page):
    settings(page, max_tokens=5)
    send(page, "x" * (CONTEXT + 1))
    expect(page.locator("#status")).to_contain_text("context")
    assert page.locator("#status").get_attribute("class") == "bad"
    editor = page.locator(".turn.user textarea")
    assert editor.input_value() == "x" * (CONTEXT + 1)
    expect(editor).to_be_focused()
    shoot(page, "error")
    page.problems.clear()  # the browser notes the status 400 as well
    editor.fill("short")
    page.click(".edit .first")
    done(page)
    assert [role for role, _ in texts(page)] == ["user", "assistant"]
    assert page.locator(".turn.user > div").inner_text() == "short"


# ---------------------------------------------------------------- branches


def test_an_edit_is_a_branch_and_what_was_there_stays(page):
    page.select_option("#model", "chatty")
    settings(page, temperature=0, max_tokens=8)
    say(page, "first")
    say(page, "second")
    page.click(".turn.user >> nth=0 >> .change")
    page.locator(".turn.user textarea").fill("other")
    page.locator(".turn.user textarea").press("Control+Enter")
    expect(answers(page)).to_have_count(1)
    done(page)
    mine = page.locator(".turn.user > div")
    assert mine.all_inner_texts() == ["other"]
    assert texts(page)[-1][1] == alone("other\n", CONTEXT, max_new=8).text
    shoot(page, "branch")
    page.click(".turn.user .back")
    assert mine.all_inner_texts() == ["first", "second"]
    page.reload()  # and the branch that is seen
    expect(mine).to_have_text(["first", "second"])
    page.click(".turn.user .on")
    assert mine.all_inner_texts() == ["other"]
    assert len(texts(page)) == 6


def test_an_answer_that_was_edited_is_what_the_model_then_sees(desk):
    settings(desk, temperature=0, max_tokens=8)
    say(desk, "Once")
    desk.click(".turn.assistant .change")
    desk.locator(".turn textarea").fill(" upon a time")
    desk.click(".edit .first")
    assert answers(desk).inner_text() == " upon a time"
    desk.click("#send")
    expect(answers(desk)).to_have_count(2)
    done(desk)
    wanted = alone("Once upon a time", CONTEXT, max_new=8).text
    assert answers(desk).last.inner_text() == wanted


def test_escape_leaves_a_message_as_it_was(desk):
    settings(desk, max_tokens=2)
    say(desk, "as it was")
    desk.click(".turn.user .change")
    desk.locator(".turn.user textarea").fill("changed")
    desk.keyboard.press("Escape")
    assert desk.locator(".turn.user > div").inner_text() == "as it was"
    expect(desk.locator(".turn.user .change")).to_be_focused()


def test_copy_copies_the_text_as_the_model_wrote_it(desk):
    desk.select_option("#model", "chatty")
    settings(desk, temperature=0, max_tokens=30)
    say(desk, "Hello")
    desk.locator(".turn.assistant").get_by_role("button", name="Copy").click()
    expect(desk.locator("body")).to_contain_text("Copied")
    wanted = texts(desk)[-1][1].replace("\r\n", "\n")
    assert desk.evaluate("navigator.clipboard.readText()") == wanted


# ---------------------------------------------------------------- the list


def test_conversations_are_renamed_deleted_and_brought_back(page):
    settings(page, max_tokens=2)
    say(page, "about cats")
    page.click("#fresh")
    say(page, "about dogs")
    expect(titles(page)).to_have_text(["about dogs", "about cats"])
    shoot(page, "list")
    page.get_by_role("button", name="Rename about cats").click()
    page.get_by_label("New name").fill("Felines")
    page.get_by_label("New name").press("Enter")
    expect(titles(page)).to_have_text(["about dogs", "Felines"])
    before = kept(page)
    page.get_by_role("button", name="Delete about dogs").click()
    expect(titles(page)).to_have_text(["Felines"])
    assert len(kept(page)) == 1 and answers(page).count() == 0
    page.get_by_role("button", name="Undo").click()
    expect(titles(page)).to_have_text(["about dogs", "Felines"])
    assert kept(page) == before
    expect(page.locator(".turn.user > div")).to_have_text("about dogs")


def test_a_search_finds_titles_and_what_was_said(page):
    settings(page, max_tokens=2)
    for text in ("about cats", "about dogs"):
        page.click("#fresh")
        say(page, text)
    say(page, " and a Zebra")
    panel(page, "list")
    page.fill("#search", "zebra")
    expect(titles(page)).to_have_text(["about dogs"])
    page.fill("#search", "CATS")
    expect(titles(page)).to_have_text(["about cats"])
    titles(page).click()
    expect(page.locator(".turn.user > div")).to_have_text(["about cats"])
    panel(page, "list")
    page.fill("#search", "nowhere")
    expect(page.locator("#found")).to_have_text("0 found")


def test_what_is_exported_is_imported_beside_what_is_there(desk, tmp_path):
    settings(desk, temperature=0, max_tokens=4, tokens=True)
    say(desk, "Once")
    expect(desk.locator(".turn.user .token")).to_have_count(4)
    desk.click(".again")
    expect(desk.locator(".count").last).to_have_text("2/2")
    done(desk)
    with desk.expect_download() as saved:
        desk.click("#export")
    path = tmp_path / saved.value.suggested_filename
    saved.value.save_as(path)
    desk.set_input_files("#import", path)
    expect(titles(desk)).to_have_text(["Once", "Once"])
    old, new = kept(desk)
    ids = {turn["id"]: i for i, turn in enumerate(old["turns"])}
    others = {turn["id"]: i for i, turn in enumerate(new["turns"])}
    assert ids.keys().isdisjoint(others.keys()) and len(ids) == 3
    for mine, its in zip(old["turns"], new["turns"], strict=True):
        assert ids.get(mine["parent"]) == others.get(its["parent"])
        same = mine.keys() - {"id", "conversation", "parent"}
        assert {key: mine[key] for key in same} == {key: its[key] for key in same}
    expect(answers(desk)).to_have_text(old["turns"][-1]["text"], use_inner_text=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda one: one.update(title=3), "no title"),
        (lambda one: one["turns"][0].update(role="system"), "turn 1: its role"),
        (lambda one: one["turns"][0].update(parent="x"), "turn 1: its parent"),
        (lambda one: one["turns"][0].update(tokens=[[1]]), "turn 1: its tokens"),
        (None, "not one that Export wrote"),
    ],
)
def test_a_wrong_file_is_refused_in_a_sentence_and_changes_nothing(
    chromium, live, tmp_path, change, words
):
    context = opened(chromium, "desktop")
    found = tab(context, live, "desktop")
    turn = {"id": "a", "parent": None, "column": 0, "role": "user", "text": "x"}
    turn |= {"model": "m", "note": "", "made": 1, "tokens": None}
    one = {"title": "t", "models": ["m"], "created": 1, "changed": 1, "turns": [turn]}
    file = {"format": "gpt_jax conversations 1", "conversations": [one, one]}
    if change:
        change(one)
    else:
        file["format"] = "something else"
    (tmp_path / "wrong.json").write_text(json.dumps(file))
    found.set_input_files("#import", tmp_path / "wrong.json")
    expect(found.locator("#status")).to_contain_text(words)
    assert kept(found) == [] and found.problems == []
    context.close()


def test_tabs_do_not_overwrite_each_other(desk, live):
    settings(desk, temperature=0, max_tokens=4)
    say(desk, "both")
    other = tab(desk.context, live, "desktop", desk.url.removeprefix(live.url))
    expect(answers(other)).to_have_count(1)
    other.fill("#input", " one")
    desk.fill("#input", " two")
    other.press("#input", "Control+Enter")
    desk.press("#input", "Control+Enter")
    for each in (other, desk):
        done(each)
        expect(each.locator("#columns.busy")).to_have_count(0)
    mine = [text for role, text in texts(desk) if role == "user"]
    assert sorted(mine) == [" one", " two", "both"] and len(texts(desk)) == 6
    settings(other, top_k=7)
    settings(desk, min_p=0.25)
    desk.reload()
    expect(desk.locator("#top_k")).to_have_value("7")
    expect(desk.locator("#min_p")).to_have_value("0.25")
    desk.get_by_role("button", name="Delete both").click()
    expect(answers(other)).to_have_count(0)
    expect(titles(other)).to_have_count(0)
    assert other.problems == []


def test_two_tabs_that_write_at_once_lose_nothing(desk, live):
    settings(desk, max_tokens=2)
    say(desk, "both")
    other = tab(desk.context, live, "desktop")
    add = """async (mark) => {
      const store = await import("/store.js");
      const [{ id }] = await store.all();
      window.added = Promise.all(Array.from({ length: 50 }, (_, i) => store.change(
        id, (old) => ({ count: (old.count || 0) + 1 }),
        { id: `${mark}${i}`, conversation: id, column: 1, parent: null, made: i })));
    }"""
    for mark, each in (("a", desk), ("b", other)):
        each.evaluate(add, mark)
    for each in (desk, other):
        each.evaluate("window.added.then(() => 0)")
    (one,) = kept(desk)
    assert one["conversation"]["count"] == 100 and len(one["turns"]) == 102
    assert other.problems == []


def test_what_the_first_version_remembered_is_in_the_list(desk):
    desk.evaluate(
        """() => localStorage.setItem("gpt_jax", JSON.stringify({
          model: "tiny", settings: {top_k: 3},
          histories: {chatty: [{role: "user", text: "of old", tokens: [], note: ""},
                               {role: "assistant", text: "yes", tokens: [], note: ""}],
                      tiny: []}}))"""
    )
    desk.reload()
    expect(titles(desk)).to_have_text(["of old"])
    titles(desk).click()
    expect(answers(desk)).to_have_text("yes")
    assert desk.locator("#model").input_value() == "chatty"
    assert desk.locator("#top_k").input_value() == "3"
    desk.reload()
    expect(titles(desk)).to_have_count(1)


def test_a_browser_that_keeps_nothing_still_talks(chromium, live):
    context = opened(chromium, "desktop")
    context.add_init_script("Object.defineProperty(window, 'indexedDB', {value: null})")
    found = tab(context, live, "desktop")
    settings(found, temperature=0, max_tokens=4)
    for i, text in enumerate(("Once", " more")):
        send(found, text)
        expect(found.locator(".assistant small").nth(i)).to_contain_text("4 tokens")
        expect(found.locator("#status")).to_contain_text("Not kept in this browser")
    expect(found.locator("#found")).to_contain_text("keeps no conversations")
    assert found.problems == []
    context.close()


def test_a_key_is_not_written_down(desk):
    settings(desk, key="secret", top_k=7)
    expect(desk.locator("#send")).to_be_enabled()
    written = desk.evaluate("JSON.stringify(localStorage)")
    assert "top_k" in written and "secret" not in written


# ---------------------------------------------------------------- tokens


def test_tokens_are_coloured_and_tell_what_else_was_likely(page):
    page.select_option("#model", "chatty")
    settings(page, temperature=0, max_tokens=25, tokens=True)
    say(page, "Once upon")
    tokens = page.locator(".turn.assistant .token")
    text = "".join(tokens.all_text_contents())
    assert text == texts(page)[-1][1] and tokens.count() > 5
    mine = page.locator(".turn.user .token")  # and those of the message
    expect(mine).to_have_text([*"Once upon"], use_inner_text=False)
    assert page.locator("#legend .token").count() == 5
    tip = page.locator("#tip")
    if page.name == "phone":
        tokens.nth(2).tap()
    else:
        tokens.nth(2).hover()
    expect(tip).to_be_visible()
    assert tip.locator("tr").count() >= 5 and tip.locator(".own").count() == 1
    assert "%" in tip.inner_text()
    shoot(page, "tokens")
    if page.name == "phone":
        page.locator("#status").tap()
        expect(tip).to_be_hidden()
        tokens.nth(2).dispatch_event("click")  # all that some phones make of a tap
        expect(tip).to_be_visible()
        page.locator("#status").tap()
    tokens.nth(2).focus()  # and without a mouse
    page.keyboard.press("ArrowRight")
    assert tokens.nth(3).evaluate("token => token === document.activeElement")
    expect(tip).to_be_visible()


def test_a_line_is_thicker_under_a_token_the_less_likely_it_was(desk):
    found = desk.evaluate(
        """async () => {
          const { coloured } = await import("/tokens.js");
          return [0.999, 0.5, 0.2, 0.06, 0.001].map((chance) =>
            coloured(["x", Math.log(chance), []]).style.borderBottomWidth);
        }"""
    )
    assert found == ["0px", "1px", "2px", "3px", "4px"]


def test_the_probabilities_of_a_prompt_are_those_of_an_echo(desk, live):
    settings(desk, temperature=0, max_tokens=2, tokens=True)
    say(desk, "Once upon")
    expect(desk.locator(".turn.user .token")).to_have_count(9)
    body = {"model": "tiny", "prompt": "Once upon", "max_tokens": 0, "echo": True}
    _, answer, _ = live.ask("/v1/completions", {**body, "logprobs": 0})
    wanted = answer["choices"][0]["logprobs"]["token_logprobs"]
    found = desk.locator(".turn.user .token").evaluate_all("a => a.map(e => e.told[1])")
    assert found[0] is None and found[1:] == pytest.approx(wanted[1:], abs=1e-4)


# ---------------------------------------------------------------- the context


def test_a_full_context_is_found_once_and_leaves_room_for_the_answer(desk):
    desk.select_option("#model", "chatty")
    settings(desk, temperature=0, max_tokens=4)
    asked = []
    desk.on("request", lambda one: asked.append(one) if one.method == "POST" else None)
    for part in "abcde":
        say(desk, part * 360)
    settings(desk, max_tokens=100)
    say(desk, "f" * 150)  # it would fit, its answer would not
    seen = [one for one in asked if one.url.endswith("/v1/chat/completions")]
    assert len(seen) == 6  # and no retries
    last = seen[-1].post_data_json["messages"]
    assert last[-1]["content"] == "f" * 150 and last[0]["role"] == "user"
    assert len(last) < 11
    size = sum(len(one["content"].encode()) + 1 for one in last)
    assert size + 100 <= CONTEXT
    oldest = 11 - len(last)
    note = desk.locator(".turn.assistant small").last.inner_text()
    assert f"no longer sees the oldest {oldest} turns" in note


def test_a_text_longer_than_the_context_goes_on_from_its_end(desk):
    settings(desk, temperature=0, max_tokens=4)
    say(desk, "a" * 1970)
    settings(desk, max_tokens=100)
    whole = "".join(text for _, text in texts(desk))
    with desk.expect_request("**/v1/completions") as asked:
        desk.click("#send")
    expect(answers(desk)).to_have_count(2)
    done(desk)
    prompt = asked.value.post_data_json["prompt"]
    assert (
        len(prompt) + 100 <= CONTEXT and bytes(prompt) == whole.encode()[-len(prompt) :]
    )
    note = desk.locator(".turn.assistant small").last.inner_text()
    assert f"the first {len(whole.encode()) - len(prompt)} tokens" in note


# ---------------------------------------------------------------- two models


def test_two_models_answer_side_by_side(page):
    settings(page, temperature=0, max_tokens=10, beside="chatty")
    say(page, "Hello")
    expect(answers(page)).to_have_count(2)
    wanted = {
        "tiny": alone("Hello", CONTEXT, max_new=10).text,
        "chatty": alone("Hello\n", CONTEXT, max_new=10).text,
    }
    (one,) = kept(page)
    found = {t["model"]: t["text"] for t in one["turns"] if t["role"] == "assistant"}
    assert found == wanted and one["conversation"]["models"] == ["tiny", "chatty"]
    shoot(page, "two")
    boxes = [page.locator(".column").nth(i).bounding_box() for i in (0, 1)]
    axis = "y" if page.name == "phone" else "x"
    assert boxes[0][axis] < boxes[1][axis]
    page.reload()
    expect(answers(page)).to_have_count(2)
    settings(page, beside="")
    expect(answers(page)).to_have_count(1)
    assert len(texts(page)) == 4  # what is not seen is kept


# ---------------------------------------------------------------- the look


def test_a_text_is_looked_at_in_a_tab_of_its_own(page, live, monkeypatch, looked):
    for served in live.models.values():
        monkeypatch.setitem(vars(served), "look", lambda prompt, against: looked)
    page.reload()
    page.click("#tab-look")
    page.fill("#look-prompt", "ab ab")
    shoot(page, "look-empty")
    page.click("#look-send")
    inside = page.frame_locator("#look-page")
    expect(inside.locator("#tokens button").first).to_be_visible()
    assert inside.locator("#tokens button").count() == 5
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert violations(page) == []
    shoot(page, "look")
    page.locator("#tab-look").press("ArrowLeft")
    expect(page.locator("#input")).to_be_visible()
    assert page.locator("#look").is_hidden()


def test_what_the_reader_has_not_set_is_as_each_model_suggests(desk):
    def asked():
        with desk.expect_request("**/completions") as found:
            say(desk, "Hello")
        return found.value.post_data_json

    def told(temperature, top_p):
        for name, wanted in (("temperature", temperature), ("top_p", top_p)):
            expect(desk.locator(f"label[for={name}] output")).to_have_text(wanted)

    settings(desk, max_tokens=2)
    told("0.8", "1")
    assert asked().items() >= OWN.settings.items()
    desk.select_option("#model", "chatty")
    told("0.63", "0.95")
    assert asked().items() >= DRAWN.settings.items()
    settings(desk, top_p=0.5)
    told("0.63", "0.5")
    assert asked().items() >= {**DRAWN.settings, "top_p": 0.5}.items()
    desk.reload()
    expect(desk.locator("#send")).to_be_enabled()
    told("0.63", "0.5")
    desk.click("#defaults")
    told("0.63", "0.95")


def test_the_theme_is_the_readers(page):
    colour = "getComputedStyle(document.body).backgroundColor"
    ground = {"light": "rgb(251, 251, 249)", "dark": "rgb(23, 24, 26)"}
    system = SCHEMES[page.name]
    assert page.evaluate(colour) == ground[system]
    for theme in ("light", "dark"):
        settings(page, theme=theme)
        assert page.evaluate(colour) == ground[theme]
    page.reload()
    expect(page.locator("#send")).to_be_enabled()
    assert page.evaluate(colour) == ground["dark"]
    settings(page, theme="")
    assert page.evaluate(colour) == ground[system]


def test_every_control_has_a_name_and_fits_the_width(page):
    panel(page, "settings")
    shoot(page, "settings")
    controls = page.locator("button, input, select, textarea")
    for i in range(controls.count()):
        named = "e => e.labels?.[0]?.textContent.trim() || e.textContent.trim()"
        assert controls.nth(i).evaluate(named)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_a_wide_table_scrolls_within_the_width_of_its_turn(page):
    page.select_option("#model", "chatty")
    settings(page, temperature=0, max_tokens=1)
    say(page, "Hello")
    row = "| somewhat " * 40 + "|\n"
    page.evaluate(
        """async (text) => (await import("/markdown.js")).render(
          document.querySelector(".turn.assistant > div"), text)""",
        row + "|:-:" * 40 + "|\n" + row,
    )
    box = page.locator(".table")
    assert box.evaluate("e => e.scrollWidth > 2 * e.clientWidth")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert box.locator("tr").last.evaluate("e => e.clientHeight") < 50  # whole words
    middle = "e => getComputedStyle(e).textAlign"
    assert box.locator("td").first.evaluate(middle) == "center"
    shoot(page, "table")


def test_axe_finds_nothing_against_any_state_of_the_page(page):
    def right(state):
        panel(page, "settings", shown=False)
        for theme in ("light", "dark"):
            page.evaluate("t => { document.documentElement.dataset.theme = t; }", theme)
            assert violations(page) == [], (state, theme)

    right("empty")
    page.select_option("#model", "chatty")
    settings(page, temperature=0, max_tokens=20, tokens=True)
    say(page, "Hello")
    expect(page.locator(".turn.user .token").first).to_be_visible()
    page.locator(".turn.assistant .token").nth(2).focus()
    right("tokens")
    settings(page, tokens=False)
    page.evaluate(
        """async (text) => (await import("/markdown.js")).render(
          document.querySelector(".turn.assistant > div"), text)""",
        MARKDOWN,
    )
    shoot(page, "markdown")
    right("markdown")
    page.click(".turn.user .change")
    right("editing")
    page.keyboard.press("Escape")
    panel(page, "list")
    page.get_by_role("button", name="Delete Hello").click()
    right("deleted")
    panel(page, "list", shown=False)
    settings(page, beside="tiny")
    say(page, "Hello")
    right("two")
    panel(page, "settings")
    assert violations(page) == []


def test_what_is_written_is_never_markup(page):
    page.select_option("#model", "chatty")
    settings(page, max_tokens=1)
    say(page, "<img src=x onerror=alert(1)>")
    assert page.locator(".history img").count() == 0
    assert "<img" in page.locator(".turn.user > div").inner_text()
