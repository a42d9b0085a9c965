"""Losses whose second derivatives fit: what a model or a loss may use in place of torch's own."""

from imaml.nn._cross_entropy import chunked_cross_entropy as chunked_cross_entropy
