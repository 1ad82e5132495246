"""What whole corpora cost, a file a subject: a function of each returns its figures and its claims as plain JSON."""
