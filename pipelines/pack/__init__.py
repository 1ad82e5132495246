"""The pack stage: the documents of some sources to shards of packed sequences of one context."""
