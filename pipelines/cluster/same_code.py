"""Every task runs the code that its driver planned with, or refuses.

Workers import Ringworld wherever their node has it. A stage's output is committed under the driver's name for its code,
so a worker that imports other code must not make any: each task compares, and the driver can ask all nodes.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import ray

from pipelines.cluster.nodes import ask_nodes
from pipelines.dag.code_versions import code_place, code_version
from storage.errors import UserError

P = ParamSpec("P")
R = TypeVar("R")

_ANSWER_SECONDS = 30.0  # that a node has to say what code it imports


def as_driver(function: Callable[P, R]) -> Callable[P, R]:
    """The function of a task, or a method of an actor, that runs with the driver's code and at its level of logging.

    It raises UserError where other code is imported. Ray sends what this returns by value, so the version in it is that
    of the process that submits the task.
    """
    version, place, level = code_version(), code_place(), logging.getLogger("ringworld").level

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        if code_version() != version:
            raise other_code(ray.util.get_node_ip_address(), code_place(), place)
        logging.getLogger("ringworld").setLevel(level)
        return function(*args, **kwargs)

    return checked


def check_nodes() -> None:
    """Ask every node of the cluster what code it imports. Raises UserError naming the first that has other code.

    Finds those too whose code cannot even be imported, or ends the process that imports it.
    """

    def look() -> tuple[str, str]:  # inside, so that it is sent by value: nothing of ours is imported before it runs
        try:
            from pipelines.dag.code_versions import code_place, code_version

            return code_version(), code_place()
        except BaseException as error:
            return "", f"a place where importing it fails ({type(error).__name__}: {error})"

    for node, (version, place) in ask_nodes(ray.remote(num_cpus=0, max_retries=0)(look), _ANSWER_SECONDS):
        if version != code_version():
            raise other_code(node["NodeManagerAddress"], place, code_place())


def other_code(node: str, there: str, here: str) -> UserError:
    """The error of a node that imports other code."""
    return UserError(
        f"node {node} imports Ringworld from {there}, which is other code than this run's, from {here}; install the "
        f"same version on every node, or ship a checkout with `ray job submit --working-dir .`"
    )
