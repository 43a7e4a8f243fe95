"""Before a run, without torch: what it will train on, need and cost, and whether it can start at all."""
