"""Benchmarks: one script a question; each writes JSON that the README is made from.

All run in the environment of `trace_jax.launch` with `cpu_devices=0`.
"""

from trace_jax import launch

launch.set_environment(cpu_devices=0)
