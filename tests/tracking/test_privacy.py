"""Planted secrets never come out; what a run needs to be repeated does."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_medical.config.schema import RunConfig
from moe_medical.tracking.privacy import REDACTED, redact

HEX_40 = "0123456789abcdef" * 2 + "01234567"
RANDOM = "q8Zr2LkV9xTn4WbYc7MdPf3HsJgA6uRe"
SECRETS = [
    "hf_" + "abcdefghij" * 3,
    "sk-" + "ant-api03-" + "x1" * 12,
    "AKIA" + "IOSFODNN7EXAMPLE",
    "ghp_" + "0" * 36,
    HEX_40,
    RANDOM,
    "wJalrXUtnFEMI/K7MDENG/bPxRfiCY" + "EXAMPLEKEY",
    "https://user:hunter2@example.org/repo",
    "-----BEGIN RSA PRIVATE KEY-----",
]

plain = st.none() | st.booleans() | st.integers() | st.text(max_size=8)
trees = st.recursive(
    plain, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
)


@pytest.mark.parametrize("secret", SECRETS)
@pytest.mark.parametrize("wrap", [lambda s: [s], lambda s: {"deep": [{"x": s}]}, lambda s: f"use {s} "])
def test_secrets_are_known_by_their_looks(secret: str, wrap: Any) -> None:
    hidden = json.dumps(redact({"note": wrap(secret)}))
    assert secret not in hidden
    assert REDACTED in hidden


@pytest.mark.parametrize(
    "key",
    [
        "api_key",
        "WANDB_API_KEY",
        "apiKey",
        "hf_token",
        "tokenId",
        "secret",
        "password",
        "passwd",
        "credentials",
    ],
)
@pytest.mark.parametrize("value", ["x", ["x"], {"a": "x"}])
def test_secrets_are_known_by_their_key(key: str, value: Any) -> None:
    assert redact({"a": {key: value}}) == {"a": {key: REDACTED}}


def test_a_number_is_a_password_but_no_token() -> None:
    assert redact({"password": 1234, "max_new_tokens": 32, "num_key_value_heads": 4, "token": None}) == {
        "password": REDACTED,
        "max_new_tokens": 32,
        "num_key_value_heads": 4,
        "token": None,
    }


@pytest.mark.parametrize(
    "harmless",
    [
        {"tokenizer": "gpt2", "keyboard": "x"},
        {"revision": HEX_40},
        {"path": "/work/Projects/MedicalMixtures2024/Runs/Qwen25Instruct/Checkpoints/step100"},
        {"sha256": "0123456789abcdef" * 4},
        {"prompt": "You are a medical expert. Answer exactly and briefly. " * 3},
        {"url": "https://example.org:8080/a"},
    ],
)
def test_what_a_run_needs_is_kept(harmless: dict[str, Any]) -> None:
    assert redact(harmless) == harmless


def test_the_default_run_config_is_kept_whole() -> None:
    config = asdict(RunConfig())
    assert redact(config) == json.loads(json.dumps(config))  # tuples are lists in a file


def test_a_reference_stays_unresolved_but_its_default_does_not() -> None:
    config = {"wandb_key": "${oc.env:WANDB_API_KEY}", "other_key": "${oc.env:WANDB_API_KEY,abc}"}
    assert redact(config) == {"wandb_key": "${oc.env:WANDB_API_KEY}", "other_key": REDACTED}


@settings(max_examples=50)
@given(st.dictionaries(st.text(max_size=8), trees, max_size=4))
def test_redaction_is_idempotent_and_leaves_its_input_alone(config: dict[str, Any]) -> None:
    before = copy.deepcopy(config)
    once = redact(config)
    assert redact(once) == once
    assert config == before


@settings(max_examples=50)
@given(st.dictionaries(st.text(max_size=8), trees, max_size=3), st.text(max_size=8), st.sampled_from(SECRETS))
def test_no_planted_secret_comes_out(config: dict[str, Any], key: str, secret: str) -> None:
    if not key.lower().endswith(("revision", "commit", "sha")):
        assert secret not in json.dumps(redact({**config, key: {"inner": [secret]}}))
