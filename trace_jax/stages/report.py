"""Stage report: one self-contained page from the artefacts."""

from trace_jax import processes, report
from trace_jax.stages import context


def run(run: context.Context) -> dict:
    """Writes report.html."""
    target = run.workdir.path / "report.html"
    if processes.is_first():
        report.write(target, report.collect(run.workdir.path))
    return {}
