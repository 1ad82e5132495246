"""The report stage: one page that opens from disk and one JSON with every figure behind it."""

from pipelines.report.stage import write_report

__all__ = ["write_report"]
