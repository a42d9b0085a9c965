"""One call: the interface of a strategy, the problem of a chunk, chunks, ranks, and the report."""
