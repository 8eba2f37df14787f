"""A record of what the code gives on fixed inputs: what should change no result is held against it."""
