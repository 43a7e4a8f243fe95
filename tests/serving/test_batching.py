"""What waits is one batch; a full queue refuses; what cannot be served is told before anything starts."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.served import PROMPTS, gate_config, write_adapter, write_family
from transformers import ContinuousBatchingManager

from moe_medical.errors import ConfigError
from moe_medical.evaluation.generate import Row, Sampling
from moe_medical.serving.adapted import Adapted, load_adapted, load_shared_base
from moe_medical.serving.app import create_app
from moe_medical.serving.batching import End, QueueFull, Request, StaticBatching
from moe_medical.serving.continuous import ContinuousBatching
from moe_medical.serving.detokenizer import Detokenizer
from moe_medical.serving.serve import ServeSettings, serve_adapters
from moe_medical.serving.service import Service


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family(tmp_path_factory.mktemp("family"))


class _Held:
    """A request whose first token waits until it is released."""

    def __init__(self, adapted: Adapted) -> None:
        self.begun, self.go = threading.Event(), threading.Event()
        detokenizer = Detokenizer(adapted.chat, self._wait)
        self.request = _request(adapted, PROMPTS[0], detokenizer)

    def _wait(self, _: str) -> None:
        self.begun.set()
        assert self.go.wait(60)


def _request(
    adapted: Adapted, prompt: str, detokenizer: Detokenizer | None = None, ended: list[End] | None = None
) -> Request:
    return Request(
        adapted,
        adapted.chat.encode_prompt(prompt),
        adapted.task_numbers(None, ""),
        12,
        Sampling(),
        detokenizer or Detokenizer(adapted.chat),
        [].append if ended is None else ended.append,
    )


def test_what_waits_for_an_adapter_is_one_batch(family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = load_shared_base(family / "words")
    words, gated = base.adapt(family / "words"), base.adapt(family / "gated")
    sizes: list[tuple[bool, int]] = []
    run = Adapted.continue_rows

    def counted(self: Adapted, rows: list[Row], tasks: list[tuple[int, ...]]) -> None:
        sizes.append((self is words, len(rows)))
        run(self, rows, tasks)

    monkeypatch.setattr(Adapted, "continue_rows", counted)
    batching, held = StaticBatching(batch_rows=3, queue=9), _Held(words)
    batching.submit(held.request)
    assert held.begun.wait(60)
    cancelled = _request(words, PROMPTS[1])
    cancelled.cancelled.set()
    waiting = [_request(words, p) for p in PROMPTS] + [_request(gated, p) for p in PROMPTS[:2]]
    for request in [waiting[0], cancelled, *waiting[4:], *waiting[1:4]]:
        batching.submit(request)
    assert batching.load() == (7, 1)
    held.go.set()
    batching.close()
    assert sizes == [(True, 1), (True, 3), (False, 2), (True, 1)]
    assert all(request.detokenizer.text for request in waiting)
    assert not cancelled.detokenizer.text


def test_a_failed_batch_ends_its_requests_only(
    family: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    adapted, ended = load_adapted(family / "words"), list[End]()
    batching = StaticBatching(batch_rows=4, queue=4)
    with monkeypatch.context() as broken:
        broken.setattr(Adapted, "continue_rows", lambda *_: 1 / 0)
        batching.submit(_request(adapted, PROMPTS[0], ended=ended))
        while not ended:
            pass
    batching.submit(_request(adapted, PROMPTS[0], ended=ended))
    batching.close()
    assert ended == ["error", "length"]
    assert "ZeroDivisionError" in caplog.text


def test_a_full_queue_is_told_at_once(family: Path) -> None:
    base, batching = load_shared_base(family / "words"), StaticBatching(batch_rows=1, queue=1)
    service = Service(base, {"words": family / "words"}, batching, max_tokens=8)
    held = _Held(base.adapt(family / "words"))
    batching.submit(held.request)
    assert held.begun.wait(60)

    async def ask() -> list[httpx.Response]:
        transport = httpx.ASGITransport(create_app(service))
        body = {"model": "words", "prompt": "w1"}
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client:
            first = asyncio.ensure_future(client.post("/v1/completions", json=body))
            while service.health()["waiting"] == 0:
                await asyncio.sleep(0)
            second = await client.post("/v1/completions", json=body)
            changed = await client.delete("/v1/adapters/words")
            held.go.set()
            return [await first, second, changed]

    answered, refused, unchanged = asyncio.run(ask())
    batching.close()
    assert answered.status_code == 200
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
    assert (unchanged.status_code, unchanged.json()["error"]["code"]) == (403, "changes_not_allowed")


def test_continuous_batching_has_a_bounded_queue(family: Path) -> None:
    adapted = load_adapted(family / "words")
    batching = ContinuousBatching(batch_rows=1, queue=0)
    with pytest.raises(QueueFull):
        batching.submit(_request(adapted, PROMPTS[0]))
    batching.close()


def test_a_failed_manager_of_continuous_batching_is_replaced(
    family: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted, ended = load_adapted(family / "words"), list[End]()
    batching = ContinuousBatching(batch_rows=2, queue=4)
    with monkeypatch.context() as broken:
        broken.setattr(ContinuousBatchingManager, "_generation_step", lambda _: 1 / 0)
        batching.submit(_request(adapted, PROMPTS[0], ended=ended))
        while any(thread.name == "continuous" for thread in threading.enumerate()):
            pass
    batching.submit(_request(adapted, PROMPTS[0], ended=ended))
    batching.close()
    assert ended == ["error", "length"]
    assert batching.load() == (0, 0)


@pytest.mark.parametrize(
    ("adapters", "settings", "allow", "rule"),
    [
        (["gated"], {"batching": "continuous"}, False, "--batching must be together, for the task router"),
        (["words", "x=words", "x=gated"], {}, False, "NAME must differ for each adapter, got 'x'"),
        (["words"], {"api_key_env": "NOT_SET_HERE"}, False, "--api-key-env must name a variable that is set"),
        (["words"], {"host": "192.0.2.1"}, False, "--host, --port must be free"),
        (["words"], {}, True, "--adapter-root must name the folder"),
        (["words"], {"adapter_root": Path("/")}, False, "--adapter-root needs --allow-adapter-changes"),
        (["nothing"], {}, False, "is not a folder"),
        (["words", "foreign"], {}, False, r"meta\.base_model must be"),
    ],
)
def test_what_cannot_be_served_is_refused(
    adapters: list[str], settings: dict[str, Any], allow: bool, rule: str, family: Path
) -> None:
    if "foreign" in adapters and not (family / "foreign").exists():
        write_adapter(family / "foreign", family / "model", gate_config(), meta={"base_model": "another"})
    folders = [text.replace("=", f"={family}/") if "=" in text else f"{family}/{text}" for text in adapters]
    with pytest.raises(ConfigError, match=rule):
        serve_adapters(folders, ServeSettings(port=0, **settings), allow)
    assert not [t for t in threading.enumerate() if t.name == "answers"]
