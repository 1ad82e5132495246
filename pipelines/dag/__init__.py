"""Stages, their fingerprints and manifests, and the partitions that a stage's work is cut into."""
