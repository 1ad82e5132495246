"""Bytes to tokens to packed sequences to shards. Pure functions and small classes; knows neither the model nor Ray."""
