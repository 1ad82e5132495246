"""Records and samples out of text, JSONL, Parquet and tar files."""
