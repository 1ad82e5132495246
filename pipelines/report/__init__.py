"""The report stage: one page that opens from disk and one JSON with every figure behind it."""
