"""The networks: transformer, memory adapter, depth head, VAE decoding, and the loading of their weights."""

TEMPORAL_COMPRESSION = 4
"""Pixel frames per latent frame."""
