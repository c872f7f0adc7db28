"""Benchmarks: one script a question; each writes JSON that the README is made from.

All run in the environment of `trace_jax.launch`: on CPU every core is a device.
"""

from trace_jax import launch

launch.set_environment()
