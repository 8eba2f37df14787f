"""What is seen in a frame: depth, and what stands still."""
