"""The train stage: packed shards and the weights of the stage before to the next model."""
