"""What has to be fast on a card, beside peers and the reckoned floor."""
