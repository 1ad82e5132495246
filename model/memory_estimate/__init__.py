"""What a training step takes of a device and of its host, predicted part by part, without allocating anything."""
