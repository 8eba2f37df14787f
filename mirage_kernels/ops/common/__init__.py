"""What several operators share: pieces of their definitions, and of their Triton kernels."""
