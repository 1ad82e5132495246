"""Work in threads."""

from __future__ import annotations

import pytest

from storage.threads import in_threads


def test_work_in_threads_comes_in_order_and_raises_what_it_raises() -> None:
    assert list(in_threads(str, range(1500))) == [str(number) for number in range(1500)]

    def work(number: int) -> int:
        if number == 700:
            raise FileNotFoundError(number)
        return number

    with pytest.raises(FileNotFoundError):
        list(in_threads(work, range(1500)))
