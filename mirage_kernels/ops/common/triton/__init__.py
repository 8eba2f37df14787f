"""Triton pieces that several operators share: device functions, and launchers of what they have in common."""
