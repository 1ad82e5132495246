"""One script for a GPU: what has to be right on a card is proven, measured and explained, in nine minutes."""
