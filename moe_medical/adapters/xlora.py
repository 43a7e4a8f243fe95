"""X-LoRA (arXiv 2402.07148): gates of every layer from the last hidden state of a pass without adapters.

Two forward passes: the base alone, without gradient, then the adapted model with the gates that a linear
classifier makes of what the first one saw. The first runs in a hook before the model's own forward, so
nobody has to call the model in another way; it needs the whole text, hence no KV cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moe_medical.adapters.layer import AdapterModule
from moe_medical.adapters.routers import Choice, InitialValues, linear_float32
from moe_medical.adapters.routing import RoutingContext
from moe_medical.config.adapters import MoloraConfig

CLASSIFIER = "xlora_classifier"


class XLoraClassifier(AdapterModule):
    """s = softmax(W h + b) for each token and layer.

    Args:
        hidden: Size of h.
        layers: Routed layers, in order; with `router_scope: model` they share one s.
        config: Number of experts, temperature, top-k.
        seed: The run's seed.
        context: Takes the gates to the layers.
    """

    def __init__(
        self, hidden: int, layers: Sequence[str], config: MoloraConfig, seed: int, context: RoutingContext
    ):
        super().__init__(CLASSIFIER, seed, context)
        self._layers = tuple(layers)
        self._choice = Choice.of(config)
        self._num_experts = config.num_experts
        self._temperature = config.temperature
        self._depth = 1 if config.router_scope == "model" else len(self._layers)
        rows = self._depth * config.num_experts
        init = InitialValues(self.new_generator())
        self.weight = init.linear(hidden, rows, hidden)
        self.bias = init.linear(hidden, rows)

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        return {"weight": self.weight, "bias": self.bias}

    def forward(self, hidden_TD: Tensor) -> dict[str, Tensor]:
        """Layer -> (T, E) gates."""
        logits_TX = linear_float32(hidden_TD, self.weight, self.bias)
        # (T, depth * E) -> (T * depth, E): the choice is made for each token and layer by itself.
        logits_NE = logits_TX.unflatten(-1, (-1, self._num_experts)).flatten(0, 1)
        routing = self._choice.routing(logits_NE / self._temperature, self.training)
        gates_NE = torch.zeros_like(routing.logits_TE).scatter(-1, routing.expert_ids_TK, routing.weights_TK)
        gates_TLE = gates_NE.unflatten(0, (-1, self._depth))
        return {name: gates_TLE[:, i % self._depth] for i, name in enumerate(self._layers)}

    def look_ahead(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The first pass; a hook before the model's forward.

        Raises:
            RuntimeError: A KV cache holds the text's beginning, which the classifier has to see.
        """
        if self.context.adapters_off:
            return
        cache = kwargs.get("past_key_values")
        if cache is not None and cache.get_seq_length():
            raise RuntimeError("X-LoRA decides from the whole text: generate with use_cache=False")
        # Not the labels and what else only the head of a causal LM takes: this is the model below it.
        names = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")
        given = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
        with self.context.without_adapters(), torch.no_grad():
            seen = model.base_model(*args, **given, use_cache=False)  # type: ignore[operator]
        hidden_BSD = seen.last_hidden_state
        self.context.current.scalings = self(hidden_BSD.reshape(-1, hidden_BSD.shape[-1]))


def attach_classifier(
    model: nn.Module, layers: Sequence[str], config: MoloraConfig, seed: int, context: RoutingContext
) -> None:
    """Put the classifier into a causal LM of transformers and hook it before the model's forward."""
    hidden = int(model.config.hidden_size)  # type: ignore[union-attr, arg-type]
    classifier = XLoraClassifier(hidden, layers, config, seed, context)
    model.add_module(CLASSIFIER, classifier.to(next(model.parameters()).device))
    model.register_forward_pre_hook(classifier.look_ahead, with_kwargs=True)


def needs_whole_text(model: nn.Module) -> bool:
    """Whether every forward pass must see the text from its start, so that no KV cache helps."""
    return any(isinstance(module, XLoraClassifier) for module in model.modules())
