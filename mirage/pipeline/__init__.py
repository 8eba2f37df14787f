"""Generation chunk by chunk along a camera path, with the memory in the loop."""
