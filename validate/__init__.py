"""Prove it: the only room that runs models."""
