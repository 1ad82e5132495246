"""What has to be right on a card, against fp64, padded training or the full forward."""
