"""From shards to batches: readers, the order of sequences, and an iterator that resumes."""
