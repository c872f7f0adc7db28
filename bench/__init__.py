"""Benchmarks: one script a question, each writes JSON under docs/results/ or bench/results/ that the README is made from."""
