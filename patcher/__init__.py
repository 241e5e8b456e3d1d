"""Livepatch for the weights of a served language model."""
