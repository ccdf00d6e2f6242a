"""One training run: optimizer and schedule, checkpoints, log, loop."""
