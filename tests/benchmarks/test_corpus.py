"""`ringworld bench corpus`: the parts that nothing else holds, at small sizes."""

from __future__ import annotations

import pytest

from benchmarks.corpus.driver import claims as driver_claims
from benchmarks.corpus.growth import growth_report
from benchmarks.corpus.report import PARTS, corpus_report
from storage.errors import UserError

CLIPS = 5


@pytest.mark.faults
def test_one_clip_more_encodes_itself_and_another_field_spec_nothing() -> None:
    report = growth_report(CLIPS)
    first, more, other = report["rows"]
    of_a_clip = first["frames"] // CLIPS
    assert [row["frames_encoded"] for row in (first, more, other)] == [first["frames"], of_a_clip, 0]
    assert [claim["met"] for claim in report["claims"] if "frames" in claim["claim"]] == [True, True]


def test_a_claim_is_met_where_it_is_no_more_than_its_target() -> None:
    run, resumed = {"cpu_ms": 1.0, "kib": 1.1}, {"seconds": 61.0}
    assert [claim["met"] for claim in driver_claims(run, resumed)] == [True, False, False]


def test_an_unknown_part_is_named_beside_those_that_there_are() -> None:
    with pytest.raises(UserError, match=f"^--parts none: there is no such part, only {', '.join(PARTS)}$"):
        corpus_report(["none"])
