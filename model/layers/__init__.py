"""What a decoder layer may compute again, tile, offload or fuse, without a change of the gradient."""
