"""Measuring a model: validation loss (`perplexity`), and where it falls (`positions`)."""
