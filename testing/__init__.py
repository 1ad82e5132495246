"""What tests and benchmarks both need: an S3 server, a proxy that fails, Ray nodes, made media. Not shipped."""
