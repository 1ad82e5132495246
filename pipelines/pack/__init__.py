"""The pack stage: documents of a training stage's sources to shards of packed sequences at its context."""
