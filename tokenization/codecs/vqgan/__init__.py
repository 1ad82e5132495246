"""The frame tokenizer: a VQGAN that turns a frame into a grid of codes and back, LWM's import, and a small trainer."""
