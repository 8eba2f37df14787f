"""Runs the CUDA operators' own source files on the CPU, so that their logic is tested where there is no GPU."""
