"""Closed loops, metrics, reports."""
