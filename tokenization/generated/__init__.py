"""Documents that are generated from a seed: spans that repeat, keys with values, and needles in given text."""
