"""Chat formats: transformers is the oracle for the tokens, the mask is checked token by token."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from moe_medical.data.chat import ChatFormat, TargetTooLong
from moe_medical.errors import ConfigError

CHATML = """\
{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' }}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\n' }}
{%- endif %}"""
LLAMA = """\
{{ bos_token }}
{%- for message in messages %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim }}
{{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}"""
FOLDED = """\
{{ bos_token }}
{%- for message in messages %}
{%- if message['role'] == 'user' %}
{{- '[INST] ' + message['content'] + ' [/INST]' }}
{%- elif message['role'] == 'assistant' %}
{{- ' ' + message['content'] + ' ' + eos_token }}
{%- endif %}
{%- endfor %}"""
CONTENT, MESSAGES = "message['content']", "for message in messages"
THINK = "('<think>\n\n</think>\n\n' if message['role'] == 'assistant' else '')"
THINKING = CHATML.replace(CONTENT, f"{THINK} + {CONTENT}")
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
DROPS_SYSTEM = CHATML.replace(MESSAGES, f"{MESSAGES} if message['role'] != 'system'")
SILENT = CHATML.replace(CONTENT, f"('' if message['role'] == 'assistant' else {CONTENT})")
OTHER_START = CHATML.replace("{{ '<|im_start|>assistant\n' }}", "{{ 'Answer:' }}")

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>"]
SPECIAL += ["<|start_header_id|>", "<|end_header_id|>"]
SYSTEM = "You are a medical expert."
TEXT = [
    "Does fever of 38.5 mean influenza? Answer yes or no.",
    "user system assistant question: chest pain\n\nanswer: angina; 发热 咳嗽 é",
    *(f"Question {i}: what is the code of disease number {i}?" for i in range(40)),
]
SAMPLES = [
    ("Fever?", "yes"),
    ("Line one\nline two\n\n- 发热, 咳嗽", "上呼吸道感染"),
    ("Options: A. x\nB. y", "B"),
    ('a <b> & "c" {{ d }}', "E11.9; I10"),
]


def save_tokenizer(folder: Path, template: str | None, **config: object) -> Path:
    """A byte-level BPE tokenizer in the files that a model folder has."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", **config}
    tokens = {k: v for k, v in tokens.items() if v is not None}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **tokens})
    )
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def messages(prompt: str, target: str | None = None, system: str | None = None) -> list[dict[str, str]]:
    turns = [("system", system), ("user", prompt), ("assistant", target)]
    return [{"role": role, "content": content} for role, content in turns if content is not None]


@pytest.mark.parametrize("system", [None, SYSTEM])
@pytest.mark.parametrize("template", [CHATML, LLAMA], ids=["chatml", "llama"])
@pytest.mark.parametrize(("prompt", "target"), SAMPLES)
def test_tokens_are_those_of_transformers(
    tmp_path: Path, template: str, system: str | None, prompt: str, target: str
) -> None:
    transformers = pytest.importorskip("transformers")
    folder = save_tokenizer(tmp_path, template)
    oracle = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    chat = ChatFormat.from_folder(folder, system, max_length=4096)
    found = chat.encode(prompt, target)
    start = oracle.apply_chat_template(
        messages(prompt, system=system), add_generation_prompt=True, return_dict=False
    )
    full = oracle.apply_chat_template(messages(prompt, target, system), return_dict=False)
    assert found.input_ids[: found.num_prompt_tokens] == start == chat.encode_prompt(prompt)
    assert found.input_ids == full[: len(found.input_ids)]
    # ChatML ends a turn with a newline behind the token; that newline is not trained.
    assert oracle.decode(full[len(found.input_ids) :]) == ("\n" if template == CHATML else "")


@pytest.mark.parametrize(
    ("template", "end", "footer"),
    [
        (CHATML, "<|im_end|>", "<|im_end|>\n<|im_start|>assistant"),
        (LLAMA, "<|eot_id|>", "<|eot_id|><|start_header_id|>assistant<|end_header_id|>"),
        (FOLDED, "</s>", " [/INST]"),
        (None, "</s>", ""),
    ],
    ids=["chatml", "llama", "folded", "plain"],
)
@pytest.mark.parametrize(("prompt", "target"), SAMPLES)
def test_loss_is_on_the_target_and_the_end_of_turn_only(
    tmp_path: Path, template: str | None, end: str, footer: str, prompt: str, target: str
) -> None:
    folder = save_tokenizer(tmp_path, template)
    chat = ChatFormat.from_folder(folder, None, max_length=512)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    found = chat.encode(prompt, target)
    prompts, targets = found.input_ids[: found.num_prompt_tokens], found.input_ids[found.num_prompt_tokens :]
    assert targets[-1] == chat.end_id == tokenizer.token_to_id(end)
    # With nothing else trained and nothing of the target left out, the border is exact.
    assert tokenizer.decode(targets[:-1], skip_special_tokens=False).strip() == target
    assert tokenizer.decode(prompts, skip_special_tokens=False).rstrip().endswith(footer)
    assert chat.end_id not in targets[:-1]


def test_model_without_template_gets_the_plain_format(tmp_path: Path) -> None:
    folder = save_tokenizer(tmp_path, None)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for system, expected in ((None, "Fever?\nyes</s>"), (SYSTEM, f"{SYSTEM}\nFever?\nyes</s>")):
        found = ChatFormat.from_folder(folder, system, 128).encode("Fever?", "yes")
        assert tokenizer.decode(found.input_ids, skip_special_tokens=False) == expected
    assert found.num_prompt_tokens == len(found.input_ids) - len(tokenizer.encode("yes").ids) - 1


def test_plain_format_starts_with_the_tokenizers_own_bos(tmp_path: Path) -> None:
    folder = save_tokenizer(tmp_path, None)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", bos)])
    tokenizer.save(str(folder / "tokenizer.json"))
    found = ChatFormat.from_folder(folder, None, 128).encode("Fever?", "yes")
    assert found.input_ids.count(bos) == 1
    assert found.input_ids[0] == bos


def test_text_that_the_template_puts_before_the_target_is_trained(tmp_path: Path) -> None:
    folder = save_tokenizer(tmp_path, THINKING)
    chat = ChatFormat.from_folder(folder, None, 128)
    found = chat.encode("Fever?", "yes")
    assert found.input_ids[: found.num_prompt_tokens] == chat.encode_prompt("Fever?")
    assert chat.decode(found.input_ids[found.num_prompt_tokens :]) == "<think>\n\n</think>\n\nyes"


@pytest.mark.parametrize("target", ["yes", "no fever"])
def test_target_has_its_tokens_of_the_whole_text(tmp_path: Path, target: str) -> None:
    """A SentencePiece-like tokenizer marks the start of a text; the target is no start."""
    folder = save_tokenizer(tmp_path, FOLDED)
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", *SPECIAL], show_progress=False)
    tokenizer.train_from_iterator([*TEXT, "[INST] fever yes no [/INST]"], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    found = ChatFormat.from_folder(folder, None, 128).encode("fever", target)
    whole = tokenizer.encode(f"<s>[INST] fever [/INST] {target} </s>", add_special_tokens=False)
    assert found.input_ids == whole.ids
    assert tokenizer.decode(found.input_ids[found.num_prompt_tokens :]).strip() == target


def test_template_and_tokens_in_older_places(tmp_path: Path) -> None:
    new = save_tokenizer(tmp_path / "new", CHATML)
    old = save_tokenizer(
        tmp_path / "old",
        None,
        chat_template=[{"name": "tools", "template": "x"}, {"name": "default", "template": CHATML}],
        eos_token=None,
        pad_token={"content": "<|eot_id|>", "special": True},
    )
    (old / "special_tokens_map.json").write_text(json.dumps({"eos_token": "</s>"}))
    found = ChatFormat.from_folder(old, SYSTEM, 128)
    assert found.encode("a", "b") == ChatFormat.from_folder(new, SYSTEM, 128).encode("a", "b")
    tokenizer = Tokenizer.from_file(str(old / "tokenizer.json"))
    assert found.pad_id == tokenizer.token_to_id("<|eot_id|>")


def test_decode_leaves_out_special_tokens(tmp_path: Path) -> None:
    chat = ChatFormat.from_folder(save_tokenizer(tmp_path, CHATML), None, 128)
    found = chat.encode("Fever?", "发热 yes")
    assert chat.decode(found.input_ids[found.num_prompt_tokens :]) == "发热 yes"


def test_survives_pickling(tmp_path: Path) -> None:
    chat = ChatFormat.from_folder(save_tokenizer(tmp_path, CHATML), None, 128)
    assert pickle.loads(pickle.dumps(chat)).encode("a", "b") == chat.encode("a", "b")  # noqa: S301


# --- over-long samples ------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_length", [64, 65, 80])
def test_the_middle_of_the_prompt_is_cut(tmp_path: Path, max_length: int) -> None:
    folder = save_tokenizer(tmp_path, LLAMA)
    prompt, target = " ".join(f"w{i}" for i in range(100)), "yes"
    whole = ChatFormat.from_folder(folder, SYSTEM, 4096).encode(prompt, target)
    cut = ChatFormat.from_folder(folder, SYSTEM, max_length).encode(prompt, target)
    assert len(cut.input_ids) == max_length
    assert cut.num_truncated == len(whole.input_ids) - max_length > 0
    pairs = enumerate(zip(whole.input_ids, cut.input_ids, strict=False))
    start = next(i for i, (a, b) in pairs if a != b)
    assert whole.input_ids[:start] + whole.input_ids[start + cut.num_truncated :] == cut.input_ids
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = tokenizer.decode(cut.input_ids, skip_special_tokens=False)
    assert text.startswith(f"<s><|start_header_id|>system<|end_header_id|>\n\n{SYSTEM}<|eot_id|>")
    assert "w0" in text
    assert text.endswith("9<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nyes<|eot_id|>")


@pytest.mark.parametrize("max_length", range(64, 72))
def test_a_cut_never_splits_a_character(tmp_path: Path, max_length: int) -> None:
    chat = ChatFormat.from_folder(save_tokenizer(tmp_path, CHATML), None, max_length)
    cut = chat.encode("糖尿病患者的饮食建议" * 12, "是")
    # A character is up to three tokens here, so each end of the cut may take two more.
    assert max_length - 4 <= len(cut.input_ids) <= max_length
    assert "\ufffd" not in chat.decode(cut.input_ids)
    whole = ChatFormat.from_folder(tmp_path, None, 4096).encode("糖尿病患者的饮食建议" * 12, "是")
    assert len(whole.input_ids) - cut.num_truncated == len(cut.input_ids)


def test_a_target_is_never_cut(tmp_path: Path) -> None:
    chat = ChatFormat.from_folder(save_tokenizer(tmp_path, CHATML), None, 64)
    fits = "x" * (chat.max_target_tokens - 1)  # one token each, and the end of turn
    assert len(chat.encode("y " * 300, fits).input_ids) == 64
    with pytest.raises(TargetTooLong) as caught:
        chat.encode("Fever?", fits + "x")
    assert "xx" not in str(caught.value)


def test_generation_leaves_room_for_the_answer(tmp_path: Path) -> None:
    chat = ChatFormat.from_folder(save_tokenizer(tmp_path, CHATML), None, 64)
    assert len(chat.encode_prompt("y " * 300)) == 64
    assert len(chat.encode_prompt("y " * 300, reserve=20)) == 44
    assert chat.encode_prompt("y " * 300, reserve=20)[-5:] == chat.encode_prompt("y")[-5:]
    with pytest.raises(TargetTooLong):
        chat.encode_prompt("y", reserve=64)


# --- folders and templates that cannot be used ------------------------------------------------------------

BROKEN = {
    "syntax": ("{% if %}", "chat template:1"),
    "raises": ("{{ raise_exception('never') }}", "never"),
    "unknown function": ("{{ nothing() }}", "cannot be rendered"),
    "reaches Python": ("{{ messages.__class__.__mro__ }}", "cannot be rendered|must"),
    "no prefix": (OTHER_START, "generation starts"),
    "no target": (SILENT, "keep the prompt and the target"),
    "changes text": (CHATML.replace(CONTENT, f"{CONTENT} | upper"), "keep the prompt"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_unusable_template(tmp_path: Path, name: str) -> None:
    template, message = BROKEN[name]
    with pytest.raises(ConfigError, match=message):
        ChatFormat.from_folder(save_tokenizer(tmp_path, template), None, 128)


@pytest.mark.parametrize("template", [NO_SYSTEM, DROPS_SYSTEM])
def test_template_without_a_system_role(tmp_path: Path, template: str) -> None:
    folder = save_tokenizer(tmp_path, template)
    with pytest.raises(ConfigError, match=r"data\.system_prompt.*Set data\.system_prompt: null"):
        ChatFormat.from_folder(folder, SYSTEM, 128)
    assert ChatFormat.from_folder(folder, None, 128).encode("a", "b").num_truncated == 0


def test_folder_problems(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.json is missing"):
        ChatFormat.from_folder(tmp_path, None, 128)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match=r"tokenizer\.json cannot be read"):
        ChatFormat.from_folder(tmp_path, None, 128)
    folder = save_tokenizer(tmp_path / "no_end", None, eos_token=None)
    with pytest.raises(ConfigError, match="eos_token must be set"):
        ChatFormat.from_folder(folder, None, 128)
    folder = save_tokenizer(tmp_path / "short", CHATML)
    with pytest.raises(ConfigError, match=r"data\.max_length must exceed the \d+ tokens"):
        ChatFormat.from_folder(folder, SYSTEM, 12)
    (folder / "tokenizer_config.json").write_text("[")
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json must be valid JSON"):
        ChatFormat.from_folder(folder, None, 128)


def test_needs_neither_torch_nor_transformers() -> None:
    modules = "chat mixture recipe sources"
    code = f"import sys\nfor m in '{modules}'.split(): __import__('moe_medical.data.' + m)\n"
    code += "print(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    root = Path(__file__).parents[2]
    found = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
