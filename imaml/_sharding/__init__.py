"""Models whose parameters are spread over processes."""
