"""The page at `/`, driven in Debian's chromium against the bundled checkpoint.

With CABOCHON_SCREENSHOTS=docs the pictures of the documentation are taken anew.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from cabochon.llm import AsyncLLM
from cabochon.media.audio import RATE, read_audio
from support.hostile_media import picture
from support.speaking import save_seeing
from support.stand import bundled_llm, running

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
STATIC = Path(__file__).parents[1] / "src" / "cabochon" / "server" / "static"
WEATHER = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Get the weather of a city.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]


def test_the_page_loads_nothing_from_elsewhere() -> None:
    for file in STATIC.iterdir():
        foreign = re.findall(r"(?:https?:)?//[a-z0-9.-]+\.[a-z]+", file.read_text())
        assert [address for address in foreign if "www.w3.org" not in address] == [], file


@pytest.fixture(scope="module")
def base() -> Iterator[str]:
    llm = bundled_llm(loop_guard=0)  # a reply that is to be stopped must not end by itself
    with running(llm) as base:
        yield base
    llm.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="The package playwright is not installed.")
    if CHROMIUM is None:
        pytest.skip("There is no chromium here; `apt-get install chromium` brings it.")
    with playwright.sync_playwright() as driver:
        beeping = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", *beeping])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server whose model sees and hears, though what it says is noise."""
    llm = AsyncLLM(save_seeing(tmp_path_factory.mktemp("seeing") / "noise"), max_model_len=4096)
    with running(llm, max_output_tokens=4) as base:
        yield base
    llm.close()


@pytest.fixture
def page(browser: Any, base: str) -> Iterator[Any]:
    yield from opened(browser, base, "pebble")


@pytest.fixture
def sensing_page(browser: Any, seeing: str) -> Iterator[Any]:
    yield from opened(browser, seeing, "noise")


def opened(browser: Any, base: str, model: str) -> Iterator[Any]:
    """The page at `base`, once it knows its model; whatever goes wrong on it is an error."""
    context = browser.new_context(viewport={"width": 1100, "height": 760}, color_scheme="light")
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    page = context.new_page()
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("response", lambda answer: wrong.append(f"{answer.status} {answer.url}") if answer.status > 400 else None)
    page.goto(base)
    page.wait_for_function(f"() => document.getElementById('model').textContent === '{model}'")
    yield page
    assert not [text for text in wrong if "status of 400" not in text]
    context.close()


def say(page: Any, text: str) -> Any:
    """Send `text` and wait for the whole reply."""
    before = page.locator(".assistant .speed").count()
    page.fill("#words", text)
    page.press("#words", "Enter")
    page.wait_for_function(f"() => document.querySelectorAll('.assistant .foot button').length >= {2 * (before + 1)}")
    return page.locator(".assistant").last


def keep(page: Any, name: str) -> None:
    folder = os.environ.get("CABOCHON_SCREENSHOTS")
    if folder:
        page.screenshot(path=str(Path(folder) / name))


def test_a_conversation(page: Any) -> None:
    page.click("#open-settings")
    page.check("[name=thinking]")
    page.fill("[name=max_tokens]", "200")
    page.click("#open-settings")
    reply = say(page, "What is 123 + 456?")
    said = reply.locator(".said").text_content()
    assert said.strip()
    thought = reply.locator("details.thought")
    assert thought.get_attribute("open") is None
    assert not thought.locator("div").is_visible()
    thought.locator("summary").click()
    assert thought.locator("div").text_content().strip()
    assert "tokens/s" in reply.locator(".speed").text_content()
    keep(page, "page-light.png")
    reply.locator(".copy").click()
    assert page.evaluate("navigator.clipboard.readText()") == said
    reply.locator(".retry").click()
    page.wait_for_function("() => document.querySelectorAll('.assistant .foot button').length === 2")
    assert page.locator(".assistant .said").text_content() == said
    say(page, "And 4 + 4?")
    assert page.locator(".assistant").count() == 2
    page.click("#fresh")
    assert page.locator("#talk > *").count() == 0


def test_calls_and_their_answers(page: Any) -> None:
    page.click("#open-settings")
    page.fill("[name=tools]", json.dumps(WEATHER))
    page.click("#open-settings")
    reply = say(page, "What is the weather in Paris?")
    call = reply.locator(".call")
    assert call.locator("b").text_content() == "get_weather"
    assert json.loads(call.locator("pre").text_content()) == {"city": "Paris"}
    call.locator("input").fill("sunny, 20 degrees")
    page.click("text=Send answers")
    page.wait_for_function("() => document.querySelectorAll('.assistant .foot .copy').length === 2")
    page.click("#theme")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    keep(page, "page-dark.png")
    page.reload()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"


def test_stop_and_faults(page: Any, base: str) -> None:
    page.evaluate("""() => {
        const real = window.fetch, endless = '{"structured_outputs":{"regex":"[a-z ]{9000,}"},';
        window.fetch = (url, options) => real(url, options?.body
            ? { ...options, body: options.body.replace('{', endless) } : options);
    }""")
    page.fill("#words", "What is 1 + 1?")
    page.click("#send")
    page.wait_for_function("() => document.querySelector('.assistant .said')?.textContent.length > 3")
    page.click("#stop")
    page.wait_for_selector("text=Stopped.")
    for _ in range(100):
        if "cabochon_requests_running 0.0" in httpx.get(base + "/metrics").text:
            break
        page.wait_for_timeout(20)
    else:
        raise AssertionError("the reply goes on although the page stopped it")
    page.click("#open-settings")
    page.fill("[name=tools]", "no list")
    say(page, "Hello")
    assert "The tools are not JSON" in page.locator(".assistant .fault").text_content()
    page.fill("[name=tools]", "")
    page.fill("[name=max_tokens]", "99999999")
    say(page, "Hello")
    assert "8192" in page.locator(".assistant .fault").last.text_content()


def test_text_from_the_model_stays_text(page: Any) -> None:
    page.evaluate("""async () => {
        const { ReplyView } = await import('/static/views.js');
        const view = new ReplyView({});
        view.add({ text: '<img src=x onerror=window.hit=1>\\n```js\\nlet a;\\n```\\nend', thinking: '<b>x</b>' });
        document.getElementById('talk').append(view.root);
    }""")
    assert page.locator(".assistant img, .assistant .thought b").count() == 0
    assert page.locator(".assistant pre").text_content() == "let a;\n"
    assert page.evaluate("window.hit") is None


# Images and sounds ---------------------------------------------------------------------------------------------------

HAND_OVER = """([kind, name, type, data]) => {
    const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
    const transfer = new DataTransfer();
    transfer.items.add(new File([bytes], name, { type }));
    const event = kind === "paste"
        ? new ClipboardEvent("paste", { clipboardData: transfer, bubbles: true, cancelable: true })
        : new DragEvent("drop", { dataTransfer: transfer, bubbles: true, cancelable: true });
    document.getElementById("words").dispatchEvent(event);
}"""
"""Drop or paste a file: what the browser does when a person's hand does it."""


def sent(page: Any, text: str) -> list[dict[str, Any]]:
    """Say `text` with whatever is attached; the content parts that went to the server, which answered them."""
    with page.expect_request(lambda request: request.url.endswith("/v1/chat/completions")) as asked:
        reply = say(page, text)
    assert reply.locator(".fault").count() == 0, reply.text_content()
    return json.loads(asked.value.post_data)["messages"][-1]["content"]


def test_pictures_are_picked_dropped_and_pasted(sensing_page: Any, tmp_path: Path) -> None:
    page, data = sensing_page, picture(size=(64, 48))
    (tmp_path / "picked.png").write_bytes(data)
    page.set_input_files("#attach input", tmp_path / "picked.png")
    for place, kind in enumerate(("drop", "paste", "drop"), 2):
        page.wait_for_function(f"() => document.querySelectorAll('.chip').length === {place - 1}")
        page.evaluate(HAND_OVER, [kind, f"{kind}.png", "image/png", base64.b64encode(data).decode()])
    page.wait_for_function("() => document.querySelectorAll('.chip').length === 4")
    page.locator(".chip button").last.click()
    parts = sent(page, "What is this?")
    assert [part["type"] for part in parts] == ["image_url"] * 3 + ["text"]
    for part in parts[:3]:
        assert base64.b64decode(part["image_url"]["url"].split(",")[1]) == data
    assert page.locator(".user img").count() == 3
    assert page.locator(".chip").count() == 0
    page.evaluate(HAND_OVER, ["drop", "notes.pdf", "application/pdf", ""])
    page.wait_for_selector("text=noise takes no application.")


def test_the_microphone(sensing_page: Any) -> None:
    """Chromium's make-believe microphone beeps once a second."""
    page = sensing_page
    page.click("#record")
    page.wait_for_selector("#record[aria-pressed=true]")
    page.wait_for_timeout(700)  # what is being waited for is time: a recording of that length
    page.click("#record")
    page.wait_for_selector(".chip")
    sound, text = sent(page, "What do you hear?")
    assert (sound["type"], text["type"]) == ("input_audio", "text")
    samples = read_audio(base64.b64decode(sound["input_audio"]["data"]), 30.0)
    assert 0.3 * RATE < len(samples) < 20 * RATE
    assert page.locator(".user audio").count() == 1


def test_the_description_of_the_endpoints(page: Any, base: str) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(base + "/docs")
    page.wait_for_selector("details code")
    described = httpx.get(base + "/openapi.json").json()
    assert page.locator("details").count() == sum(len(operations) for operations in described["paths"].values())
    box = page.locator("details:has(code:text-is('/v1/chat/completions'))")
    box.locator("summary").click()
    box.locator("text=Retry-After").wait_for()
    shown = box.text_content()
    for words in ("temperature", "list of ChatMessage", "required", "tool_choice", "Retry-After"):
        assert words in shown
    assert all(url.startswith(base) for url in asked), asked


def test_a_phone(browser: Any, base: str) -> None:
    context = browser.new_context(viewport={"width": 375, "height": 700}, color_scheme="dark")
    page = context.new_page()
    page.goto(base)
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    say(page, "What is 12 + 30? " + "word " * 60)
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    tops = page.evaluate("[...document.querySelectorAll('header button')].map(b => b.getBoundingClientRect().top)")
    assert len(set(tops)) == 1, "the buttons take two rows"
    keep(page, "page-phone.png")
    page.click("#open-settings")
    assert page.locator("[name=temperature]").is_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    context.close()
