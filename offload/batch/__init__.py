"""The offline batch job runner: many requests in a file, every one answered exactly once."""
