"""Everything that knows DeepSpeed: process groups, the engine, expert parallelism, sharded state, their cost.

Nothing is imported here: `cost` must start without torch.
"""
