"""The host-side plan of ring attention: who holds which tokens, who sends which keys to whom. Pure functions."""
