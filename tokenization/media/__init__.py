"""Encoded videos and images to square frames at sampled times."""
