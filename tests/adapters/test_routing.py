"""What a micro-batch brings to the routers and what they leave: nothing of it reaches the next one."""

from __future__ import annotations

import pytest
import torch

from moe_medical.adapters.routing import BatchInputs, RouterGroup, Routing, RoutingContext, Sequences

MASK = torch.tensor([[True, True, True], [True, False, False]])
PROMPTS = torch.tensor([[True, True, False], [True, False, False]])


def routing(tokens: int = 6, value: float = 0.0) -> Routing:
    logits_TE = torch.full((tokens, 2), value)
    return Routing(torch.ones(tokens, 1), torch.zeros(tokens, 1, dtype=torch.long), logits_TE)


@pytest.mark.parametrize("inputs", [BatchInputs(MASK), BatchInputs.of_rows(torch.tensor([0])), BatchInputs()])
def test_a_bound_batch_is_not_bound_again(inputs: BatchInputs) -> None:
    context = RoutingContext()
    with context.bind(inputs), pytest.raises(RuntimeError, match="bound already"), context.bind(inputs):
        pass
    with context.bind(inputs):
        assert context.inputs is inputs


def test_a_pass_ends_with_its_binding_also_by_an_error() -> None:
    context = RoutingContext()

    def interrupted() -> None:
        with context.bind(BatchInputs(MASK)):
            context.current.keep("a", routing())
            assert list(context.record.routings) == ["a"]
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        interrupted()
    assert context.record.routings == {}
    with pytest.raises(RuntimeError, match="no batch is bound"):
        _ = context.inputs.token_mask_T


def test_passes_have_numbers_and_names_and_none_where_nothing_is_bound() -> None:
    context, seen = RoutingContext(), []
    for name in ("count", "train", "train"):
        with context.bind(BatchInputs(MASK), name):
            seen.append((context.current.number, context.current.name))
    assert seen == [(1, "count"), (2, "train"), (3, "train")]
    assert (context.current.number, context.current.name) == (0, "")


def test_a_recomputed_forward_replaces_what_was_recorded() -> None:
    context = RoutingContext()
    with context.bind(BatchInputs(MASK)):
        for value in (1.0, 2.0):
            context.current.keep("a", routing(value=value))
        assert context.record.routings["a"].logits_TE[0, 0] == 2


def test_without_a_mask_nothing_is_recorded() -> None:
    context = RoutingContext()
    with context.bind(BatchInputs.of_rows(torch.tensor([0, 1]))):
        context.current.keep("a", routing())
        assert context.record.routings == {}


def test_a_decision_is_taken_by_each_member_once() -> None:
    decisions, group = RoutingContext().current.decisions, RouterGroup("mlp", ("a", "b", "c"), "a")
    decided = routing()
    decisions.share(group, decided)
    assert decisions.take(group) is decided
    assert decisions.take(group) is decided
    with pytest.raises(RuntimeError, match="no routing was decided for mlp: its first layer by name"):
        decisions.take(group)
    decisions.share(RouterGroup.alone("d"), decided)  # nobody else waits for it
    with pytest.raises(RuntimeError, match="for d"):
        decisions.take(RouterGroup.alone("d"))
    with pytest.raises(RuntimeError, match="for the model"):
        decisions.take(RouterGroup("", ("a", "b"), "a"))


def test_tasks_of_tokens_and_of_rows() -> None:
    of_tokens = BatchInputs(MASK, torch.tensor([[0, 0, 1], [2, 2, 2]]))
    assert of_tokens.task_ids_of(6).tolist() == [0, 0, 1, 2, 2, 2]
    of_rows = BatchInputs.of_rows(torch.tensor([3, 1]))
    assert of_rows.task_ids_of(4).tolist() == [3, 3, 1, 1]
    assert of_rows.task_ids_of(2).tolist() == [3, 1]
    several = BatchInputs.of_rows(torch.tensor([[0, 2], [1, -1]]))
    assert several.task_ids_of(4).tolist() == [[0, 2], [0, 2], [1, -1], [1, -1]]
    assert BatchInputs().task_ids_of(4) is None


def test_samples_begin_where_positions_do_and_with_each_row() -> None:
    positions = torch.tensor([[0, 1, 0, 1], [2, 3, 0, 1]])
    sequences = Sequences.of(positions, torch.ones(2, 4, dtype=torch.bool))
    assert sequences.start_T.tolist() == [0, 0, 2, 2, 4, 4, 6, 6]
    x_TD = torch.arange(8.0)[:, None]
    assert sequences.mean(x_TD).flatten().tolist() == [0.5, 0.5, 2.5, 2.5, 4.5, 4.5, 6.5, 6.5]


def test_what_prompts_decided_holds_for_the_tokens_after_them() -> None:
    context = RoutingContext()
    with context.bind(BatchInputs.of_rows(None, PROMPTS)):
        first = context.current.side_inputs("a", num_tokens=6)
        assert first.sequences is not None
        assert first.prompt_logits_TE is None
        logits_TE = torch.tensor([[1.0, 0.0]] * 3 + [[0.0, 2.0]] * 3)
        context.current.keep("a", routing()._replace(logits_TE=logits_TE))
        later = context.current.side_inputs("a", num_tokens=2)  # one position of each row
        assert later.sequences is None
        assert later.prompt_logits_TE.tolist() == [[1.0, 0.0], [0.0, 2.0]]
        assert context.current.side_inputs("b", num_tokens=2).prompt_logits_TE is None
    assert context.current.side_inputs("a", num_tokens=2).prompt_logits_TE is None


def test_packed_rows_remember_no_prompt() -> None:
    context = RoutingContext()
    with context.bind(BatchInputs(MASK, sequences=Sequences.of(MASK.long().cumsum(1) - 1, PROMPTS))):
        context.current.keep("a", routing())
        assert context.current.side_inputs("a", num_tokens=6).prompt_logits_TE is None
