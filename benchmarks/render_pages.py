"""Writes measured results into the pages that show them; with --check only tells whether they are there."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def main() -> int:
    stale = [page for page, name in BLOCKS if render(ROOT / page, name, "--check" not in sys.argv)]
    if stale and "--check" in sys.argv:
        told = f"{', '.join(stale)} do not show benchmarks/results: run this without --check\n"
        sys.stderr.write(told)
        return 1
    return 0


def render(page: Path, name: str, write: bool) -> bool:
    """Put a block between its marks; returns whether the page said something else."""
    begin, end = f"<!-- {name}: benchmarks/render_pages.py writes this -->", f"<!-- /{name} -->"
    text = page.read_text()
    head, _, rest = text.partition(begin)
    _, _, tail = rest.partition(end)
    wanted = f"{head}{begin}\n{BLOCKS[str(page.relative_to(ROOT)), name]()}\n{end}{tail}"
    if write:
        page.write_text(wanted)
    return wanted != text


def read(name: str) -> dict[str, Any]:
    return dict(json.loads((RESULTS / f"{name}.json").read_text()))


def quickstart() -> str:
    record = read("quickstart")
    printed = "\n".join(line.rstrip() for line in record["printed"]).strip()
    fall = 100 * (1 - record["macro_loss_after"] / record["macro_loss_before"])
    minutes, install = record["seconds_total"] / 60, record["seconds_install"] / 60
    sentence = (
        f"Read back from W&B: the loss fell by {fall:.0f} %, {record['tasks_improved']} of "
        f"{record['tasks']} tasks improved. {minutes:.1f} minutes from an empty home and environment, "
        f"{install:.1f} of them installing; "
        f"{record['tokens_per_second']:.0f} tokens/s, "
        f"{record['peak_memory_bytes'] / 2**30:.1f} GiB at the peak "
        f"({record['machine']['cpu']}, {record['machine']['cores']} cores)."
    )
    return f"```text\n{printed}\n```\n\n{sentence}"


def expert_parallel() -> str:
    record = read("expert_parallel")
    cases: dict[tuple[int, ...], dict[str, dict[str, Any]]] = {}
    for row in record["rows"]:
        key = (row["world"], row["experts"], row["rank"], row["tokens"])
        cases.setdefault(key, {})[row["exchange"]] = row
    arms = list(next(iter(cases.values())))
    lines = [f"| ranks | E | rank | T | {' | '.join(arms)} | fewest bytes |", "|---" * (len(arms) + 5) + "|"]
    for key, of in cases.items():
        cells = [
            f"{of[arm]['measured_bytes'] / 1e6:.1f} MB, {of[arm]['step_seconds'] * 1e3:.0f} ms"
            for arm in arms
        ]
        fewest = min(arms, key=lambda arm: of[arm]["measured_bytes"])
        lines.append(f"| {' | '.join(map(str, key))} | {' | '.join(cells)} | {fewest} |")
    worst = max(abs(row["predicted_bytes"] / row["measured_bytes"] - 1) for row in record["rows"])
    return "\n".join(lines) + (
        f"\n\n{record['model']}; {record['backend']} ({record['machine']['cpu']}, "
        f"{record['machine']['cores']} cores); bytes that a rank sends per step, median step time of "
        f"{record['rounds']} rounds. The cost model is off by {100 * worst:.1f} % at worst."
    )


def data_pipeline() -> str:
    record = read("data_pipeline")
    parts = [pipeline_arms, pipeline_useful, pipeline_setting, pipeline_start, pipeline_memory, pipeline_wait]
    return "\n\n".join(part(record) for part in parts)


def pipeline_arms(record: dict[str, Any]) -> str:
    lines = ["| pipeline | tokens | batching | rank 0 of | tokens/s per core | CPU ms a step | tokens/s |"]
    lines.append("|---" * 7 + "|")
    for row in record["arms"]:
        core = row["tokens_per_core_second"]
        cells = [row["pipeline"], row["tokens"], row["batching"], str(row["world"])]
        cells.append(f"{core['median']:,.0f} ({core['min']:,.0f} to {core['max']:,.0f})")
        cells.append(f"{row['cpu_ms_per_step']['median']:.1f}")
        cells.append(f"{row['tokens_per_second']['median']:,.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def pipeline_useful(record: dict[str, Any]) -> str:
    rows: dict[str, dict[int, dict[str, float]]] = {}
    for row in record["useful"]:
        rows.setdefault(f"{row['pipeline']}, {row['batching']}", {})[row["world"]] = row
    worlds = sorted(next(iter(rows.values())))
    heads = [f"{n} {'rank' if n == 1 else 'ranks'}" for n in worlds] + [f"{worlds[-1]} ranks, waiting"]
    lines = [f"| useful positions | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for name, of in rows.items():
        shares = [of[n]["useful"] for n in worlds] + [of[worlds[-1]]["useful_waiting"]]
        lines.append(f"| {name} | {' | '.join(f'{100 * share:.1f} %' for share in shares)} |")
    return "\n".join(lines)


def pipeline_setting(record: dict[str, Any]) -> str:
    setting, environment = record["setting"], record["environment"]
    machine = environment["machine"]
    loads = [environment[f"load_average_{when}"][0] for when in ("before", "after")]
    return (
        f"{setting['tasks']} tasks, tokenizer of {setting['tokenizer']}, {setting['global_batch']} samples a "
        f"step, max_length {setting['max_length']}; median and range of {setting['rounds']} rounds of "
        f"{setting['steps_per_round']} steps, arms in turns ({machine['cpu']}, {machine['cores']} cores, "
        f"load average {loads[0]} before and {loads[1]} after). Both pipelines make the same tokens of "
        f"{100 * record['same_tokens']:.1f} % of the rows compared."
    )


def pipeline_start(record: dict[str, Any]) -> str:
    ours, theirs = record["ready"]["ours"], record["ready"]["datasets"]
    mine = {stage: seconds["wall"] for stage, seconds in ours["seconds"].items()}
    other = {stage: seconds["wall"] for stage, seconds in theirs["seconds"].items()}
    warm = sum(seconds for stage, seconds in mine.items() if stage.endswith("warm"))
    return (
        f"Made ready from cold: {ours['rows']:,} rows of all splits into stores in {mine['rows_cold']:.1f} s "
        f"({ours['rows_per_second']:,} rows/s), hygiene and fit in {mine['hygiene_cold']:.1f} s, "
        f"{ours['tokens'] / 1e6:.1f} million tokens in {mine['tokens_cold']:.1f} s "
        f"({ours['tokens_per_core_second']:,} tokens/s per core); from warm all of it in {warm:.1f} s. "
        f"`datasets` loads in {other['load']:.1f} s, maps in {other['map']:.1f} s "
        f"({theirs['tokens_per_core_second']:,} tokens/s per core), interleaves in "
        f"{other['interleave']:.1f} s."
    )


def pipeline_memory(record: dict[str, Any]) -> str:
    rows = record["memory"]
    sizes = sorted({row["megabytes"] for row in rows})
    grown = {
        reader: " and ".join(f"{row['private_mb']:.0f}" for row in rows if row["reader"] == reader)
        for reader in ("ours", "list of records")
    }
    mapped = max(row["with_mapped_files_mb"] for row in rows if row["reader"] == "ours")
    return (
        f"Reading a JSONL of {' and one of '.join(map(str, sizes))} MB adds {grown['ours']} MB of private "
        f"memory; a list of its records, {grown['list of records']} MB. With the pages of mapped files, "
        f"which the system takes back when it needs them, ours reaches {mapped:.0f} MB."
    )


def pipeline_wait(record: dict[str, Any]) -> str:
    training = record["training"]
    runs = [
        f"{row['wait_ms']:.2f} ms of {row['step_ms'] / 1e3:.1f} s with `workers: {row['workers']}`"
        for row in training["runs"]
    ]
    return (
        f"A training step waits for its data {' and '.join(runs)} ({training['model']}; "
        f"{training['global_batch']} samples, max_length {training['max_length']}, threads of torch: "
        f"{training['threads']})."
    )


def mixing() -> str:
    record = read("mixing")
    figures = ("macro", "worst_quartile", "rare_quartile")
    lines = ["| rule | macro loss | worst quartile | rare quartile | steps |", "|---|---|---|---|---|"]
    for arm, of in record["summary"].items():
        cells = [f"{of[figure]['mean']:.3f} ± {of[figure]['sd']:.3f}" for figure in figures]
        lines.append(f"| {arm} | {' | '.join(cells)} | {of['steps']['mean']:.0f} |")
    told = [f"{figure.replace('_', ' ')}: {text}" for figure, text in record["winners"].items()]
    settings, before = record["settings"], record["runs"][0]["before"]
    setting = (
        f"Nats per token, mean and standard deviation of {settings['seeds']} seeds, {settings['tokens']:,} "
        f"tokens a run, from a macro loss of {before:.2f}; base: {record['base']}; "
        f"{settings['loss_rows']} evaluation rows per task."
    )
    return "\n".join([*lines, "", f"Least: {'; '.join(told)}.", "", setting])


def tracking_overhead() -> str:
    record = read("tracking_overhead")
    parts = ("routing", "conflict", "evaluation", "scores", "all by default", "all with scores")
    lines = [f"| run | batch | {' | '.join(parts)} |", "|---" * (len(parts) + 2) + "|"]
    for name, case in record["cases"].items():
        costs = [f"{case['seconds'][part]['median']:.2f} s" for part in parts[:4]]
        lines.append(f"| {name} | one look | {' | '.join(costs)} | | |")
        for batch, shares in case["shares"].items():
            cells = [f"{100 * shares[part]:.2f} %" for part in parts]
            lines.append(f"| | {batch} | {' | '.join(cells)} |")
    every = record["cadence_steps"]
    case = next(iter(record["cases"].values()))
    return "\n".join(lines) + (
        f"\n\nProcessor seconds of one look, and shares of training time with a look at routing every "
        f"{every['routing']} steps, at conflict every {every['conflict']} and an evaluation every "
        f"{every['evaluation']}, the defaults; batch {case['settings']['global_batch']} was measured, larger "
        f"ones assume steps that grow in proportion ({case['machine']['cores']} cores, no GPU). Part of the "
        f"rows was measured and multiplied up; the JSON says which."
    )


def seesaw() -> str:
    record = read("seesaw")
    figures = {"macro": 3, "worst_quartile": 3, "below_single": 1, "index": 3, "regret": 4}
    columns = (
        "parameters",
        "macro loss",
        "worst quartile",
        "worse than alone",
        "seesaw index",
        "mean regret",
    )
    lines = [f"| arm | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for arm, of in record["summary"].items():
        cells = [f"{of[f]['mean']:.{n}f} ± {of[f]['sd']:.{n}f}" for f, n in figures.items()]
        lines.append(f"| {arm} | {of['trainable_parameters']['mean']:,.0f} | {' | '.join(cells)} |")
    settings, rates = record["settings"], record["learning_rates"]["chosen"]
    chosen = ", ".join(f"{family} {rate:g}" for family, rate in rates.items())
    return "\n".join(lines) + (
        f"\n\nMean and standard deviation of {settings['seeds']} seeds, {settings['tokens']:,} tokens a run, "
        f"28 tasks, {settings['loss_rows']} held-out rows each; base: {record['base']}. Learning rates, "
        f"chosen for each family by itself: {chosen}."
    )


IN_README = (
    "base, backward as of adapters",
    "PEFT LoRA E*r",
    "ours token",
    "ours task",
    "ours joint",
    "mixlora 0.2.3",
    "moe-peft 2.0.2 MoLA",
    "eulerforge 0.1.0",
    "PEFT X-LoRA",
    "MING's form",
    "MOELoRA's form",
)


def adapters_short() -> str:
    """Arms that a reader compares, on the small model; the page on adapters has all."""
    record = read("adapters")
    cases = [case for case in record["cases"] if case["model"] == record["cases"][0]["model"]]
    parts = [adapters_table(cases, IN_README), adapters_setting(record, cases), adapters_generation(record)]
    return "\n\n".join(parts)


def adapters_all() -> str:
    record = read("adapters")
    parts = []
    for model in dict.fromkeys(case["model"] for case in record["cases"]):
        cases = [case for case in record["cases"] if case["model"] == model]
        arms = [name for name in cases[0]["arms"] if any(measured(case["arms"][name]) for case in cases)]
        parts += [adapters_table(cases, arms), adapters_setting(record, cases)]
    profiles = [record["profile"], *(batch.get("profile") for batch in record["generation"])]
    told = [of["in_words"] for of in profiles if of]
    return "\n\n".join([*parts, adapters_generation(record), adapters_aims(record), *told])


def measured(arm: dict[str, Any]) -> bool:
    return bool(arm["status"] == "measured")


def clock(case: dict[str, Any]) -> str:
    return "gpu_ms" if case["device"] == "cuda" else "cpu_ms"


def adapters_table(cases: list[dict[str, Any]], arms: Iterable[str]) -> str:
    several = len({case["dtype"] for case in cases}) > 1
    heads = [f"{case['shape']}, {case['dtype']}" if several else case["shape"] for case in cases]
    lines = [f"| ms a step (MiB saved) | {' | '.join(heads)} |", "|---" * (len(cases) + 1) + "|"]
    for name in arms:
        cells = [adapters_cell(case["arms"][name], clock(case)) for case in cases]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def adapters_cell(arm: dict[str, Any], by: str) -> str:
    if not measured(arm):
        return str(arm["status"]).partition(":")[0].partition(",")[0]
    return f"{arm[by]['median']:.0f} ({arm['saved_mib']:.0f})"


def adapters_setting(record: dict[str, Any], cases: list[dict[str, Any]]) -> str:
    setting, environment = record["setting"], record["environment"]
    machine, versions = environment["machine"], environment["versions"]
    rounds = [case["rounds"] for case in cases]
    told = f"{min(rounds)}" if min(rounds) == max(rounds) else f"{min(rounds)} to {max(rounds)}"
    time = "GPU" if clock(cases[0]) == "gpu_ms" else "processor"
    tokens = setting["rows"] * setting["positions"]
    return (
        f"{cases[0]['model']}, {tokens} tokens, adapters on gate, up and down; "
        f"forward and backward, median of {told} rounds, arms in turns, {time} time, one thread "
        f"({machine['cpu']}, {machine['cores']} cores; torch {versions['torch']}, PEFT {versions['peft']})."
    )


def adapters_generation(record: dict[str, Any]) -> str:
    batches = record["generation"]
    heads = [f"{batch['rows']} {'row' if batch['rows'] == 1 else 'rows'}" for batch in batches]
    title = f"tokens/s of SmolLM2-135M, {batches[0]['shape']}"
    lines = [f"| {title} | {' | '.join(heads)} |", "|---" * (len(batches) + 1) + "|"]
    for name in batches[0]["tokens_per_second"]:
        speeds = [batch["tokens_per_second"][name] for batch in batches]
        cells = [f"{of['median']:.1f} ({of['least']:.1f} to {of['most']:.1f})" for of in speeds]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def adapters_aims(record: dict[str, Any]) -> str:
    lines = ["| aim | where | ratio | limit | if adapters cost nothing | |", "|---" * 6 + "|"]
    for aim in record["aims"]:
        of, verdict = aim["ratio"], "met" if aim["met"] else "not met"
        free = aim["if_adapters_cost_nothing"]
        limit = f"≤ {aim['at_most']:.2f}" if "at_most" in aim else f"≥ {aim['at_least']:.2f}"
        found = f"{of['median']:.2f} ({of['least']:.2f} to {of['most']:.2f})"
        lines.append(f"| {aim['aim']} | {aim['where']} | {found} | {limit} | {free:.2f} | {verdict} |")
    return "\n".join(lines)


BLOCKS: dict[tuple[str, str], Callable[[], str]] = {
    ("README.md", "quickstart"): quickstart,
    ("docs/parallelism.md", "expert_parallel"): expert_parallel,
    ("docs/data.md", "data_pipeline"): data_pipeline,
    ("docs/data.md", "mixing"): mixing,
    ("docs/seesaw.md", "tracking_overhead"): tracking_overhead,
    ("docs/seesaw.md", "seesaw"): seesaw,
    ("README.md", "adapters"): adapters_short,
    ("docs/adapters.md", "adapters"): adapters_all,
}


if __name__ == "__main__":
    sys.exit(main())
