"""`ringworld bench manifest` measures a manifest that is read back as it was written."""

from __future__ import annotations

from benchmarks.manifest import manifest_7b, manifest_report
from model.checkpoint.manifest import Manifest


def test_the_measured_manifest_is_whole_and_smaller_than_with_a_dict_for_each_file():
    manifest = manifest_7b(16)
    assert Manifest.from_bytes(manifest.to_bytes()) == manifest
    assert sum(len(entry.ranges) for entry in manifest.files.values()) == 16 * len(manifest.parameters)
    ours, dicts = manifest_report(16, 1)["rows"]
    assert (ours["way"], dicts["way"]) == ("ringworld", "dicts")
    assert 0 < ours["mb"] < dicts["mb"] / 2
