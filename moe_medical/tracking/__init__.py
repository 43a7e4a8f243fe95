"""What a run tells about itself: sums per task, speed, `metrics.jsonl` as record of truth, W&B beside it."""
