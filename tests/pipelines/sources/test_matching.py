"""Names are matched as Python's engine matches them, whichever engine does it."""

from __future__ import annotations

import fnmatch
import re
from unittest.mock import patch

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.sources.matching import matches_any
from storage.globs import any_case_extension, compiled, is_malformed

LETTERS = st.sampled_from([*"ab/.[]!^-*?\\(>é\n&", "mp4"])
TEXTS = st.lists(LETTERS, max_size=8).map("".join)


@given(st.lists(TEXTS, min_size=1, max_size=3), st.lists(TEXTS, max_size=8))
def test_globs_match_as_in_python(globs: list[str], names: list[str]) -> None:
    patterns = [fnmatch.translate(any_case_extension(one)) for one in globs]
    patterns += [compiled(one).pattern for one in globs if not is_malformed(one)]
    expected = [any(re.match(pattern, name) for pattern in patterns) for name in names]
    assert matches_any(patterns, pa.array(names, pa.large_string())).tolist() == expected


@pytest.mark.parametrize("glob", ["*/eval/*", "*x*y*.mp4", "/d/**/0[1-3]?.txt", "s3://b/c/*.tar", "*/x[[]1]*"])
def test_common_globs_are_left_to_the_linear_engine(glob: str) -> None:
    patterns = [fnmatch.translate(any_case_extension(glob)), compiled(glob).pattern]
    with patch("pipelines.sources.matching.re.compile") as python:
        matches_any(patterns, pa.array(["/d/eval/x.mp4"], pa.large_string()))
    assert not python.called
