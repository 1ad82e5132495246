"""What only several cards can show."""
