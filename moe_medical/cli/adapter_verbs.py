"""Verbs about an adapter: generate, chat, serve, merge, export, import."""

from __future__ import annotations

import argparse
from pathlib import Path

from moe_medical.cli.parsing import Parser, numbers, positive
from moe_medical.console import show


def add_adapter_verbs(verbs) -> None:  # type: ignore[no-untyped-def]
    """Every verb that takes an adapter folder."""
    _add_answer_verbs(verbs)
    _add_export_verbs(verbs)
    _add_import_verb(verbs)


def _add_answer_verbs(verbs) -> None:  # type: ignore[no-untyped-def]
    generate = verbs.add_parser("generate", help="answer prompts with a trained adapter")
    chat = verbs.add_parser("chat", help="talk with a trained adapter")
    serve = verbs.add_parser("serve", help="answer over HTTP as OpenAI's API does")
    for verb, run in ((generate, _generate), (chat, _chat), (serve, _serve)):
        verb.add_argument("adapter", help="adapter folder")
        verb.add_argument("--base", help="base model, where it is not the one the adapter names")
        verb.add_argument("--quantization", choices=("none", "int8", "bnb8", "bnb4"), help="of the base")
        verb.set_defaults(verb=run)
    for verb in (generate, chat):
        verb.add_argument("--task", help="whose weights of the experts a task gate uses; several with commas")
        verb.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token")
        verb.add_argument("--top-p", type=float, default=1.0)
        verb.add_argument("--seed", type=int, help="of the sampling")
    generate.add_argument(
        "--prompts", type=Path, help="file with a prompt per line; standard input without it"
    )
    generate.add_argument("--max-new-tokens", type=positive, default=64)
    generate.add_argument("--batch-rows", type=positive, default=16)
    generate.add_argument("--stream", action="store_true", help="show each answer as it comes")
    chat.add_argument("--max-new-tokens", type=positive, default=256)
    _add_serve_options(serve)


def _add_serve_options(serve: argparse.ArgumentParser) -> None:
    serve.add_argument("more", nargs="*", metavar="NAME=ADAPTER", help="others on the same base model")
    serve.add_argument("--host", default="127.0.0.1")
    serve.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    serve.add_argument("--batching", choices=("together", "continuous"), default="together")
    serve.add_argument("--batch-rows", type=positive, default=16)
    serve.add_argument("--queue", type=positive, default=64, help="requests that may wait")
    serve.add_argument("--max-tokens", type=positive, default=256, help="where a request does not say")
    serve.add_argument("--api-key-env", metavar="NAME", help="environment variable with the key to ask for")
    serve.add_argument("--allow-adapter-changes", action="store_true", help="below --adapter-root")
    serve.add_argument("--adapter-root", type=Path, metavar="FOLDER")


def _add_export_verbs(verbs) -> None:  # type: ignore[no-untyped-def]
    merge = verbs.add_parser("merge", help="write the base model with an adapter merged into it")
    export = verbs.add_parser("export", help="write an adapter for other programs")
    forms = export.add_subparsers(required=True, metavar="FORM", parser_class=Parser)
    peft = forms.add_parser("peft", help="as a plain LoRA that PEFT and vLLM load")
    whole = forms.add_parser("hf", help="as a folder with base, experts and code; for token routers too")
    for verb, run in ((merge, _merge), (peft, _export_peft), (whole, _export_hf)):
        verb.add_argument("adapter", type=Path, help="adapter folder")
        verb.add_argument("--out", type=Path, metavar="FOLDER", required=True, help="a new folder")
        verb.add_argument("--base", help="base model, where it is not the one the adapter names")
        parts = "attention, ffn, routed, plain, shared or a pattern; all without it"
        verb.add_argument("--only", action="append", default=[], metavar="PART", help=parts)
        verb.set_defaults(verb=run)
    for verb in (merge, peft):
        what = "whose weights of the experts are taken; given again, one folder for each"
        verb.add_argument("--task", action="append", metavar="NAME", help=what)
    merge.add_argument("--no-verify", action="store_true", help="do not load and compare the result")
    gate = "weights of the experts, the same everywhere, instead of a task's"
    peft.add_argument("--gate", type=numbers, metavar="W,W,...", help=gate)
    peft.add_argument("--vllm", action="store_true", help="a rank that vLLM knows, and its arguments")
    whole.add_argument("--link", action="store_true", help="hard-link the base's weights")


def _generate(options: argparse.Namespace) -> int:
    from moe_medical.evaluation.generate import Sampling
    from moe_medical.serving.answers import Generation, answer_prompts

    sampling = Sampling(options.temperature, options.top_p, options.seed)
    how = Generation(options.max_new_tokens, options.batch_rows, sampling, options.stream)
    where = (options.task, options.base, options.quantization)
    answer_prompts(Path(options.adapter), options.prompts, how, *where)
    return 0


def _chat(options: argparse.Namespace) -> int:
    from moe_medical.evaluation.generate import Sampling
    from moe_medical.serving.chat import chat_in_terminal

    sampling = Sampling(options.temperature, options.top_p, options.seed)
    where = (options.task, options.base, options.quantization)
    chat_in_terminal(Path(options.adapter), options.max_new_tokens, sampling, *where)
    return 0


def _serve(options: argparse.Namespace) -> int:
    from moe_medical.serving.serve import ServeSettings, serve_adapters

    names = ServeSettings.__dataclass_fields__
    settings = ServeSettings(**{name: value for name, value in vars(options).items() if name in names})
    serve_adapters([options.adapter, *options.more], settings, options.allow_adapter_changes)
    return 0


def _merge(options: argparse.Namespace) -> int:
    from moe_medical.interop.merge import merge_adapter

    what = (options.task, options.base, options.only, not options.no_verify)
    for folder in merge_adapter(options.adapter, options.out, *what):
        show(f"written {folder}")
    return 0


def _export_peft(options: argparse.Namespace) -> int:
    from moe_medical.interop.peft_export import export_peft

    what = (options.task, options.base, options.gate, options.only, options.vllm)
    for folder in export_peft(options.adapter, options.out, *what):
        show(f"written {folder}")
    return 0


def _export_hf(options: argparse.Namespace) -> int:
    from moe_medical.interop.hf_folder import export_hf_folder

    what = (options.base, options.only, options.link)
    show(f"written {export_hf_folder(options.adapter, options.out, *what)}")
    return 0


def _add_import_verb(verbs) -> None:  # type: ignore[no-untyped-def]
    bring = verbs.add_parser("import", help="turn an adapter folder of another program into one of ours")
    bring.add_argument("source", metavar="FOLDER", type=Path)
    bring.add_argument("--out", type=Path, metavar="ADAPTER", required=True, help="a new folder")
    bring.add_argument("--base", required=True, help="base model that the adapter is for")
    kinds = ("auto", "peft", "ming", "moelora", "mixlora", "moe-peft")
    bring.add_argument("--from", dest="kind", choices=kinds, default="auto", help="who wrote it")
    names = "tasks of a task gate in the order of their ids"
    bring.add_argument("--tasks", type=_names, default=[], metavar="NAME,NAME,...", help=names)
    bring.add_argument("--convert-pickle", action="store_true", help="read .bin files, tensors only")
    bring.set_defaults(verb=_import)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _import(options: argparse.Namespace) -> int:
    from moe_medical.interop.foreign.importing import import_adapter

    what = (options.kind, options.base, options.tasks, options.convert_pickle)
    show(str(import_adapter(options.source, options.out, *what)))
    return 0
