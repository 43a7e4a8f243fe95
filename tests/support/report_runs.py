"""Run folders as long runs leave them: many tasks and evaluations, conflicts, routing, decisions."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from moe_medical.config.load import save_config
from moe_medical.config.schema import RunConfig
from moe_medical.tracking.conflict import Conflict, conflict_overlap
from moe_medical.tracking.routing_stats import RoutingStats
from moe_medical.tracking.run_paths import RunPaths
from moe_medical.tracking.seesaw import SeesawTracker
from moe_medical.tracking.task_track import ProbeLosses

NAMES = [
    *("cmeee", "cmeie", "imcs_ner", "imcs_dac", "imcs_sr", "imcs_mrg", "mediqa_summaries", "pubmedqa"),
    *("medmcqa", "headqa_en", "chemprot", "ehr_rel", "covid_qa", "icd10cm_code_to_description"),
    *("icd10cm_description_to_code", "icd10cm_odd_one_out", "icd10cm_synonym_to_description", "hpo_is_a"),
    *("hpo_term_to_definition", "hpo_gene_disease", "hpo_disease_inheritance", "medical_abstracts"),
    *("terminology_of_rare_diseases_with_a_very_long_name_indeed", "icd10cm_pressure_ulcer_stage"),
]
ROWS = 24
"""Probe rows of each task."""
_TOKENS = 12 * ROWS
_METRICS = ("micro_f1", "accuracy", "rouge_l", "exact_match")


@dataclass
class LongRun:
    """What to write. `payers` lose from the middle of the run on what `gainers` win."""

    tasks: int = 24
    evaluations: int = 12
    every: int = 200
    seed: int = 0
    layers: int = 24
    experts: int = 8
    looks: bool = True
    """Whether there are conflicts, routing and decisions."""
    learns: float = 1.0
    """How much of the losses goes away."""
    payers: int = 3
    overrides: dict[str, Any] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        return [NAMES[i] if i < len(NAMES) else f"{NAMES[i % len(NAMES)]}_{i}" for i in range(self.tasks)]

    @property
    def steps(self) -> int:
        return (self.evaluations - 1) * self.every

    def write(self, folder: Path) -> Path:
        """Write the run's folder, and give it back."""
        paths, rng = RunPaths(folder), np.random.default_rng(self.seed)
        for path in (paths.evaluation(0), paths.conflict(0), paths.routing(0)):
            path.parent.mkdir(parents=True, exist_ok=True)
        self._write_config(paths)
        rows = self._evaluations(paths, rng)
        rows |= self._looks(paths, rng, rows) if self.looks else {}
        rows = self._training(rng, rows)
        lines = [json.dumps({"step": step, **rows[step]}) for step in sorted(rows)]
        paths.metrics.write_text("".join(f"{line}\n" for line in lines))
        return folder

    def _write_config(self, paths: RunPaths) -> None:
        config = RunConfig()
        config.run.name, config.run.dir = paths.root.name, str(paths.root)
        config.model.name, config.data.recipe = str(paths.root / "model"), str(paths.root / "mixture.yaml")
        config.parallel.deepspeed, config.training.steps = str(paths.root / "zero2.json"), self.steps
        for key, value in self.overrides.items():
            section, _, name = key.rpartition(".")
            owner: Any = config
            for part in section.split("."):
                owner = getattr(owner, part)
            setattr(owner, name, value)
        save_config(config, paths.config)

    def _shares(self) -> np.ndarray:
        sizes = 1 / np.arange(1, self.tasks + 1) ** 0.9
        return sizes / sizes.sum()

    def _curves(self, rng: np.random.Generator) -> np.ndarray:
        """Loss per token, shape (tasks, evaluations)."""
        t = np.linspace(0, 1, self.evaluations)
        start, floor = rng.uniform(1.2, 3.6, self.tasks), rng.uniform(0.25, 0.6, self.tasks)
        speed = rng.uniform(1.5, 7, self.tasks)
        curves = start[:, None] * (floor[:, None] ** (self.learns * (1 - np.exp(-speed[:, None] * t))))
        for i in range(min(self.payers, self.tasks - 1)):
            late = np.clip(t - 0.45 - 0.1 * i, 0, None)
            curves[-1 - i] *= 1 + (0.5 + 0.2 * i) * late
        return curves

    def _evaluations(self, paths: RunPaths, rng: np.random.Generator) -> dict[int, dict[str, Any]]:
        curves, rows = self._curves(rng), {}
        hard = rng.uniform(0.4, 1.8, (self.tasks, ROWS))
        tracker = SeesawTracker(self.names, RunConfig().tracking.seesaw)
        for e in range(self.evaluations):
            wobble = 1 + 0.02 * rng.standard_normal((self.tasks, ROWS))
            losses = curves[:, e, None] * hard / hard.mean(1, keepdims=True) * wobble * _TOKENS / ROWS
            step = e * self.every
            tasks = {name: self._task(i, e, losses[i]) for i, name in enumerate(self.names)}
            paths.evaluation(step).write_text(json.dumps({"step": step, "tasks": tasks}))
            seen = tracker.update({n: ProbeLosses(tuple(t["row_losses"]), _TOKENS) for n, t in tasks.items()})
            rows[step] = self._evaluation_row(tasks) | seen.values()
        return rows

    def _task(self, number: int, e: int, losses: np.ndarray) -> dict[str, Any]:
        loss = float(losses.sum() / _TOKENS)
        score = float(np.clip(1.05 - 0.33 * loss, 0, 1))
        half, metric = 0.06 + 0.004 * (number % 7), _METRICS[number % len(_METRICS)]
        return {
            "loss": loss,
            "tokens": _TOKENS,
            "rows": ROWS,
            "metric": metric,
            "score": score,
            "score_rows": ROWS,
            "row_losses": losses.tolist(),
            "score_low": max(0.0, score - half),
            "score_high": min(1.0, score + half),
            "scores": {metric: score},
        }

    def _evaluation_row(self, tasks: dict[str, Any]) -> dict[str, Any]:
        row = {f"eval_loss/{name}": t["loss"] for name, t in tasks.items()}
        row |= {f"eval_score/{name}": t["score"] for name, t in tasks.items()}
        row["eval/macro_loss"] = float(np.mean([t["loss"] for t in tasks.values()]))
        row["eval/macro_score"] = float(np.mean([t["score"] for t in tasks.values()]))
        row |= {f"mtl_gain/{n}": 0.3 - 0.1 * i for i, n in enumerate(self.names) if i % 2 == 0 and i < 9}
        return row

    def _training(self, rng: np.random.Generator, rows: dict[int, Any]) -> dict[int, Any]:
        key = f"eval_loss/{self.names[0]}"
        evaluated = sorted(step for step, row in rows.items() if key in row)
        losses = np.array([[rows[step][f"eval_loss/{n}"] for n in self.names] for step in evaluated])
        shares, seen, sizes = self._shares(), np.zeros(self.tasks), 20_000 * self._shares()
        for step in range(10, self.steps + 1, 10):
            if self.looks and step % 400 == 0:
                shares = shares * rng.uniform(0.8, 1.25, self.tasks)
                shares /= shares.sum()
            seen += shares * 320
            row = rows.setdefault(step, {})
            for i, name in enumerate(self.names):
                noise = 1 + 0.08 * rng.standard_normal()
                row[f"train_loss/{name}"] = float(np.interp(step, evaluated, losses[:, i]) * noise)
                row[f"mix/{name}"] = float(seen[i] / seen.sum())
                row[f"repeats/{name}"] = float(seen[i] / sizes[i])
            row |= self._health(rng, step)
        for step, row in rows.items():
            row["tokens"] = step * 4096
        return rows

    def _health(self, rng: np.random.Generator, step: int) -> dict[str, float]:
        return {
            "loss": 2.0,
            "learning_rate": 2e-4 * (1 - step / self.steps),
            "grad_norm": float(rng.gamma(4, 0.2)),
            "step_seconds": float(rng.gamma(40, 0.01)),
            "tokens_per_second": float(8000 + 300 * rng.standard_normal()),
            "health/useful_positions": 0.97,
            "health/data_wait_seconds": 0.002,
            "health/memory_gib": 31.2 + step / 1e4,
        }

    def _looks(self, paths: RunPaths, rng: np.random.Generator, rows: dict[int, Any]) -> dict[int, Any]:
        group = np.arange(self.tasks) % 3
        apart = np.where(group[:, None] == group[None], 0.35, -0.12)
        found: dict[int, dict[str, Any]] = {}
        for step in range(500, self.steps + 1, 500):
            noise = 0.05 * rng.standard_normal((self.tasks, self.tasks))
            gram = apart + (noise + noise.T) / 2
            np.fill_diagonal(gram, 1.0)
            conflict = Conflict(self.names, gram, np.ones(self.tasks), 2 / 64)
            stats = self._routing(rng, group)
            paths.conflict(step).write_text(json.dumps(conflict.to_json(step)))
            paths.routing(step).write_text(json.dumps(stats.to_json(step)))
            found[step] = (
                rows.get(step, {}) | conflict.values() | stats.values() | conflict_overlap(conflict, stats)
            )
        self._decide(paths)
        return found

    def _routing(self, rng: np.random.Generator, group: np.ndarray) -> RoutingStats:
        logits = 0.5 * rng.standard_normal((self.layers, self.tasks, self.experts))
        deep = np.linspace(0, 2.5, self.layers)[:, None, None]
        logits += deep * (np.arange(self.experts)[None, None] % 3 == group[None, :, None] % 2)
        logits[3, :, 5] = -12
        shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        counts = np.round(shares * rng.integers(500, 4000, self.tasks)[None, :, None])
        layers = [f"model.layers.{i}.mlp.down_proj" for i in range(self.layers)]
        return RoutingStats(counts, self.names, layers, 2)

    def _decide(self, paths: RunPaths) -> None:
        steps = range(400, self.steps + 1, 400)
        cause = "regret rule: shares follow the regrets"
        decisions: list[dict[str, Any]] = [
            {"step": step, "action": "mixture", "task": None, "cause": cause, "rate": 1.0} for step in steps
        ]
        why = "its evaluation loss left its best by more than noise, 2 evaluations in a row"
        for step, action in ((1600, "reweight"), (2000, "freeze")):
            decisions.append({"step": step, "action": action, "task": self.names[-1], "cause": why})
        decisions.sort(key=lambda d: d["step"])
        paths.decisions.write_text("".join(json.dumps(d) + "\n" for d in decisions))
