"""Batch jobs: files of requests in, files of answers out; throughput first, nothing lost."""
