"""Checkpoints of this library, of the authors' release, and of CLIP."""
