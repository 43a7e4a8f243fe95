"""The training loop, its checkpoints, and the processes it runs in."""
