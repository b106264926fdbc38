"""Saving and loading optimizers."""
