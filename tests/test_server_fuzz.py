"""Generated requests after the server's own description: whatever comes, no fault of the server's and no silence."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.generation import GenerationMode

from cabochon.llm import AsyncLLM
from support.stand import running, toy_llm

pytestmark = pytest.mark.filterwarnings("ignore")
CASES = {"short": 3, "long": 220}
"""Per operation; there are about twenty, positive and negative."""


@pytest.fixture(scope="module")
def llm() -> Iterator[AsyncLLM]:
    llm = toy_llm()
    yield llm
    llm.close()


@pytest.mark.parametrize("size", ["short", pytest.param("long", marks=pytest.mark.slow)])
def test_no_request_breaks_the_server(llm: AsyncLLM, size: str, caplog: pytest.LogCaptureFixture) -> None:
    """Replies are kept short by the server, so that time goes into requests."""
    statuses: dict[int, int] = {}
    with caplog.at_level(logging.WARNING), running(llm, max_output_tokens=4, request_timeout=20) as base:
        schema = schemathesis.openapi.from_url(f"{base}/openapi.json")
        operations = [result.ok() for result in schema.get_all_operations()]
        with httpx.Client(base_url=base, timeout=30) as client:
            for operation in operations:
                for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
                    _try(operation, mode, client, CASES[size], statuses)
    print(f"{sum(statuses.values())} requests to {len(operations)} operations: {dict(sorted(statuses.items()))}")
    assert not [status for status in statuses if status >= 500]
    assert not [record for record in caplog.records if record.exc_info], caplog.text
    assert sum(statuses.values()) >= len(operations)
    llm.front.engine.check()


def _try(
    operation: schemathesis.APIOperation,
    mode: GenerationMode,
    client: httpx.Client,
    count: int,
    statuses: dict[int, int],
) -> None:
    strategy = operation.as_strategy(generation_mode=mode)

    @settings(
        max_examples=count, deadline=None, database=None, phases=[Phase.generate], derandomize=True,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(case=strategy)
    def send(case: schemathesis.Case) -> None:
        answer = case.call(base_url=str(client.base_url), timeout=30)
        statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
        assert answer.status_code < 500, (case.as_curl_command(), answer.text)
        if answer.status_code >= 400 and answer.headers.get("content-type") == "application/json":
            assert answer.json()["error"]["message"]

    with contextlib.suppress(Unsatisfiable):  # an operation without parameters has nothing to negate
        send()


@pytest.mark.parametrize(
    "body",
    [
        b"", b"null", b"[]", b"{}", b"\xff\xfe", b'{"messages": NaN}', b"[" * 100_000, b'{"a":' * 5_000,
        b'{"messages":[{"role":"user","content":"\\ud800"}],"max_tokens":2}',
        b'{"messages":[{"role":"user","content":"x"}],"max_tokens":' + b"9" * 5000 + b"}",
        b'{"messages":[{"role":"user","content":"x"}],"temperature":1e400}',
        b'{"messages":[{"role":"user","content":"x"}],"seed":-9223372036854775808,"max_tokens":2}',
        b'{"messages":[{"role":"user","content":"x"}],"logit_bias":{"999999999":1}}',
        b'{"messages":[{"role":"user","content":"x"}],"tools":[{"type":"function","function":{"name":"f",'
        b'"parameters":{"type":"object","properties":{"a":{"minimum":NaN}}}}}]}',
        b'{"messages":[{"role":"user","content":"x"}],"response_format":{"type":"json_schema","json_schema":'
        b'{"schema":{"type":"string","pattern":"(a{1,1000}){1,1000}"}}},"max_tokens":2}',
    ],
)  # fmt: skip
def test_hostile_bodies(llm: AsyncLLM, body: bytes) -> None:
    headers = {"content-type": "application/json"}
    with running(llm) as base:
        for path in ("/v1/chat/completions", "/v1/messages", "/v1/responses", "/v1/completions", "/tokenize"):
            answer = httpx.post(base + path, content=body, headers=headers, timeout=30)
            assert answer.status_code in (200, 400), (path, answer.text)
            assert answer.json()
