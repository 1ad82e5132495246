"""Tests that share something expensive share a worker too."""

from __future__ import annotations

import pytest


def test_a_parallel_run_keeps_this_file_on_one_worker(request: pytest.FixtureRequest) -> None:
    if not getattr(request.config.option, "loadgroup", False):
        return  # one process runs all tests, or somebody chose another distribution
    assert request.node.nodeid.endswith(f"@{request.path}"), "xdist did not take in the group that conftest.py gives"
