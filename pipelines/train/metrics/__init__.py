"""Where the figures of a train stage's steps go. Rank 0's `Monitor` feeds each; none knows of the others."""
