"""One thin file a command: parse, call a pipeline, print. The only room that reads argv and the environment."""
