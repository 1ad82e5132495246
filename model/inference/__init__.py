"""Text, images and video out of a trained model: decoding with a key-value cache, sampling and guidance."""
