"""The page at `/`, driven in Debian's chromium against the bundled checkpoint.

With CABOCHON_SCREENSHOTS=docs the pictures of the documentation are taken anew.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

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
    llm = bundled_llm()
    with running(llm) as base:
        yield base
    llm.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="The package playwright is not installed.")
    if CHROMIUM is None:
        pytest.skip("There is no chromium here; `apt-get install chromium` brings it.")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, base: str) -> Iterator[Any]:
    context = browser.new_context(viewport={"width": 1100, "height": 760}, color_scheme="light")
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    page = context.new_page()
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("response", lambda answer: wrong.append(f"{answer.status} {answer.url}") if answer.status > 400 else None)
    page.goto(base)
    page.wait_for_function("() => document.getElementById('model').textContent === 'pebble'")
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
    assert "The tools are not JSON" in page.locator(".fault").text_content()
    page.fill("[name=tools]", "")
    page.fill("[name=max_tokens]", "99999999")
    say(page, "Hello")
    assert "8192" in page.locator(".fault").last.text_content()


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


def test_the_description_of_the_endpoints(page: Any, base: str) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(base + "/docs")
    page.wait_for_selector("details code")
    described = httpx.get(base + "/openapi.json").json()
    assert page.locator("details").count() == sum(len(operations) for operations in described["paths"].values())
    box = page.locator("details:has(code:text-is('/v1/chat/completions'))")
    box.locator("summary").click()
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
    keep(page, "page-phone.png")
    page.click("#open-settings")
    assert page.locator("[name=temperature]").is_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    context.close()
