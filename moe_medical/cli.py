"""The verbs. Each parses its arguments, calls one function, and ends with an exit code of the contract.

Heavy imports happen inside the verbs: `plan` needs no torch.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from moe_medical import __version__
from moe_medical.config import RunConfig, load_config
from moe_medical.console import complain, setup_logging, show
from moe_medical.errors import ConfigError, MoeMedicalError
from moe_medical.training.supervisor import die_with_supervisor, may_tell_error, share_cores

_LOG = logging.getLogger(__name__)


def run() -> NoReturn:
    """The command `moe-medical`: one verb, then out."""
    code = main()
    if "torch.distributed" in sys.modules:  # this may have been a rank
        from moe_medical.distributed.topology import end_rank

        end_rank(code)
    sys.exit(code)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb and return the process's exit code."""
    options = _parse(arguments)
    ranked = options.verb in (_train, _eval)  # elsewhere a launcher's variables mean nothing
    setup_logging(is_main=not ranked or os.environ.get("RANK", "0") == "0")
    try:
        return int(options.verb(options))
    except MoeMedicalError as e:
        if not ranked or may_tell_error():
            complain(str(e))
        return e.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `moe-medical plan ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains at its end
        return 0
    except Exception:
        _LOG.exception("internal error; please report it")
        return MoeMedicalError.exit_code


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse does not see overrides that stand behind an option.
    if rest and (not hasattr(options, "overrides") or any(text.startswith("-") for text in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides += rest
    return options


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="moe-medical", description="Train medical LLMs as mixtures of low-rank experts.")
    parser.add_argument("--version", action="version", version=__version__)
    # The deepspeed launcher puts it before the verb.
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    verbs = parser.add_subparsers(required=True, metavar="VERB", parser_class=_Parser)
    plan = _add_run_verb(verbs, "plan", _plan, "print what a run will do: mixture, adapted layers, layouts")
    _add_plan_options(plan)
    _add_run_verb(verbs, "launch", _launch, "start a run's ranks on this machine and look after them")
    _add_run_verb(verbs, "train", _train, "one rank of a run; for launchers such as deepspeed")
    _add_data_verbs(verbs)
    _add_answer_verbs(verbs)
    _add_export_verbs(verbs)
    _add_router_verbs(verbs)
    _add_result_verbs(verbs)
    return parser


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
    generate.add_argument("--max-new-tokens", type=_positive, default=64)
    generate.add_argument("--batch-rows", type=_positive, default=16)
    generate.add_argument("--stream", action="store_true", help="show each answer as it comes")
    chat.add_argument("--max-new-tokens", type=_positive, default=256)
    _add_serve_options(serve)


def _add_serve_options(serve: argparse.ArgumentParser) -> None:
    serve.add_argument("more", nargs="*", metavar="NAME=ADAPTER", help="others on the same base model")
    serve.add_argument("--host", default="127.0.0.1")
    serve.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    serve.add_argument("--batching", choices=("together", "continuous"), default="together")
    serve.add_argument("--batch-rows", type=_positive, default=16)
    serve.add_argument("--queue", type=_positive, default=64, help="requests that may wait")
    serve.add_argument("--max-tokens", type=_positive, default=256, help="where a request does not say")
    serve.add_argument("--api-key-env", metavar="NAME", help="environment variable with the key to ask for")
    serve.add_argument("--allow-adapter-changes", action="store_true", help="below --adapter-root")
    serve.add_argument("--adapter-root", type=Path, metavar="FOLDER")


def _add_router_verbs(verbs) -> None:  # type: ignore[no-untyped-def]
    router = verbs.add_parser("router", help="fit routers before training")
    what = "fit a run's routers to labels of its tasks, for adapters.router_from"
    fit = _add_run_verb(
        router.add_subparsers(required=True, metavar="VERB", parser_class=_Parser), "fit", _router_fit, what
    )
    fit.add_argument("--out", type=Path, metavar="FOLDER", required=True, help="folder to write")
    kinds = "task, kind, language, tags in order (a,b,c), or a YAML or JSON file of task: label"
    fit.add_argument("--labels", default="task", help=f"what the experts stand for: {kinds}")
    fit.add_argument("--rows", type=_positive, default=256, help="training rows of each label at most")


def _add_export_verbs(verbs) -> None:  # type: ignore[no-untyped-def]
    merge = verbs.add_parser("merge", help="write the base model with an adapter merged into it")
    export = verbs.add_parser("export", help="write an adapter for other programs")
    forms = export.add_subparsers(required=True, metavar="FORM", parser_class=_Parser)
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
    peft.add_argument("--gate", type=_numbers, metavar="W,W,...", help=gate)
    peft.add_argument("--vllm", action="store_true", help="a rank that vLLM knows, and its arguments")
    whole.add_argument("--link", action="store_true", help="hard-link the base's weights")


def _add_result_verbs(verbs) -> None:  # type: ignore[no-untyped-def]
    what = "loss and scores of every task of a run file, with an adapter or for the base model alone"
    evaluate = _add_run_verb(verbs, "eval", _eval, what)
    evaluate.add_argument("--adapter", type=Path, metavar="FOLDER", help="adapter; the base model without it")
    evaluate.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    evaluate.add_argument(
        "--predictions", type=Path, metavar="FILE", help="write the answers; needs privacy.allow_text=true"
    )
    what = "train the control arms of a run: each task alone, and all tasks with one plain LoRA"
    baseline = _add_run_verb(verbs, "baseline", _baseline, what)
    baseline.add_argument("--arm", choices=("all", "single", "multi"), default="all")
    baseline.add_argument("--steps", type=_positive, help="of each single-task run; its share of the run's")
    baseline.add_argument("--out", type=Path, metavar="FILE", help="the reference file")
    report = verbs.add_parser("report", help="one self-contained HTML file about one run or several")
    report.add_argument("runs", metavar="RUN_DIR", type=Path, nargs="+")
    report.add_argument("--out", type=Path, metavar="FILE", help="RUN_DIR/report.html where not given")
    report.add_argument("--png", type=Path, metavar="FOLDER", help="also write each chart there")
    report.set_defaults(verb=_report)
    _add_dashboard_verbs(verbs)


def _add_dashboard_verbs(verbs) -> None:  # type: ignore[no-untyped-def]
    dashboard = verbs.add_parser("dashboard", help="the W&B workspace of a run's series")
    actions = dashboard.add_subparsers(required=True, metavar="VERB", parser_class=_Parser)
    dump = actions.add_parser("dump", help="write the workspace as JSON; needs no network")
    push = actions.add_parser("push", help="save the workspace on the W&B server")
    for action, verb in ((dump, _dashboard_dump), (push, _dashboard_push)):
        action.add_argument("run", metavar="RUN_DIR", type=Path)
        action.set_defaults(verb=verb)
    dump.add_argument("--out", type=Path, metavar="FILE", help="standard output without it")
    push.add_argument("--entity", help="W&B team or user; the run's where not given")
    push.add_argument("--project", help="W&B project; the run's where not given")


def _add_run_verb(verbs, name: str, verb, description: str) -> argparse.ArgumentParser:  # type: ignore[no-untyped-def]
    parser: argparse.ArgumentParser = verbs.add_parser(name, help=description)
    parser.add_argument("run", metavar="RUN.yaml", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example training.steps=100")
    parser.set_defaults(verb=verb)
    return parser


def _add_plan_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nodes", type=_positive, default=1, help="machines to plan for")
    parser.add_argument("--gpus", type=_positive, help="ranks of each; parallel.ranks where not given")
    parser.add_argument("--gpu-memory", type=_positive, default=80, metavar="GIB", help="of each rank")
    parser.add_argument("--shape", help="plan for this model: a name such as llama-70b, or a config.json")
    parser.add_argument("--compare", action="store_true", help="show all mixing rules side by side")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a bar chart of all rules there")


def _add_data_verbs(verbs) -> None:  # type: ignore[no-untyped-def]
    data = verbs.add_parser("data", help="look at the data of a recipe")
    check = data.add_subparsers(required=True, metavar="VERB", parser_class=_Parser).add_parser(
        "check", help="rows, lengths, labels, duplicates, train/test overlap, licences and bad records"
    )
    check.add_argument("recipe", metavar="RECIPE.yaml", type=Path)
    check.add_argument("--base", help="base model whose tokens are counted; characters without it")
    check.add_argument("--max-length", type=_positive, metavar="TOKENS", help="tell the share above it")
    check.add_argument("--json", type=Path, metavar="FILE", help="write the whole report there")
    check.add_argument("--html", type=Path, metavar="FILE", help="write a page with charts there")
    check.set_defaults(verb=_data_check)


class _Parser(argparse.ArgumentParser):
    """argparse with the contract's exit code for a wrong command line."""

    def error(self, message: str) -> None:  # type: ignore[override]
        self.print_usage(sys.stderr)
        self.exit(ConfigError.exit_code, f"{self.prog}: {message}\n")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return number


def _numbers(text: str) -> list[float]:
    return [float(number) for number in text.split(",")]


def _config(options: argparse.Namespace) -> RunConfig:
    return load_config(options.run, options.overrides)


def _plan(options: argparse.Namespace) -> int:
    from moe_medical.training.layout_plan import Machines
    from moe_medical.training.mix_report import write_chart
    from moe_medical.training.plan import make_plan, show_plan

    config = _config(options)
    machines = Machines(options.nodes, options.gpus or config.parallel.ranks, options.gpu_memory)
    plan = make_plan(config, machines, options.shape)
    show_plan(plan, options.compare)
    if options.html:
        write_chart(plan.rules, options.html)
    return 0


def _launch(options: argparse.Namespace) -> int:
    from moe_medical.training.preflight import preflight
    from moe_medical.training.supervisor import run_ranks

    config = _config(options)
    preflight(config)
    return run_ranks(config.parallel.ranks, ["train", str(options.run), *options.overrides])


def _train(options: argparse.Namespace) -> int:
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else a lost peer is 20 lines of C++ frames
    from moe_medical.distributed.topology import launched_ranks
    from moe_medical.training.run import train_and_report

    die_with_supervisor()
    share_cores()
    options.overrides.append(f"parallel.ranks={launched_ranks()}")
    train_and_report(_config(options))
    return 0


def _data_check(options: argparse.Namespace) -> int:
    from moe_medical.training.data_check import run_data_check

    run_data_check(options.recipe, options.base, options.max_length, options.json, options.html)
    return 0


def _generate(options: argparse.Namespace) -> int:
    from moe_medical.evaluation.generate import Sampling
    from moe_medical.serving.answering import Generation, answer_prompts

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


def _eval(options: argparse.Namespace) -> int:
    from moe_medical.training.evaluating import evaluate_run

    arguments = ["eval", str(options.run), *options.overrides]
    for name in ("adapter", "json", "predictions"):
        if value := getattr(options, name):
            arguments += [f"--{name}", str(value)]
    return evaluate_run(_config(options), options.adapter, options.json, options.predictions, arguments)


def _baseline(options: argparse.Namespace) -> int:
    from moe_medical.training.baseline import train_baselines

    train_baselines(options.run, options.overrides, options.arm, options.steps, options.out)
    return 0


def _router_fit(options: argparse.Namespace) -> int:
    from moe_medical.training.router_fit import fit_router

    fit_router(options.run, options.overrides, options.out, options.labels, options.rows)
    return 0


def _report(options: argparse.Namespace) -> int:
    from moe_medical.tracking.report import write_report

    show(str(write_report(options.runs, options.out, options.png)))
    return 0


def _dashboard_dump(options: argparse.Namespace) -> int:
    from moe_medical.tracking.dashboard import dump_dashboard

    text = dump_dashboard(options.run, options.out)
    if options.out is None:
        show(text)
    return 0


def _dashboard_push(options: argparse.Namespace) -> int:
    from moe_medical.tracking.dashboard import push_dashboard

    show(push_dashboard(options.run, options.entity, options.project))
    return 0
