"""Prepared training runs as YAML files, found by name: see `segclip_fast.training.runs`."""
