"""Weights of other formats in and out: LWM's released checkpoints, and plain Hugging Face folders."""
