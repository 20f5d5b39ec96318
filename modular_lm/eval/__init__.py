"""Measuring a model: validation loss (`perplexity`)."""
