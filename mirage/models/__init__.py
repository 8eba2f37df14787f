"""The networks: transformer, memory adapter, depth head, VAE decoding, and the loading of their weights."""
