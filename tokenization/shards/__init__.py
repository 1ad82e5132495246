"""Documents and packed sequences on disk: Parquet files and WebDataset tars, with their index."""
