"""MetaGradient and the strategies, each with its costs beside it."""
