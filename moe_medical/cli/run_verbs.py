"""Verbs about a run: plan, launch, train, data check, router fit, eval, baseline, report, dashboard."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from moe_medical.cli.parsing import Parser, add_run_verb, positive, read_config
from moe_medical.console import show
from moe_medical.training.supervisor import die_with_supervisor, share_cores


def add_run_verbs(verbs) -> None:  # type: ignore[no-untyped-def]
    """Every verb that takes a run file, a recipe or a run's folder."""
    plan = add_run_verb(verbs, "plan", _plan, "print what a run will do: mixture, adapted layers, layouts")
    _add_plan_options(plan)
    add_run_verb(verbs, "launch", _launch, "start a run's ranks on this machine and look after them")
    add_run_verb(verbs, "train", train, "one rank of a run; for launchers such as deepspeed")
    _add_data_verbs(verbs)
    _add_router_verbs(verbs)
    _add_result_verbs(verbs)


def _add_plan_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nodes", type=positive, default=1, help="machines to plan for")
    parser.add_argument("--gpus", type=positive, help="ranks of each; parallel.ranks where not given")
    parser.add_argument("--gpu-memory", type=positive, default=80, metavar="GIB", help="of each rank")
    parser.add_argument("--shape", help="plan for this model: a name such as llama-70b, or a config.json")
    parser.add_argument("--compare", action="store_true", help="show all mixing rules side by side")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a bar chart of all rules there")


def _add_data_verbs(verbs) -> None:  # type: ignore[no-untyped-def]
    data = verbs.add_parser("data", help="look at the data of a recipe")
    check = data.add_subparsers(required=True, metavar="VERB", parser_class=Parser).add_parser(
        "check", help="rows, lengths, labels, duplicates, train/test overlap, licences and bad records"
    )
    check.add_argument("recipe", metavar="RECIPE.yaml", type=Path)
    check.add_argument("--base", help="base model whose tokens are counted; characters without it")
    check.add_argument("--max-length", type=positive, metavar="TOKENS", help="tell the share above it")
    check.add_argument("--json", type=Path, metavar="FILE", help="write the whole report there")
    check.add_argument("--html", type=Path, metavar="FILE", help="write a page with charts there")
    check.set_defaults(verb=_data_check)


def _add_router_verbs(verbs) -> None:  # type: ignore[no-untyped-def]
    router = verbs.add_parser("router", help="fit routers before training")
    what = "fit a run's routers to labels of its tasks, for adapters.router_from"
    fit = add_run_verb(
        router.add_subparsers(required=True, metavar="VERB", parser_class=Parser), "fit", _router_fit, what
    )
    fit.add_argument("--out", type=Path, metavar="FOLDER", required=True, help="folder to write")
    kinds = "task, kind, language, tags in order (a,b,c), or a YAML or JSON file of task: label"
    fit.add_argument("--labels", default="task", help=f"what the experts stand for: {kinds}")
    fit.add_argument("--rows", type=positive, default=256, help="training rows of each label at most")


def _add_result_verbs(verbs) -> None:  # type: ignore[no-untyped-def]
    what = "loss and scores of every task of a run file, with an adapter or for the base model alone"
    evaluate = add_run_verb(verbs, "eval", evaluate_run_file, what)
    evaluate.add_argument("--adapter", type=Path, metavar="FOLDER", help="adapter; the base model without it")
    parts = "part of the adapter: attention, ffn, routed, plain, shared or a pattern; all without it"
    evaluate.add_argument("--only", action="append", default=[], metavar="PART", help=parts)
    evaluate.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    evaluate.add_argument(
        "--predictions", type=Path, metavar="FILE", help="write the answers; needs privacy.allow_text=true"
    )
    what = "train the control arms of a run: each task alone, and all tasks with one plain LoRA"
    baseline = add_run_verb(verbs, "baseline", _baseline, what)
    baseline.add_argument("--arm", choices=("all", "single", "multi"), default="all")
    baseline.add_argument("--steps", type=positive, help="of each single-task run; its share of the run's")
    baseline.add_argument("--out", type=Path, metavar="FILE", help="the reference file")
    report = verbs.add_parser("report", help="one self-contained HTML file about one run or several")
    report.add_argument("runs", metavar="RUN_DIR", type=Path, nargs="+")
    report.add_argument("--out", type=Path, metavar="FILE", help="RUN_DIR/report.html where not given")
    report.add_argument("--png", type=Path, metavar="FOLDER", help="also write each chart there")
    report.set_defaults(verb=_report)
    _add_dashboard_verbs(verbs)


def _add_dashboard_verbs(verbs) -> None:  # type: ignore[no-untyped-def]
    dashboard = verbs.add_parser("dashboard", help="the W&B workspace of a run's series")
    actions = dashboard.add_subparsers(required=True, metavar="VERB", parser_class=Parser)
    dump = actions.add_parser("dump", help="write the workspace as JSON; needs no network")
    push = actions.add_parser("push", help="save the workspace on the W&B server")
    for action, verb in ((dump, _dashboard_dump), (push, _dashboard_push)):
        action.add_argument("run", metavar="RUN_DIR", type=Path)
        action.set_defaults(verb=verb)
    dump.add_argument("--out", type=Path, metavar="FILE", help="standard output without it")
    push.add_argument("--entity", help="W&B team or user; the run's where not given")
    push.add_argument("--project", help="W&B project; the run's where not given")


def _plan(options: argparse.Namespace) -> int:
    from moe_medical.planning.layout_plan import Machines
    from moe_medical.planning.mix_report import write_chart
    from moe_medical.planning.plan import make_plan, show_plan

    config = read_config(options)
    machines = Machines(options.nodes, options.gpus or config.parallel.ranks, options.gpu_memory)
    plan = make_plan(config, machines, options.shape)
    show_plan(plan, options.compare)
    if options.html:
        write_chart(plan.rules, options.html)
    return 0


def _launch(options: argparse.Namespace) -> int:
    from moe_medical.planning.preflight import preflight
    from moe_medical.training.supervisor import run_ranks

    config = read_config(options)
    preflight(config)
    return run_ranks(config.parallel.ranks, ["train", str(options.run), *options.overrides])


def train(options: argparse.Namespace) -> int:
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else a lost peer is 20 lines of C++ frames
    from moe_medical.distributed.topology import launched_ranks
    from moe_medical.training.run import train_and_report

    die_with_supervisor()
    share_cores()
    options.overrides.append(f"parallel.ranks={launched_ranks()}")
    train_and_report(read_config(options))
    return 0


def _data_check(options: argparse.Namespace) -> int:
    from moe_medical.planning.data_check import run_data_check

    run_data_check(options.recipe, options.base, options.max_length, options.json, options.html)
    return 0


def _router_fit(options: argparse.Namespace) -> int:
    from moe_medical.training.router_fit import fit_router

    fit_router(options.run, options.overrides, options.out, options.labels, options.rows)
    return 0


def evaluate_run_file(options: argparse.Namespace) -> int:
    from moe_medical.training.evaluate_run import evaluate_run

    arguments = ["eval", str(options.run), *options.overrides]
    for name in ("adapter", "json", "predictions"):
        if value := getattr(options, name):
            arguments += [f"--{name}", str(value)]
    arguments += [word for part in options.only for word in ("--only", part)]
    files = (options.adapter, options.json, options.predictions)
    return evaluate_run(read_config(options), *files, arguments, options.only)


def _baseline(options: argparse.Namespace) -> int:
    from moe_medical.training.baseline import train_baselines

    train_baselines(options.run, options.overrides, options.arm, options.steps, options.out)
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
