"""What a corpus of a million objects costs the driver."""
