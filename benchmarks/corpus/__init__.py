"""What a corpus of a million objects takes: one file a subject, each with the targets beside its figures."""
