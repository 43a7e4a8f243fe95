"""Low-rank adapter experts and routers in the linear layers of a frozen base model.

Shape legend, used as suffixes of tensors that cross a function boundary:
B rows, S positions, T = B * S tokens, D in features, F out features, E experts in all,
e experts on this rank, K top-k, N = T * K routed tokens, R tokens received, L adapted layers.
The LoRA rank is spelled `rank`; the delta of an adapter is scaled by alpha / rank.
"""
