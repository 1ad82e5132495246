"""The evaluate stage: what the trained models are worth on what they have not seen."""
