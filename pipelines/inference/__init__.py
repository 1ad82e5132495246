"""A trained model in use: prompts of text and media in, text, pictures and films out."""
