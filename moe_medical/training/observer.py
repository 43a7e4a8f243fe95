"""What a run sees of its tasks while it trains, and whom it tells.

    evaluation -> the seesaw: who gained and who paid      evaluation.every_steps
    step       -> routing: which task used which expert    tracking.routing_every_steps, and the last step
               -> conflict: whose gradients clash          tracking.conflict_every_steps, and the last step

Each look is a JSON file in the run's folder, series in `metrics.jsonl` and every other sink, a table or heat
map, and an alert where something is wrong. Looks change no number of the training.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence

import numpy as np

from moe_medical.adapters.routing import RoutingContext
from moe_medical.config import MoloraConfig, RunConfig
from moe_medical.console import progress_line
from moe_medical.distributed.engine import Engine
from moe_medical.evaluation.evaluate import Evaluation, Evaluator
from moe_medical.files import write_json
from moe_medical.tracking.conflict import Conflict, conflict_overlap, shared_experts
from moe_medical.tracking.reference import load_reference
from moe_medical.tracking.routing_stats import RoutingStats, RoutingWatch
from moe_medical.tracking.seesaw import SeesawStep, SeesawTracker
from moe_medical.tracking.sinks import Sinks
from moe_medical.training.callback import Callback
from moe_medical.training.conflict_probe import ConflictProbe
from moe_medical.training.data_module import Feed
from moe_medical.training.guard import Decision
from moe_medical.training.routing_counts import RoutingCounts
from moe_medical.training.run_folder import RunFolder

_LOG = logging.getLogger(__name__)


class Observer(Callback):
    """The eyes of one run. Collective: every rank must make the same calls.

    Args:
        config: The run.
        feed: Its tasks.
        adapters: Its adapter settings.
        engine: What it trains.
        context: Of the engine's layers.
        folder: Takes a file of each look.
        sinks: Of the main rank; filled before the first look.

    Attributes:
        evaluator: Makes the evaluations.
        seen: The newest evaluation against those before it, on the main rank.
    """

    def __init__(
        self,
        config: RunConfig,
        feed: Feed,
        adapters: MoloraConfig,
        engine: Engine,
        context: RoutingContext,
        folder: RunFolder,
        sinks: Sinks,
    ) -> None:
        self._config, self._adapters, self._folder, self._sinks = config.tracking, adapters, folder, sinks
        self._last_step, self._topology, self._model = config.training.steps, engine.topology, engine.module
        self._tasks = [task.name for task in feed.tasks]
        where = (engine.topology, engine.needs_equal_forwards, context)
        self.evaluator = Evaluator(feed.tasks, feed.chat, config.evaluation, *where)
        path = config.tracking.seesaw.reference
        reference = load_reference(path, self._tasks) if path else None
        self._seesaw = SeesawTracker(self._tasks, config.tracking.seesaw, reference)
        self._counts = RoutingCounts(engine, context, len(self._tasks))
        self._probe = ConflictProbe(config, feed.tasks, feed.chat, engine, context)
        self._watch = RoutingWatch()
        self._conflict: Conflict | None = None
        self._routing: RoutingStats | None = None
        self._evaluated, self._alarmed = -1, frozenset[str]()
        self.seen: SeesawStep | None = None

    def replay(self, first: int) -> None:
        """See again what an earlier part of the run saw until step `first`."""
        if self._topology.is_main:
            for evaluation in self._folder.evaluations_until(first):
                self._alarmed = frozenset(self._compare(evaluation).alarms)
            for path in self._folder.of_each_step(self._folder.routing(0)):
                self._routing = RoutingStats.from_json(json.loads(path.read_text()))
                self._watch.look(self._routing)
            for path in self._folder.of_each_step(self._folder.conflict(0))[-1:]:
                self._conflict = Conflict.from_json(json.loads(path.read_text()))
        if self._config.conflict_every_steps and self._probe.reason:
            _LOG.info("no angles between the tasks' gradients with %s", self._probe.reason)

    # Evaluations

    def evaluate(
        self, step: int, label: str, tokens: int, poll: Callable[[], None], scores: bool = True
    ) -> Evaluation:
        """The evaluation after `step` steps; a resumed run reads it back instead of repeating it.

        Args:
            step: Optimizer steps done.
            label: Of the progress line.
            tokens: That the run has trained on.
            poll: Called after each batch.
            scores: Whether answers are made and scored too.
        """
        known = self._known(step, scores)
        everywhere = self._topology.sum(np.array([known is not None]))[0] == self._topology.world_size
        if known is not None and everywhere:
            if self._topology.is_main:
                self._compare(known)
            return known
        total = self.evaluator.num_batches(scores)
        with progress_line(label, total, self._topology.is_main) as progress:

            def advance() -> None:
                progress.advance()
                poll()

            evaluation = self.evaluator.run(self._model, step, advance, scores)
        if self._topology.is_main:
            self._tell_evaluation(evaluation, tokens)
            self._folder.write_evaluation(evaluation)
        self._topology.barrier()
        return evaluation

    def _known(self, step: int, scores: bool) -> Evaluation | None:
        """The evaluation on disk, unless it lacks scores that are asked for."""
        found = self._folder.read_evaluation(step)
        lacks = found is not None and scores and self.evaluator.makes_scores and found.macro_score is None
        return None if lacks else found

    def _tell_evaluation(self, evaluation: Evaluation, tokens: int) -> None:
        step, seen = evaluation.step, self._compare(evaluation)
        self._sinks.log(evaluation.values() | seen.values() | {"tokens": tokens}, step)
        self._sinks.table("seesaw/tasks", *seen.table(), step)
        alarmed = frozenset(seen.alarms)
        if new := sorted(alarmed - self._alarmed):
            self._alert("task regressed", f"after {step} steps, below their best: {', '.join(new)}")
        self._alarmed = alarmed

    def _compare(self, evaluation: Evaluation) -> SeesawStep:
        if evaluation.step > self._evaluated or self.seen is None:
            self._evaluated = evaluation.step
            self.seen = self._seesaw.update(evaluation.tasks)
        return self.seen

    # Steps

    def before_step(self, step: int) -> None:
        """Begin to count routings where step `step` is one to be counted."""
        if self._counts.layers and self._due(self._config.routing_every_steps, step + 1):
            self._counts.begin()

    def after_forward(self) -> None:
        """Count the micro-batch that is bound, where routings are counted."""
        if self._counts.is_open:
            self._counts.add()

    def step_done(self, done: int, tokens: int) -> None:
        """Look at what is due after `done` steps."""
        values: dict[str, float] = {}
        conflict_due = self._due(self._config.conflict_every_steps, done) and self._probe.reason is None
        if conflict_due:
            self._conflict = self._probe.measure(done)
        if self._counts.layers and self._due(self._config.routing_every_steps, done):
            values |= self._tell_routing(self._counts.total(), done)
        if not self._topology.is_main:
            return
        if conflict_due and self._conflict is not None:
            values |= self._tell_conflict(self._conflict, done)
        if values:
            self._sinks.log(values | {"tokens": tokens}, done)

    def tell_decisions(self, decisions: Sequence[Decision], tokens: int) -> None:
        """Write down what was decided, and why, unless that was done before. Of the main rank."""
        for decision in decisions:
            if not self._folder.add_decision(decision.to_json()):
                continue
            about = f"{decision.action} {decision.task}" if decision.task else decision.action
            text = f"after {decision.step} steps: {about}: {decision.cause}"
            if decision.action == "mixture":  # there are many
                _LOG.info("%s", text)
                self._sinks.log({**decision.numbers, "tokens": tokens}, decision.step)
            else:
                self._alert("decision", text)

    def _due(self, every: int, done: int) -> bool:
        return every > 0 and (done % every == 0 or done == self._last_step)

    def _tell_routing(self, counts_LTE: np.ndarray, done: int) -> dict[str, float]:
        per_task, top_k = self._adapters.router == "task", self._adapters.active()
        what = (self._tasks, self._counts.layers, top_k, per_task, self._counts.experts)
        self._routing = stats = RoutingStats(counts_LTE, *what)
        if not self._topology.is_main:
            return {}
        write_json(self._folder.routing(done), stats.to_json(done), indent=None)
        self._sinks.heat_map("router/task_expert", stats.task_expert(), done)
        for title, text in self._watch.look(stats):
            self._alert(title, f"after {done} steps: {text}")
        return stats.values() | (conflict_overlap(self._conflict, stats) if self._conflict else {})

    def _tell_conflict(self, conflict: Conflict, done: int) -> dict[str, float]:
        write_json(self._folder.conflict(done), conflict.to_json(done), indent=None)
        self._sinks.heat_map("conflict/cosine", conflict.triples(), done)
        for shared in shared_experts(conflict, self._routing)[:3] if self._routing else ():
            _LOG.info("after %d steps %s", done, shared.sentence())
        return conflict.values()

    def _alert(self, title: str, text: str) -> None:
        _LOG.warning("%s: %s", title, text)
        self._sinks.alert(title, text)
