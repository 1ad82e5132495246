"""What all ranks do together: one answer for all at its own size, and an error of one rank raised on every one."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed.distributed_c10d as c10d

from model.checkpoint.manifest import DamagedError
from model.training.error_transport import decode_error, encode_error
from model.training.mesh import build_mesh
from storage.errors import BadData, UserError, is_transient
from storage.object_store.errors import StoreError
from tests.model.attention_groups import failure, run_in_processes

RANKS, ANSWER_BYTES = 4, 8_000_000


def local_errors() -> dict[str, Exception]:
    """Of classes that no other process can look up."""

    class LostLinkError(Exception):
        def __init__(self, link: object, far_end: object) -> None:
            super().__init__(f"link {link} to {far_end} is lost")

    class UnreachableError(ConnectionError):
        pass

    class MistakeError(UserError):
        transient = True

    return {
        "plain": LostLinkError(object, "rank 7"),
        "transient": UnreachableError("nobody answers"),
        "user": MistakeError("recipe.yaml: steps is missing; give it"),
    }


def observe(group: Any) -> dict[str, Any]:
    mesh = build_mesh()
    seen: dict[str, Any] = {}

    def fail_on_rank_two(name: str) -> None:
        if mesh.rank == 2:
            raise local_errors()[name]

    for name in ("plain", "transient", "user"):
        seen[name] = failure(lambda: mesh.on_all_ranks(lambda: fail_on_rank_two(name)))  # noqa: B023
    seen["unsendable"] = failure(lambda: mesh.on_all_ranks(lambda: {object} if mesh.rank == 1 else None))
    seen["unsendable answer"] = failure(lambda: mesh.on_rank_zero(lambda: object))
    seen["after"] = mesh.on_all_ranks(lambda: mesh.rank)
    received = count_bytes()
    seen["answer"] = len(mesh.on_rank_zero(lambda: "x" * ANSWER_BYTES))
    seen["bytes"] = sum(received)
    return {name: described(value) if isinstance(value, Exception) else value for name, value in seen.items()}


def described(error: Exception) -> tuple[list[str], bool, str]:
    """The names of its classes, whether it is transient, and its words."""
    return [kind.__name__ for kind in type(error).__mro__], is_transient(error), str(error)


def count_bytes() -> list[int]:
    """What this rank's collectives put into its memory from here on."""
    received: list[int] = []

    def counting(collective: Callable[..., Any]) -> Callable[..., Any]:
        def call(first: Any, *args: Any, **kwargs: Any) -> Any:
            received.extend(tensor.nbytes for tensor in (first if isinstance(first, list) else [first]))
            return collective(first, *args, **kwargs)

        return call

    c10d.broadcast, c10d.all_gather = counting(c10d.broadcast), counting(c10d.all_gather)
    return received


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_in_processes(observe, RANKS)


@pytest.mark.slow
def test_an_error_of_a_class_that_only_one_rank_knows_is_raised_on_every_rank_with_its_reason(ranks):
    for seen in ranks:
        kinds, transient, words = seen["plain"]
        assert (kinds[0], transient) == ("RuntimeError", False)
        assert words == "LostLinkError: link <class 'object'> to rank 7 is lost"
        kinds, transient, words = seen["transient"]
        assert (kinds[0], transient) == ("ConnectionError", True)
        assert words == "UnreachableError: nobody answers"
        kinds, transient, words = seen["user"]
        assert ("UserError" in kinds, transient) == (True, True)
        assert words == "recipe.yaml: steps is missing; give it"
        assert seen["after"] == [0, 1, 2, 3]


@pytest.mark.slow
def test_a_result_that_cannot_be_sent_is_an_error_of_every_rank(ranks):
    for seen in ranks:
        for name in ("unsendable", "unsendable answer"):
            kinds, _, words = seen[name]
            assert kinds[0] == "TypeError"
            assert "not JSON serializable" in words


@pytest.mark.slow
def test_an_answer_of_rank_zero_costs_every_rank_its_own_size(ranks):
    for seen in ranks:
        assert seen["answer"] == ANSWER_BYTES
        assert ANSWER_BYTES < seen["bytes"] < 1.01 * ANSWER_BYTES


@pytest.mark.parametrize(
    "error",
    [
        UserError("recipe.yaml: steps is missing; give it"),
        BadData("clip 3 has no frames"),
        DamagedError("s3://b/step-00000003", "rank-00000-0000.safetensors is missing"),
        StoreError("s3://b/k cannot be read", "AccessDenied", "denied"),
        StoreError("s3://b/k cannot be read", "SlowDown", "transient"),
        OSError(errno.EIO, "Input/output error", "/disk/file"),
        FileNotFoundError(errno.ENOENT, "No such file or directory", "/disk/file"),
        TimeoutError("no answer in 60 s"),
        KeyError("n_filled"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_that_all_ranks_know_comes_back_as_it_was(error):
    again = decode_error(encode_error(error))
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert vars(again) == vars(error)
    assert is_transient(again) == is_transient(error)
    assert getattr(again, "errno", None) == getattr(error, "errno", None)


def test_an_error_with_an_errno_stays_transient_whatever_its_class():
    class DiskError(OSError):
        def __init__(self, disk: object) -> None:
            super().__init__(errno.ESTALE, f"disk {disk} is gone")

    error = decode_error(encode_error(DiskError("a")))
    assert is_transient(error)
    assert "disk a is gone" in str(error)
