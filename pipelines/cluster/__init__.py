"""The Ray cluster under a run: starting or joining it, what it has room for, progress, heartbeats of its workers."""
