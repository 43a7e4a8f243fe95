"""Low-rank adapter experts and routers in the linear layers of a frozen base model.

    model.py       attach_adapters: puts the others into a model, by module name
    layer.py       LoraLinear, MoloraLinear: a frozen linear layer and its adapter
    blocks.py      RoutedFfn: whole FFN blocks as experts
    routers.py     hidden states -> logits -> Routing (which experts, what gates); xlora.py before the layers
    routing.py     RoutingContext: what routers know of a micro-batch, and what they leave
    experts.py     Routing and hidden states -> weighted sum of experts, by one of three paths:
                   concat.py, grouped.py, kernels.py
    losses.py      the router losses' gradients, entered in backward
    exchange.py    what expert parallelism implements; warm_start.py, folder.py: from and to disk

Shape legend, used as suffixes of tensors that cross a function boundary:
B rows, S positions, T = B * S tokens, D in features, F out features, E experts in all,
e experts on this rank, K top-k, N = T * K routed tokens, R tokens received, L adapted layers,
C classes of tokens, G groups of experts, J tasks, M tasks of one token, X = K + shared experts.
The LoRA rank is spelled `rank`, r in suffixes; the delta of an adapter is scaled by alpha / rank.
"""
