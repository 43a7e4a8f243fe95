"""Conflicts between tasks: hand-made gradients, noise, and the experts that tasks in conflict share."""

from __future__ import annotations

import json

import numpy as np
import pytest

from moe_medical.tracking.conflict import (
    FALSE_RATE,
    Conflict,
    SharedExperts,
    conflict_overlap,
    shared_experts,
)
from moe_medical.tracking.routing_stats import RoutingStats

ANGLES = np.array([[1.0, 0.0], [-1.0, 1.0], [0.0, 2.0], [0.0, 0.0]])
"""Gradients of four tasks: a and b are 135 degrees apart, b and c 45, a and c 90; d has none."""
TASKS = ("a", "b", "c", "d")


def _conflict(size: int | None = None) -> Conflict:
    return Conflict.of(ANGLES @ ANGLES.T, TASKS, size)


def _from(cosines: dict[tuple[int, int], float], noise: float, tasks: int = 4) -> Conflict:
    matrix = np.eye(tasks)
    for (i, j), cosine in cosines.items():
        matrix[i, j] = matrix[j, i] = cosine
    return Conflict(TASKS[:tasks], matrix, np.ones(tasks), noise)


def test_angles_by_hand() -> None:
    conflict, half = _conflict(), np.sqrt(0.5)
    assert conflict.cosine_TT[:3, :3] == pytest.approx(
        np.array([[1, -half, 0], [-half, 1, half], [0, half, 1]])
    )
    assert np.isnan(conflict.cosine_TT[3]).all()
    assert np.isnan(conflict.cosine_TT[:, 3]).all()
    assert conflict.norm_T == pytest.approx([1, np.sqrt(2), 2, 0])
    assert conflict.worst is not None
    assert conflict.worst[:2] == ("a", "b")
    assert conflict.values() == pytest.approx(
        {
            "conflict/rate": 1 / 3,
            "conflict/mass": half,
            "conflict/mean_cosine": 0,
            "conflict/worst_cosine": -half,
            "conflict/strong_pairs": 1,
        }
    )


def test_what_noise_explains_is_no_conflict_and_only_sure_pairs_are_named() -> None:
    conflict = _from({(0, 1): -0.02, (0, 2): -0.05, (1, 3): -0.3}, noise=0.03)
    assert [pair[:2] for pair in conflict.conflicts] == [("b", "d"), ("a", "c")]
    assert [pair[:2] for pair in conflict.strong] == [("b", "d")]
    assert conflict.rate == pytest.approx(2 / 6)
    assert conflict.mass == pytest.approx(0.35)
    assert Conflict.of(np.eye(2), "ab", 4096).noise == pytest.approx(2 / 64)


def test_noise_alone_passes_as_often_as_is_said() -> None:
    """Sketches of size k of unrelated gradients are unrelated vectors of k numbers."""
    vectors = np.random.default_rng(0).normal(size=(400, 1024))
    conflict = Conflict.of(vectors @ vectors.T, [str(i) for i in range(400)], 1024)
    assert conflict.rate == pytest.approx(FALSE_RATE, rel=0.1)
    assert len(conflict.strong) / len(conflict.pairs) < 2e-4


def test_fewer_than_two_gradients_say_nothing() -> None:
    alone = Conflict.of(np.diag([0.0, 2.0]), "ab", 4096)
    assert alone.values() == {}
    assert alone.worst is None
    assert alone.triples() == [("b", "b", pytest.approx(1))]
    assert _from({}, 0.1).values()["conflict/rate"] == 0


def test_the_heat_map_has_both_halves_of_what_is_known() -> None:
    triples = _conflict().triples()
    assert len(triples) == 9
    assert {(a, b): c for a, b, c in triples}["b", "a"] == pytest.approx(-np.sqrt(0.5))


def test_json_brings_everything_back() -> None:
    conflict = _conflict(4096)
    data = json.loads(json.dumps(conflict.to_json(500), allow_nan=False))
    assert data["cosine_TT"][3] == [None] * 4
    assert data["step"] == 500
    back = Conflict.from_json(data)
    np.testing.assert_array_equal(back.cosine_TT, conflict.cosine_TT)
    assert (back.norm_T == conflict.norm_T).all()
    assert (list(back.tasks), back.noise) == (list(conflict.tasks), conflict.noise)


# Shared experts


def _routing(usage_LTE: object, layers: tuple[str, ...]) -> RoutingStats:
    return RoutingStats(1000 * np.array(usage_LTE, dtype=float), TASKS[: len(usage_LTE[0])], layers)  # type: ignore[index]


def test_conflict_on_shared_and_on_separate_experts() -> None:
    apart = _routing([[[1, 0], [0, 1], [1, 0]]], ("l",))
    assert conflict_overlap(_from({(0, 1): -0.5}, 0, 3), apart) == {"router/conflict_overlap": 0}
    assert conflict_overlap(_from({(0, 2): -0.5}, 0, 3), apart)["router/conflict_overlap"] == pytest.approx(1)
    both = conflict_overlap(_from({(0, 1): -0.6, (0, 2): -0.2}, 0, 3), apart)
    assert both["router/conflict_overlap"] == pytest.approx(0.25)


def test_overlap_needs_a_conflict_and_routed_layers() -> None:
    routing = _routing([[[1, 0], [0, 1], [0, 0]]], ("l",))
    assert conflict_overlap(_from({(0, 1): -0.01}, 0.1, 3), routing) == {"router/conflict_overlap": 0}
    assert conflict_overlap(_from({(0, 2): -0.5}, 0, 3), routing) == {"router/conflict_overlap": 0}, (
        "c is absent"
    )
    plain = RoutingStats(np.zeros((0, 3, 0)), TASKS[:3], ())
    assert conflict_overlap(_from({(0, 1): -0.5}, 0, 3), plain) == {}


def test_other_tasks_are_refused() -> None:
    with pytest.raises(ValueError, match="other tasks"):
        conflict_overlap(_conflict(), _routing([[[1, 0]]], ("l",)))


def test_tasks_in_another_order_are_found_by_name() -> None:
    routing = _routing([[[1, 0], [0, 1], [1, 0]]], ("l",))
    turned = RoutingStats(routing.counts_LTE[:, [2, 0, 1]], ("c", "a", "b"), ("l",))
    conflict = _from({(0, 1): -0.6, (0, 2): -0.2}, 0, 3)
    assert conflict_overlap(conflict, turned) == pytest.approx(conflict_overlap(conflict, routing))


def test_where_tasks_in_conflict_meet() -> None:
    """a and b are both on expert 3 of four in blocks 0, 2, 3 and 4, and on expert 1 in block 5."""
    layers = tuple(f"model.layers.{i}.mlp.up_proj" for i in range(6))
    on = np.eye(4)
    meet, apart = [on[3], on[3], on[0]], [on[0], on[1], on[2]]
    usage = [meet, apart, meet, meet, meet, [0.6 * on[1] + 0.4 * on[2], on[1], on[1]]]
    conflict = _from({(0, 1): -0.31, (0, 2): -0.02, (1, 2): -0.5}, 0.1, 3)
    second, first = shared_experts(conflict, _routing(usage, layers))
    assert first == SharedExperts("a", "b", -0.31, tuple(layers[i] for i in (0, 2, 3, 4, 5)), (3, 3, 3, 3, 1))
    assert first.sentence() == (
        "a and b conflict (cosine -0.31) and share expert 1 in layer 5; expert 3 in layers 0, 2-4"
    )
    assert second[:2] == ("b", "c")


def test_experts_that_everybody_uses_evenly_explain_nothing() -> None:
    assert shared_experts(_from({(0, 1): -0.5}, 0, 2), _routing([np.full((2, 4), 0.25)], ("l",))) == []


def test_an_even_share_is_that_of_the_layer() -> None:
    """In a layer of two experts both tasks use both alike; .5 would be much only in a layer of eight."""
    narrow = [[0.5, 0.5, 0, 0, 0, 0, 0, 0]] * 2
    wide = [[0.5, 0.5, 0, 0, 0, 0, 0, 0], [0.5, 0, 0.5, 0, 0, 0, 0, 0]]
    stats = RoutingStats(100 * np.array([narrow, wide]), TASKS[:2], ("narrow", "wide"), experts=(2, 8))
    (shared,) = shared_experts(_from({(0, 1): -0.5}, 0, 2), stats)
    assert (shared.layers, shared.experts) == (("wide",), (0,))


def test_layers_without_a_number_are_named() -> None:
    shared = SharedExperts("a", "b", -0.5, ("head", "tail"), (1, 1))
    assert shared.sentence() == "a and b conflict (cosine -0.50) and share expert 1 in head, tail"


def test_a_sentence_names_the_experts_of_most_layers() -> None:
    layers = tuple(f"model.layers.{i}.mlp.up_proj" for i in (0, 1, 2, 0, 1, 5, 6))
    shared = SharedExperts("a", "b", -0.5, layers, (4, 4, 4, 2, 2, 7, 1))
    assert shared.sentence().endswith(
        "expert 1 in layer 6; expert 2 in layers 0-1; expert 4 in layers 0-2; and 1 more"
    )
