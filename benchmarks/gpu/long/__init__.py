"""The longest training context of one card, predicted and measured."""
