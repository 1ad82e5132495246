"""One file an evaluation: held-out loss, needle in a haystack, generation, reconstruction."""
