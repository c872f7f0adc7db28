"""Stop and resume equals the straight run, bit for bit, wherever the stop comes."""

import contextlib

import jax
import pytest
import tiny
from flax import nnx

from trace_jax import checkpoints, fit, metrics, train
from trace_jax.errors import InputError


class Killed(BaseException):
    """What no code catches."""


def killer(after: int):
    """A progress that kills the run once `after` steps are reported."""

    @contextlib.contextmanager
    def progress(total, description="", start=0):
        class Bar:
            done = start

            def advance(self, n: int = 1) -> None:
                self.done += n
                if description.startswith("train") and self.done >= after:
                    raise Killed

        yield Bar()

    return progress


@pytest.fixture(scope="module")
def base():
    return tiny.module()


@pytest.fixture(scope="module")
def straight(base, tmp_path_factory):
    """(directory, fitted) of a run that nobody stopped; a checkpoint every 2 of 6 steps."""
    directory = tmp_path_factory.mktemp("straight")
    return directory, tiny.fit(base, directory)


def stopped_and_resumed(base, directory, after: int, **changes):
    with pytest.raises(Killed):
        tiny.fit(base, directory, progress=killer(after), **changes)
    return tiny.fit(base, directory, **changes)


# 1: before any checkpoint; 2: the checkpoint of step 2 is not begun; 3: after it; 5: between two.
@pytest.mark.parametrize(("after", "left"), [(1, 6), (2, 6), (3, 4), (5, 2)])
def test_resumed_run_equals_the_straight_run_bit_for_bit(
    base, straight, tmp_path, caplog, after, left
):
    directory, fitted = straight
    resumed = stopped_and_resumed(base, tmp_path, after)
    assert not [r for r in caplog.records if r.levelname != "INFO"]  # nothing that a user would see
    assert resumed.steps_run == left
    tiny.assert_same(nnx.state(resumed.module), nnx.state(fitted.module))
    lines = [(d / "metrics.jsonl").read_text() for d in (directory, tmp_path)]
    assert lines[0] == lines[1]


def test_resume_of_full_fine_tuning_also_restores_the_optimizer(base, tmp_path):
    whole = tiny.fit(base, tmp_path / "a", adapters="none")
    resumed = stopped_and_resumed(base, tmp_path / "b", 4, adapters="none")
    assert resumed.steps_run == 4
    tiny.assert_same(nnx.state(resumed.module), nnx.state(whole.module))


@pytest.mark.fault
def test_two_stops_and_a_line_cut_off_in_metrics(base, straight, tmp_path):
    for after in (3, 5):
        with pytest.raises(Killed):
            tiny.fit(base, tmp_path, progress=killer(after))
    path = tmp_path / "metrics.jsonl"
    assert [row["step"] for row in metrics.read_metrics(path)] == [1, 2, 3, 4, 5]
    path.write_text(path.read_text() + '{"step": 6, "lo')
    resumed = tiny.fit(base, tmp_path)
    tiny.assert_same(nnx.state(resumed.module), nnx.state(straight[1].module))
    assert path.read_text() == (straight[0] / "metrics.jsonl").read_text()


def state_of(base, **changes) -> train.TrainState:
    settings = tiny.settings(**changes)
    params = tiny.split(fit.adapted(base, settings), fit.trainable(settings))[1]
    return train.init_state(params, settings.options())


@pytest.mark.parametrize(
    ("changes", "n", "first"),
    [
        (dict(lora_rank=3), 42, r"lora_a.*checkpoint \[2, 24, 2\], this run \[2, 24, 3\]"),
        (dict(lora_targets="q"), 36, r"lora_a.*checkpoint \[2, 24, 2\], this run None"),
        (dict(adapters="none"), 78, r"embed.*checkpoint None, this run \[40, 16\]"),
    ],
)
def test_a_checkpoint_of_another_shape_is_refused(base, straight, changes, n, first):
    with checkpoints.Checkpoints(straight[0] / "checkpoints", keep=2) as saved:
        message = rf"another shape \({n} arrays differ; first .*{first}\); use another --workdir"
        with pytest.raises(InputError, match=message):
            saved.restore(state_of(base, **changes))


def test_what_is_not_asked_for_is_not_read(base, straight):
    """A finished run's model is restored without the state of its optimiser."""
    directory, fitted = straight
    stored = fit._Parted(base, tiny.settings()).stored()
    with checkpoints.Checkpoints(directory / "checkpoints", keep=2) as saved:
        step, state = saved.restore(stored)
    assert (step, state.step) == (6, ...)
    assert {leaf is ... for leaf in jax.tree.leaves(state.opt_state)} == {True}
    restored = fit.restore(base, tiny.settings(), directory / "checkpoints")
    tiny.assert_same(nnx.state(restored), nnx.state(fitted.module))


def test_a_checkpoint_without_the_position_of_the_data_is_refused(base, tmp_path):
    state = state_of(base)
    with checkpoints.Checkpoints(tmp_path, keep=1) as saved:
        saved.save(1, state)
        with pytest.raises(InputError, match="how far the data was read.*--redo"):
            saved.restore(state, object())


def test_only_the_newest_are_kept(straight):
    folders = [int(p.name) for p in (straight[0] / "checkpoints").iterdir() if p.name.isdigit()]
    assert sorted(folders) == [4, 6]


def test_an_empty_directory_gives_nothing(base, tmp_path):
    with checkpoints.Checkpoints(tmp_path, keep=2) as saved:
        assert saved.latest_step is None and saved.restore(state_of(base)) is None


def _damage(folder, how: str) -> None:
    """Harms the largest file of a checkpoint."""
    path = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    if how == "flipped":
        data[len(data) // 2] ^= 1
    elif how == "cut":
        del data[-7:]
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(bytes(data))


@pytest.mark.fault
@pytest.mark.parametrize("how", ["flipped", "cut", "gone"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(base, straight, tmp_path, capsys, how):
    with pytest.raises(Killed):
        tiny.fit(base, tmp_path, progress=killer(5))
    _damage(tmp_path / "checkpoints" / "4", how)
    resumed = tiny.fit(base, tmp_path)
    assert "checkpoints/4 is damaged; deleted, the one before it is used" in capsys.readouterr().err
    assert resumed.steps_run == 4  # from step 2
    tiny.assert_same(nnx.state(resumed.module), nnx.state(straight[1].module))
    assert sorted(p.stem for p in (tmp_path / "checkpoints" / "checksums").iterdir()) == ["4", "6"]


def test_an_intact_checkpoint_is_left_as_it_is(base, straight):
    before = {p: p.read_bytes() for p in straight[0].rglob("*") if p.is_file()}
    with checkpoints.Checkpoints(straight[0] / "checkpoints", keep=2) as saved:
        assert saved.restore(state_of(base))[0] == 6
    assert {p: p.read_bytes() for p in straight[0].rglob("*") if p.is_file()} == before


@pytest.mark.fault
def test_a_disk_that_is_full_is_one_line_and_the_one_before_stays(base, small_disk):
    """Room for one checkpoint, not for two."""
    folder = small_disk(256)
    state = state_of(base)
    with pytest.raises(InputError, match=r"step \d cannot be written .*goes on from"):
        with checkpoints.Checkpoints(folder / "c", keep=9) as saved:
            for step in range(1, 9):
                saved.save(step, state)
    (folder / "ballast").unlink(missing_ok=True)
    with checkpoints.Checkpoints(folder / "c", keep=9) as saved:
        assert saved.latest_step >= 1
        tiny.assert_same(saved.restore(state)[1], state)
