"""A disk that is full at every stage: one line, exit code 2, and the rest once there is room."""

import os

import pytest

from faults import runs
from trace_jax import launch, stages

_PAGE = 4096


def _fill(folder, free_pages: int) -> None:
    """A file that leaves so many pages."""
    status = os.statvfs(folder)
    size = (status.f_bavail - free_pages) * status.f_frsize
    with open(folder / "ballast", "wb") as stream:
        stream.write(b"\1" * size)


def _launch(config, path, stage: str) -> int:
    return launch.main(["launch", f"--config={config}", f"--workdir={path}", f"--stages={stage}"])


@pytest.mark.parametrize("free_pages", [0, 3])
def test_full_in_the_middle_of_every_stage(straight, config, small_disk, capfd, free_pages):
    folder = small_disk(16 * 1024)
    path = folder / "run"
    for name in stages.NAMES:
        _fill(folder, free_pages)
        capfd.readouterr()
        assert _launch(config, path, name) == 2, name
        said = capfd.readouterr().err
        (line,) = [t for t in said.splitlines() if t.startswith("error:")]
        assert "no space left" in line.lower(), (name, line)
        assert "Traceback" not in said, said[-3000:]
        (folder / "ballast").unlink()
        assert _launch(config, path, name) == 0, capfd.readouterr().err[-2000:]
    runs.assert_same_end(path, straight[0])
