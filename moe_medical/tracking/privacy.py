"""Takes secrets out of a config before it leaves the process (W&B, `config.json`).

Decisions: a value is hidden for its key's name or for its looks. Numbers under "token" or "key" stay:
`max_new_tokens` is a count. A whole `${oc.env:NAME}` stays unresolved: it names a secret, but holds none.
40 hexadecimal digits are a W&B key, but a commit under a key such as `revision`. In doubt a string is hidden.
It does not look for patient text: configs hold none.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

REDACTED = "<redacted>"

# "tokenizer" and "keyboard" are no secrets: no small letter may follow the word or its plural
_SECRET_KEY = re.compile(r"(?i:key|token|secret|passw(?:or)?d|passphrase|credential)(?i:s)?(?![a-z])")
_NEVER_A_NUMBER = re.compile(r"(?i)secret|passw(or)?d|credential")
_COMMIT_KEY = re.compile(r"(?i)(revision|commit|sha)$")
_REFERENCE = re.compile(r"\$\{oc\.env:\w+\}")
_HEX_40 = re.compile(r"(?<![0-9a-fA-F])[0-9a-f]{40}(?![0-9a-fA-F])")
_KNOWN_SECRET = re.compile(
    r"hf_[A-Za-z0-9]{16,}"  # Hugging Face
    r"|\bsk-[A-Za-z0-9_-]{16,}"  # OpenAI, Anthropic
    r"|\b(?:AKIA|ASIA)[A-Z0-9]{16}"  # AWS
    r"|\bwandb_v\d_[A-Za-z0-9_]{16,}"
    r"|\bgh[opsru]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}|\bglpat-[\w-]{16,}"
    r"|\bxox[a-z]-[\w-]{10,}|\bAIza[\w-]{30,}"  # Slack, Google
    r"|\beyJ[\w-]{8,}\.[\w-]{8,}\."  # JSON web token
    r"|-----BEGIN [A-Z ]*PRIVATE KEY"
    r"|://[^\s/:@]+:[^\s/@]+@"  # password in a URL
)
_LONG_WORD = re.compile(
    r"(?<![\w/+])[A-Za-z0-9+/]{40}(?![\w/+])|[A-Za-z0-9+=]{32,}"
)  # an AWS secret; no path
_RANDOM_BITS = 4.3  # per character; words of a language stay below it, most random base64 is above


def redact(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `config` with every secret replaced by "<redacted>".

    Args:
        config: Plain dicts, lists and scalars, interpolations unresolved (`to_container(resolve=False)`).
    """
    return {key: _redact(value, str(key)) for key, value in config.items()}


def _redact(value: Any, key: str) -> Any:
    if value is None or isinstance(value, bool) or _is_reference(value):
        return value
    if _SECRET_KEY.search(key) and not _is_count(value, key):
        return REDACTED
    if isinstance(value, Mapping):
        return redact(value)
    if isinstance(value, list | tuple):
        return [_redact(item, key) for item in value]
    return REDACTED if isinstance(value, str) and _looks_secret(value, key) else value


def _is_reference(value: Any) -> bool:
    return isinstance(value, str) and _REFERENCE.fullmatch(value.strip()) is not None


def _is_count(value: Any, key: str) -> bool:
    return isinstance(value, int | float) and not _NEVER_A_NUMBER.search(key)


def _looks_secret(text: str, key: str) -> bool:
    if _KNOWN_SECRET.search(text) or (_HEX_40.search(text) and not _COMMIT_KEY.search(key)):
        return True
    return any(_is_random(word) for word in _LONG_WORD.findall(text))


def _is_random(word: str) -> bool:
    """Whether a long word mixes small letters, capitals and digits and looks drawn at random."""
    mixed = all(re.search(kind, word) for kind in ("[a-z]", "[A-Z]", "[0-9]"))
    shares = [count / len(word) for count in Counter(word).values()]
    return mixed and -sum(share * math.log2(share) for share in shares) > _RANDOM_BITS
