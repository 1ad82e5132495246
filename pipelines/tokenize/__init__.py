"""The tokenize stage: raw objects to documents in the joint vocabulary."""
