"""Raw objects: listing them, the media that they hold, and frames of those."""
