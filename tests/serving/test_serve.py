"""The server as a process, talked to over HTTP: answers, streams, adapters that come and go, its end."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.served import PROMPTS, Server, server, write_family

from moe_medical.serving.adapted import load_adapted
from moe_medical.serving.answers import Generation, answer_all

KEY = "a-key-of-the-tests"
TOKENS = 20


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family(tmp_path_factory.mktemp("family"))


@pytest.fixture(scope="module")
def running(family: Path) -> Iterator[Server]:
    adapters = [str(family / "words"), f"gate={family / 'gated'}"]
    options = ["--api-key-env", "SERVE_KEY", "--allow-adapter-changes", "--adapter-root", str(family)]
    sizes = ["--batch-rows", "4", "--queue", "16"]
    with server(family / "serve.log", *adapters, *options, *sizes, SERVE_KEY=KEY) as started:
        yield started


@pytest.fixture
def client(running: Server) -> Iterator[httpx.Client]:
    headers = {"authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=running.url, headers=headers, timeout=100) as opened:
        yield opened


def _chat(model: str, prompt: str, **more: Any) -> dict[str, Any]:
    return {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": TOKENS,
        **more,
    }


def _ask(client: httpx.Client, body: dict[str, Any]) -> dict[str, Any]:
    response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def _text(client: httpx.Client, body: dict[str, Any]) -> str:
    return str(_ask(client, body)["choices"][0]["message"]["content"])


def _stream(client: httpx.Client, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    with client.stream("POST", path, json=body | {"stream": True}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert events[-1] == "[DONE]"
    return [json.loads(event) for event in events[:-1]]


def _expected(folder: Path, task: str | None = None) -> list[str]:
    """What `generate` answers to `PROMPTS`."""
    adapted = load_adapted(folder)
    tasks = [adapted.task_numbers(task, "")] * len(PROMPTS)
    return answer_all(adapted, PROMPTS, tasks, Generation(TOKENS))


def test_models_and_health(client: httpx.Client) -> None:
    names = [model["id"] for model in client.get("/v1/models").json()["data"]]
    assert names[:4] == ["words", "gate", "gate/colour", "gate/size"]
    assert client.get("/health", headers={"authorization": ""}).json()["status"] == "ok"


def test_answers_are_those_of_generate(client: httpx.Client, family: Path) -> None:
    expected = _expected(family / "words")
    found = _ask(client, _chat("words", PROMPTS[0]))
    assert found["object"] == "chat.completion"
    assert found["choices"][0] | {"logprobs": None} == {
        "index": 0,
        "message": {"role": "assistant", "content": expected[0]},
        "logprobs": None,
        "finish_reason": "length",
    }
    prompt_tokens = len(load_adapted(family / "words").chat.encode_prompt(PROMPTS[0]))
    assert found["usage"] == {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": TOKENS,
        "total_tokens": prompt_tokens + TOKENS,
    }


def test_requests_at_once_are_answered_as_alone(client: httpx.Client, family: Path) -> None:
    """Mixed prompts, adapters, tasks, lengths and sampling."""
    words, size = _expected(family / "words"), _expected(family / "gated", "size")
    sampled = _chat("words", PROMPTS[1], temperature=0.9, top_p=0.9, seed=5)
    bodies = [_chat("words", prompt) for prompt in PROMPTS]
    bodies += [_chat("gate/size", PROMPTS[0]), _chat("gate", PROMPTS[1], task="size"), sampled]
    bodies += [_chat("words", PROMPTS[2], max_tokens=3)]
    with ThreadPoolExecutor(len(bodies)) as pool:
        texts = list(pool.map(lambda body: _text(client, body), bodies))
    assert texts[:6] == [*words, *size[:2]]
    assert texts[6] == _text(client, sampled) != words[1]
    assert words[2].startswith(texts[7])
    assert texts[7] != words[2]


def test_a_stream_joins_to_the_answer(client: httpx.Client, family: Path) -> None:
    chunks = _stream(
        client, "/v1/chat/completions", _chat("words", PROMPTS[3], stream_options={"include_usage": True})
    )
    deltas = [chunk["choices"][0] for chunk in chunks[:-1]]
    assert "".join(d["delta"].get("content", "") for d in deltas) == _expected(family / "words")[3]
    assert deltas[0]["delta"]["role"] == "assistant"
    assert [d["finish_reason"] for d in deltas] == [None] * (len(deltas) - 1) + ["length"]
    assert len(deltas) > 5
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == TOKENS


def test_a_text_is_continued(client: httpx.Client) -> None:
    body = {"model": "words", "prompt": "w1 w2", "max_tokens": TOKENS}
    whole = client.post("/v1/completions", json=body).json()
    assert whole["object"] == "text_completion"
    text = whole["choices"][0]["text"]
    pieces = [chunk["choices"][0]["text"] for chunk in _stream(client, "/v1/completions", body)]
    assert "".join(pieces) == text
    stop = text[5:8]
    stopped = client.post("/v1/completions", json=body | {"stop": [stop]}).json()["choices"][0]
    assert stopped["text"] == text[: text.index(stop)]
    assert stopped["finish_reason"] == "stop"


def test_the_whole_chat_is_heard(client: httpx.Client, family: Path) -> None:
    messages = [
        {"role": "system", "content": "w5"},
        {"role": "user", "content": "w1"},
        {"role": "assistant", "content": "w2"},
        {"role": "user", "content": [{"type": "text", "text": "w3"}]},
    ]
    body = {"model": "words", "messages": messages, "max_tokens": 4}
    chat = load_adapted(family / "words").chat
    plain = [*messages[:3], {"role": "user", "content": "w3"}]
    assert _ask(client, body)["usage"]["prompt_tokens"] == len(chat.encode_chat(plain))


def test_adapters_come_and_go(client: httpx.Client, family: Path, tmp_path: Path) -> None:
    words, other = _expected(family / "words"), _expected(family / "other")
    assert client.post("/v1/adapters", json={"name": "swap", "path": "words"}).status_code == 200
    assert _text(client, _chat("swap", PROMPTS[0])) == words[0]
    assert client.post("/v1/adapters", json={"name": "swap", "path": "other"}).status_code == 200
    assert _text(client, _chat("swap", PROMPTS[0])) == other[0]
    assert _text(client, _chat("words", PROMPTS[0])) == words[0]
    assert client.delete("/v1/adapters/swap").json()["deleted"]
    assert client.post("/v1/chat/completions", json=_chat("swap", "w1")).status_code == 404
    assert client.delete("/v1/adapters/swap").status_code == 404
    shutil.copytree(family / "words", tmp_path / "outside")
    (family / "link").symlink_to(tmp_path / "outside")
    for path in (str(tmp_path / "outside"), f"../{family.name}-no", "link"):
        refused = client.post("/v1/adapters", json={"name": "swap", "path": path})
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "path_not_allowed")
    broken = client.post("/v1/adapters", json={"name": "swap", "path": "model"})
    assert (broken.status_code, broken.json()["error"]["code"]) == (400, "invalid_adapter")


@pytest.mark.parametrize(
    ("change", "status", "code", "param"),
    [
        ({"model": "nobody"}, 404, "model_not_found", "model"),
        ({"task": "shape"}, 400, "invalid_value", "task"),
        ({"model": "gate/shape"}, 400, "invalid_value", "task"),
        ({"n": 2}, 400, "invalid_value", "n"),
        ({"temperature": 3}, 400, "invalid_value", "temperature"),
        ({"top_p": 0}, 400, "invalid_value", "top_p"),
        ({"max_tokens": 0}, 400, "invalid_value", "max_tokens"),
        ({"max_tokens": 10**6}, 400, "context_length_exceeded", "max_tokens"),
        ({"stop": ["a"] * 5}, 400, "invalid_value", "stop"),
        ({"logprobs": True}, 400, "invalid_value", "logprobs"),
        ({"frequency_penalty": 1}, 400, "invalid_value", "frequency_penalty"),
        ({"messages": []}, 400, "invalid_value", "messages"),
        ({"messages": [{"role": "nurse", "content": "w7secret"}]}, 400, "invalid_value", "messages.0.role"),
    ],
)
def test_bad_input_is_refused(
    change: dict[str, Any], status: int, code: str, param: str, client: httpx.Client
) -> None:
    response = client.post("/v1/chat/completions", json=_chat("gate", "w7secret") | change)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (status, code, param)
    assert "w7secret" not in response.text


def test_a_key_is_asked_for(client: httpx.Client) -> None:
    for headers in ({"authorization": "Bearer wrong"}, {"authorization": ""}):
        response = client.post("/v1/chat/completions", json=_chat("words", "w1"), headers=headers)
        assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")


@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_is_not_answered(stream: bool, running: Server, client: httpx.Client) -> None:
    """The answer would take many minutes."""
    body = _chat("words", PROMPTS[0], max_tokens=50_000, stream=stream)
    if stream:
        with client.stream("POST", "/v1/chat/completions", json=body) as response:
            assert next(response.iter_lines()).startswith("data: ")
    else:
        with pytest.raises(httpx.ReadTimeout):
            client.post("/v1/chat/completions", json=body, timeout=1)
    running.process.wait_until(lambda: client.get("/health").json()["running"] == 0)
    assert _ask(client, _chat("words", PROMPTS[0]))


def test_it_answers_before_it_ends_and_logs_no_text(running: Server, client: httpx.Client) -> None:
    """Must be the last test of its server."""
    body = _chat("words", "w8w8w8", max_tokens=150, stream=True)
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: ")
        running.process.process.send_signal(signal.SIGTERM)
        events = [line for line in lines if line]
    assert events[-1] == "data: [DONE]"
    assert running.process.end() == 0
    assert "w8w8w8" not in running.process.output
    assert KEY not in running.process.output
    assert "serving words, gate" in running.process.output


def test_continuous_batching_answers_the_same(family: Path) -> None:
    expected, other = _expected(family / "words"), _expected(family / "other")
    adapters = [str(family / "words"), str(family / "other"), "--batching", "continuous"]
    with server(family / "continuous.log", *adapters, "--batch-rows", "3") as started:
        with httpx.Client(base_url=started.url, timeout=100) as client:
            bodies = [_chat(name, prompt) for name in ("words", "other") for prompt in PROMPTS]
            with ThreadPoolExecutor(len(bodies)) as pool:
                assert list(pool.map(lambda body: _text(client, body), bodies)) == [*expected, *other]
            sampled = _chat("words", PROMPTS[0], temperature=1.0, top_p=1e-6)
            assert _text(client, sampled) == expected[0]
            refused = client.post("/v1/chat/completions", json=sampled | {"seed": 3})
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, "seed")
            long = _chat("words", PROMPTS[0], max_tokens=50_000, stream=True)
            with client.stream("POST", "/v1/chat/completions", json=long) as response:
                assert next(response.iter_lines()).startswith("data: ")
            started.process.wait_until(lambda: client.get("/health").json()["running"] == 0)
        started.process.process.send_signal(signal.SIGTERM)
        assert started.process.end() == 0
