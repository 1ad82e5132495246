"""Training in the test's own process, as the tests of pipelines have it."""

from tests.pipelines.conftest import in_this_process

__all__ = ["in_this_process"]
