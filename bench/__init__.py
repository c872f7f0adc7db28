"""Benchmarks: one script a question; each writes JSON that the README is made from."""
