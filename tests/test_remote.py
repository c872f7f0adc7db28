"""A bucket that fails for a while: waited for, then exit code 75; one that refuses: 2."""

import pytest

from trace_jax import bucket_owner, errors, launch, remote
from trace_jax.errors import InputError

pytest.importorskip("gcsfs", reason="needs the extra gcs")

import aiohttp  # noqa: E402
import google.auth.exceptions  # noqa: E402
import requests  # noqa: E402
from gcsfs import retry  # noqa: E402

URL = "gs://bucket/run"


def _http(code: int | str) -> Exception:
    return retry.HttpError({"code": code, "message": "from the server"})


@pytest.fixture(autouse=True)
def slept(monkeypatch) -> list[float]:
    """Seconds that were waited for, in no time."""
    seconds = []
    monkeypatch.setattr(remote.time, "sleep", seconds.append)
    monkeypatch.setattr(remote, "_in_vain", False)
    return seconds


@pytest.mark.parametrize(
    "error",
    [
        _http(500), _http(503), _http("429"), _http(408),
        ConnectionRefusedError(111, "Connection refused"),
        TimeoutError(),
        aiohttp.ServerDisconnectedError(),
        aiohttp.ClientPayloadError("cut off"),
        requests.ConnectionError("no route to host"),
        requests.exceptions.ProxyError(),  # what gcsfs makes of 502
        google.auth.exceptions.TransportError("no metadata server"),
        google.auth.exceptions.RefreshError("again", retryable=True),
        OSError(5, "Input/output error"),
    ],
)  # fmt: skip
def test_what_passes_is_waited_for_and_then_worth_another_start(error, slept, capsys):
    def fails() -> None:
        raise error

    with pytest.raises(errors.Unavailable, match="gs://bucket/run: .* run the same command again"):
        with remote.told(URL):
            remote.patiently(URL, fails)
    assert slept == list(remote._WAITS)
    said = capsys.readouterr().err
    assert said.count("the bucket fails (") == 5 and "next try in 60 s" in said


@pytest.mark.parametrize(
    "error",
    [
        OSError("Forbidden: https://storage/b/bucket\nno storage.objects.create"),  # gcsfs: 403
        FileNotFoundError("bucket/run"),  # gcsfs: 404
        _http(400), _http(401), _http("403"), _http(None),
        PermissionError(13, "Permission denied"),
        OSError(28, "No space left on device"),
        OSError(30, "Read-only file system"),
        google.auth.exceptions.DefaultCredentialsError("no credentials"),
        google.auth.exceptions.RefreshError("invalid_grant"),
    ],
)  # fmt: skip
def test_what_stays_wrong_is_told_at_once(error, slept):
    def fails() -> None:
        raise error

    with pytest.raises(InputError, match="cannot be used") as told, remote.told(URL):
        remote.patiently(URL, fails)
    assert errors.exit_code(told.value) == 2 and not slept


def test_a_wait_ends_when_the_bucket_is_back_and_is_not_made_twice_in_vain(slept):
    faults = [_http(503), _http(503)]

    def works() -> str:
        if faults:
            raise faults.pop()
        return "found"

    assert remote.patiently(URL, works) == "found"
    assert slept == list(remote._WAITS[:2])
    for _ in range(2):  # the second time it is known to be gone
        faults[:] = [_http(503)] * 99
        with pytest.raises(retry.HttpError):
            remote.patiently(URL, works)
    assert slept == list(remote._WAITS[:2] + remote._WAITS)
    faults.clear()
    assert remote.patiently(URL, works) == "found"
    faults[:] = [_http(503)]
    assert remote.patiently(URL, works) == "found"  # and waits again


@pytest.mark.parametrize(("error", "code"), [(_http(503), 75), (OSError("Forbidden: b/bucket"), 2)])
def test_the_program_ends_in_one_line_with_what_the_launchers_go_by(
    config, tmp_path, monkeypatch, capsys, error, code
):
    monkeypatch.setenv("TRACE_JAX_CACHE", str(tmp_path))
    monkeypatch.setattr(bucket_owner, "_read", lambda file: (_ for _ in ()).throw(error))
    assert launch.main(["launch", f"--config={config}", f"--workdir={URL}"]) == code
    assert len([x for x in capsys.readouterr().err.splitlines() if "error: gs://" in x]) == 1
