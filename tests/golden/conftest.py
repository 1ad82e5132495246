"""A Ray instance in the test's own process, as the tests of pipelines have it."""

from tests.pipelines.conftest import in_this_process, local_ray

__all__ = ["in_this_process", "local_ray"]
