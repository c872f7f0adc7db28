"""launch/tpu_pod.sh against a cloud that is a folder (fakes/gcloud): what it does on bad days."""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator

import children
import pytest
from fakes import tpu_cloud


@pytest.fixture
def hosts() -> int:
    return 1


@pytest.fixture
def cloud(tmp_path, hosts) -> Iterator[tpu_cloud.Cloud]:
    found = tpu_cloud.Cloud(tmp_path, hosts)
    yield found
    found.close()


@pytest.mark.parametrize("hosts", [2])
def test_from_nothing_to_results_on_two_workers(cloud):
    cloud.write(job='echo "key is $GEMINI_API_KEY, token ${HF_TOKEN-unset}" >"$HOME/seen"; echo hi')
    code, said = cloud.run(FLAGS="--config.seed=3", WORKDIR="gs://bucket/run")
    assert code == 0, said
    assert "[0] hi" in said and "[1] hi" in said and tpu_cloud.SECRET not in said
    for index in (0, 1):
        assert (
            cloud.worker(index) / "seen"
        ).read_text() == f"key is {tpu_cloud.SECRET}, token unset\n"
        assert "--distributed --config.seed=3" in (cloud.worker(index) / "starts").read_text()
    assert not any(tpu_cloud.SECRET in line for line in cloud.calls())
    assert cloud.calls("storage rsync --recursive gs://bucket/run runs/mine")


def test_a_stopped_slice_is_started_and_keeps_its_disk(cloud):
    cloud.has("STOPPED")
    (cloud.worker() / "kept").touch()
    assert cloud.run()[0] == 0
    assert cloud.calls("tpu-vm start") and (cloud.worker() / "kept").exists()
    assert (cloud.checkout / "runs" / "mine" / "run" / "report.html").read_text() == "results"
    assert not cloud.calls("tpu-vm delete") and not cloud.calls("tpu-vm create")


def test_a_stopped_slice_that_cannot_be_started_is_left_alone(cloud):
    cloud.has("STOPPED")
    cloud.write(turns="tpu-vm start => exit 1\n")
    code, said = cloud.run()
    assert code == 2 and "could not be started" in said and "launch/tpu_pod.sh delete" in said
    assert not cloud.calls("delete") and not cloud.calls("create") and cloud.worker().exists()


def test_a_slice_that_was_taken_away_is_made_anew(cloud):
    cloud.has("PREEMPTED")
    code, said = cloud.run(SPOT="true")
    assert code == 0 and "its disk with it" in said and "warning: a spot slice" in said
    assert len(cloud.calls("tpu-vm delete")) == len(cloud.calls("tpu-vm create", "--spot")) == 1


def test_a_slice_that_is_coming_is_waited_for(cloud):
    cloud.has("CREATING")
    steps = ("true", "put slice REPAIRING", "put slice STARTING", "put slice READY")
    cloud.write(turns="".join(f"tpu-vm list => {step}\n" for step in steps))
    code, said = cloud.run()
    assert code == 0
    for state in ("CREATING", "REPAIRING", "STARTING"):
        assert f"mine is {state}; waiting" in said
    assert not cloud.calls("create") and not cloud.calls("delete")


def test_a_slice_in_a_state_for_people_is_left_alone(cloud):
    cloud.has("HIDDEN")
    code, said = cloud.run()
    assert code == 2 and "mine is HIDDEN" in said and not cloud.calls("delete")


def test_a_place_in_the_queue_is_kept(cloud):
    steps = (
        "true",
        "put queue WAITING_FOR_RESOURCES",
        "put queue PROVISIONING",
        "put queue ACTIVE; there",
    )
    cloud.write(
        queue="ACCEPTED", turns="".join(f"queued-resources list => {step}\n" for step in steps)
    )  # fmt: skip
    code, said = cloud.run(QUEUED="true")
    assert code == 0
    for state in ("ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING"):
        assert f"mine-queue is {state}" in said
    assert not cloud.calls("create") and not cloud.calls("delete")


@pytest.mark.parametrize("state", ["FAILED", "SUSPENDED", "ACTIVE"])
def test_a_queued_resource_without_a_future_is_replaced(cloud, state):
    cloud.write(queue=state)
    code, said = cloud.run(QUEUED="true")
    assert code == 0
    assert len(cloud.calls("queued-resources delete mine-queue", "--force")) == 1
    assert len(cloud.calls("queued-resources create mine-queue --node-id=mine")) == 1
    assert ("state: FAILED" in said) == (state == "FAILED")


def test_a_queue_that_always_fails_is_given_up(cloud):
    cloud.write(
        queue="FAILED", turns="queued-resources create => put queue FAILED; exit 0\n" * 9
    )  # fmt: skip
    code, said = cloud.run(QUEUED="true")
    assert code == 1 and "attempt 4 of 4" in said


def test_a_preempted_slice_of_the_queue_goes_with_its_place(cloud):
    cloud.has("PREEMPTED")
    cloud.write(queue="SUSPENDING")
    assert cloud.run(QUEUED="true")[0] == 0
    assert cloud.calls("queued-resources delete") and not cloud.calls("tpu-vm delete")


def test_what_cannot_be_asked_is_not_taken_for_gone(cloud):
    cloud.has("READY")
    cloud.write(turns="tpu-vm list => exit 1\n")
    code, said = cloud.run()
    assert code == 0 and "attempt 1 of 4 ended with 75" in said
    assert not cloud.calls("create") and not cloud.calls("delete")


@pytest.mark.parametrize("call", ["tpu-vm create", "scp .*tar.gz", "sh install", "describe"])
def test_what_fails_on_the_way_is_tried_again(cloud, call):
    cloud.write(turns=f"{call} => exit 1\n")
    code, said = cloud.run()
    assert code == 0 and "attempt 1 of 4 ended with 75" in said and cloud.starts() == 1
    assert "no job was started yet" in said and "goes on from its last checkpoint" not in said


def test_a_broken_connection_leaves_the_job_alone(cloud):
    cloud.write(
        turns="sh follow => cut=1\nsh look => true\nsh look => exit 255\n",
        job='for i in 1 2 3; do echo "step $i"; sleep 1; done',
    )
    code, said = cloud.run()
    assert code == 0 and "does not answer (it is READY); the job goes on there" in said
    assert cloud.starts() == len(cloud.calls("tpu_worker.sh install")) == 1
    assert [line for line in said.splitlines() if line.startswith("step")] == [
        "step 1", "step 2", "step 3",
    ]  # fmt: skip


def test_a_start_whose_connection_broke_starts_once(cloud):
    cloud.write(turns="sh start => cut=60\n", job="sleep 1")
    assert cloud.run()[0] == 0
    assert len(cloud.calls("tpu_worker.sh start")) == 2 and cloud.starts() == 1


def test_a_start_without_all_secrets_does_not_start(cloud):
    cloud.write(turns="sh start => exec </dev/null\n")
    code, said = cloud.run()
    assert code == 0 and "not started" in said and cloud.starts() == 1


@pytest.mark.parametrize(("code", "starts", "ends"), [(75, 2, 0), (1, 2, 0), (2, 1, 2)])
def test_the_exit_code_of_the_job_decides(cloud, code, starts, ends):
    cloud.write(job=f'[ -f "$HOME/again" ] || {{ touch "$HOME/again"; exit {code}; }}')
    found, said = cloud.run()
    assert found == ends and cloud.starts() == starts
    again = f"attempt 1 of 4 ended with {code}; the job goes on from its last checkpoint"
    assert (again in said) == (ends == 0)


def test_a_job_that_ends_in_the_second_in_which_it_began_is_another_one_next_time(cloud):
    clock = cloud.folder / "clock"
    clock.mkdir()
    (clock / "date").write_text("#!/bin/sh\necho 1700000000\n")  # all within one second
    (clock / "date").chmod(0o755)
    cloud.write(job='[ -f "$HOME/again" ] || { touch "$HOME/again"; exit 1; }')
    code, said = cloud.run(PATH=f"{clock}:{tpu_cloud.PATH}")
    assert code == 0 and cloud.starts() == 2, said


def test_a_slice_taken_away_under_the_job(cloud):
    cloud.write(
        turns="sh follow => wait_for_file second; kill_jobs; put slice PREEMPTED\n",
        job='[ -f "$HOME/../second" ] || { touch "$HOME/../second"; sleep 300; }',
    )
    code, said = cloud.run()
    assert code == 0 and "attempt 1 of 4 ended with 75" in said
    assert len(cloud.calls("tpu-vm create")) == 2 and cloud.starts() == 1


def test_once_a_job_has_run_only_attempts_with_one_at_work_count(cloud):
    cloud.write(
        turns="tpu-vm create => true\n"
        "sh follow => wait_for_file second; kill_jobs; put slice PREEMPTED\n"
        + "tpu-vm create => exit 1\n"
        * 5,
        job='[ -f "$HOME/../second" ] || { touch "$HOME/../second"; sleep 300; }',
    )
    code, said = cloud.run(ATTEMPTS="2")
    assert code == 0 and len(cloud.calls("tpu-vm create")) == 1 + 5 + 1, said
    assert said.count("no slice with the job on it yet") == 5
    assert (
        said.count("the job goes on from its last checkpoint") == said.count("attempt 1 of 2") == 1
    )


def test_a_machine_started_anew_under_the_job(cloud):
    cloud.write(
        turns="sh follow => wait_for_file worker-0/again; kill_jobs\n",
        job='[ -f "$HOME/again" ] || { touch "$HOME/again"; sleep 300; }',
    )
    code, said = cloud.run()
    assert code == 0 and "ended with 137" in said and cloud.starts() == 2


def test_the_same_command_follows_a_running_job_again(cloud):
    go = cloud.folder / "go"
    cloud.write(job=f"echo begun; until [ -f {go} ]; do sleep 0.1; done; echo finished")
    first = cloud.start()
    cloud.until(lambda: cloud.calls("tpu_worker.sh follow"))
    first.send_signal(signal.SIGTERM)
    os.killpg(first.pid, signal.SIGTERM)  # its gcloud as well, as Ctrl-C does
    ((_, said),) = children.said_by([first])
    assert first.returncode == 130 and "goes on" in said
    code, said = cloud.run(CONFIG="configs/llama8b.py:smoke")
    assert code == 2 and "runs another job" in said
    second = cloud.start()
    cloud.until(lambda: len(cloud.calls("tpu_worker.sh follow")) == 2)
    go.touch()
    ((out, err),) = children.said_by([second])
    assert second.returncode == 0 and "runs this job already" in err
    assert (
        "begun\nfinished" in out
        and cloud.starts() == len(cloud.calls("tpu_worker.sh install")) == 1
    )


@pytest.mark.parametrize("hosts", [2])
def test_a_job_on_some_workers_only_is_stopped_first(cloud):
    cloud.write(
        turns="worker=1 .*sh start => wait_for_file main; kill $(cat $CLOUD/main); exit 1\n"
        "worker=1 .*sh start => exit 1\nworker=1 .*sh start => exit 1\n",
        job='[ -f "$HOME/../go" ] && exit 0; trap "exit 75" TERM; while true; do sleep 0.1; done',
    )
    first = cloud.start(WORKDIR="gs://bucket/run")
    cloud.write(main=first.pid)
    children.said_by([first])
    assert first.returncode == 130  # while the second worker was to be started
    cloud.until(lambda: cloud.starts(0) == 1)
    cloud.write(go="")
    code, said = cloud.run(WORKDIR="gs://bucket/run")
    assert code == 0 and "only some workers have the job" in said, said
    assert cloud.starts(1) == 1 and cloud.starts(0) == 2


@pytest.mark.parametrize("hosts", [2])
def test_a_start_that_loses_leaves_the_job_of_the_other_alone(cloud):
    other = "HOME=$PWD bash tpu_worker.sh start other-1 sleep 300 <<<."
    cloud.write(
        turns="worker=0 .*sh start => "
        f"for n in 0 1; do (cd $CLOUD/worker-$n && {other}); done; touch $CLOUD/lost\n"
        "worker=1 .*sh start => wait_for_file lost\n"
    )
    code, said = cloud.run(WORKDIR="gs://bucket/run")
    assert code == 2 and "not every worker started" in said and "runs another job" in said, said
    for worker in (cloud.worker(0), cloud.worker(1)):
        assert not (worker / "trace_jax_job" / "code").exists()
        os.kill(int((worker / "trace_jax_job" / "pid").read_text()), 0)


def test_an_install_that_comes_twice_is_done_once_at_a_time_and_before_a_start(cloud):
    cloud.has("READY")
    busy, collided = cloud.worker() / "busy", cloud.worker() / "collided"
    cloud.write(pip=f"mkdir {busy} || touch {collided}; sleep 1; rmdir {busy}\n")
    shutil.copy(cloud.checkout / "launch" / "tpu_worker.sh", cloud.worker())
    archive = f"git archive --output={cloud.worker()}/trace_jax.tar.gz HEAD"
    subprocess.run(archive.split(), cwd=cloud.checkout, check=True)
    own = {"HOME": str(cloud.worker()), "PATH": f"{cloud.folder}/path:{os.environ['PATH']}"}

    def ask(*command: str) -> subprocess.Popen:
        script = ["bash", str(cloud.worker() / "tpu_worker.sh"), *command]
        return subprocess.Popen(script, env=os.environ | own, stdin=subprocess.PIPE, text=True)

    installs = [ask("install"), ask("install")]
    cloud.until(busy.exists)
    start = ask("start", "mine-1", "test", "!", "-e", str(busy))
    print(".", file=start.stdin, flush=True)
    children.said_by([*installs, start])
    assert [process.returncode for process in (*installs, start)] == [0, 0, 0]
    assert not collided.exists()
    code = cloud.worker() / "trace_jax_job" / "code"
    cloud.until(code.exists)
    assert code.read_text() == "0\n"


@pytest.mark.parametrize("hosts", [2])
def test_tools_of_a_mac_will_do(cloud):
    path = f"{tpu_cloud.FAKES}/mac:{tpu_cloud.PATH}"
    go = cloud.folder / "go"
    cloud.write(job=f"until [ -f {go} ]; do sleep 0.1; done; echo finished")
    (cloud.checkout / "notes").touch()
    first = cloud.start(WORKDIR="gs://bucket/run", PATH=path)
    cloud.until(lambda: len(cloud.calls("tpu_worker.sh follow")) >= 2)
    second = cloud.start(WORKDIR="gs://bucket/run", PATH=path)
    cloud.until(lambda: len(cloud.calls("tpu_worker.sh follow")) >= 4)
    go.touch()
    for process, (out, err) in zip((first, second), children.said_by([first, second]), strict=True):
        assert process.returncode == 0 and "[1] finished" in out
        assert "not on the slice as here (1): notes\n" in err
    assert "runs this job already" in err and cloud.starts(0) == cloud.starts(1) == 1
    assert not cloud.calls("tpu_worker.sh stop")


def test_a_job_is_told_to_stop(cloud):
    cloud.write(job='trap "echo saved; exit 75" TERM; echo up; while true; do sleep 0.1; done')
    running = cloud.start()
    cloud.until(lambda: cloud.starts() == 1 and cloud.calls("tpu_worker.sh follow"))
    assert cloud.run("stop")[0] == 0
    ((out, err),) = children.said_by([running])
    assert running.returncode == 130 and "saved" in out and "stopped by hand" in err
    assert cloud.starts() == 1
    cloud.write(job="exit 75")  # of itself, which the stop of the job before says nothing about
    code, said = cloud.run()
    assert code == 1 and cloud.starts() == 1 + 4, said


@pytest.mark.parametrize("hosts", [3])
@pytest.mark.parametrize(("left", "ends"), [(1, 130), (0, 130), (2, 2)])
def test_a_stop_is_for_all_workers_also_where_one_had_left_before(cloud, left, ends):
    cloud.write(
        job=f'case "$HOME" in *-1) exit {left} ;; esac; trap "exit 75" TERM; echo up\n'
        "while true; do sleep 0.1; done"
    )
    running = cloud.start(WORKDIR="gs://bucket/run")
    code = cloud.worker(1) / "trace_jax_job" / "code"
    cloud.until(lambda: code.exists() and len(cloud.calls("tpu_worker.sh follow")) >= 3)
    assert cloud.run("stop")[0] == 0
    children.said_by([running])
    assert running.returncode == ends and cloud.starts(0) == cloud.starts(1) == 1


def test_a_workdir_in_the_checkout_is_refused(cloud):
    code, said = cloud.run(WORKDIR="runs/mine")
    assert code == 2 and "WORKDIR=runs/mine would lie in the checkout" in said and not cloud.calls()


@pytest.mark.parametrize("hosts", [2])
def test_several_workers_on_disks_of_their_own_are_refused(cloud):
    code, said = cloud.run()
    assert (
        code == 2
        and f"mine has 2 workers, each with a disk of its own, and WORKDIR={cloud.workdir}" in said
    )
    assert cloud.calls("create") and not cloud.calls("scp")


def test_without_a_project_nothing_is_asked(cloud):
    cloud.write(turns="config get-value project => exit 0\n")
    code, said = cloud.run(PROJECT="")
    assert code == 2 and "PROJECT is empty" in said and "attempt" not in said
    assert cloud.calls() == ["config get-value project"]


def test_the_project_of_gcloud_is_taken(cloud):
    cloud.write(turns="config get-value project => echo theirs; exit 0\n")
    assert cloud.run(PROJECT="")[0] == 0 and cloud.calls("tpu-vm create", "--project=theirs")


def test_what_is_not_committed_is_told(cloud):
    (cloud.checkout / "notes").touch()
    with open(cloud.checkout / "launch" / "gpu.sh", "a") as script:
        script.write("\n")
    code, said = cloud.run()
    assert code == 0 and said.count("warning: ") == 1
    assert "warning: not committed, so not on the slice as here (2): launch/gpu.sh notes\n" in said


def test_a_clean_checkout_is_no_news(cloud):
    assert "warning" not in cloud.run()[1]


@pytest.mark.parametrize(
    ("given", "said_of_it"),
    [
        ({"FLAGS": "--config.policy.new=here.yaml"}, "--config.policy.new=here.yaml is not"),
        ({"FLAGS": "--config.data.path=here.yaml"}, "--config.data.path=here.yaml is not"),
        ({"CONFIG": "here.yaml:full"}, "--config=here.yaml is not"),
    ],
)
def test_a_file_that_the_slice_would_not_have_is_refused(cloud, given, said_of_it):
    (cloud.checkout / "here.yaml").touch()
    code, said = cloud.run(**given)
    assert code == 2 and f"{said_of_it} committed" in said and not cloud.calls()


@pytest.mark.parametrize(
    ("given", "said_of_it"),
    [
        ({"CONFIG": "configs/gemma9b.py:lora"}, "data.path is empty"),
        ({"CONFIG": "configs/gemma9b.py:loar"}, "variant 'loar' is unknown"),
        ({"FLAGS": "--config.train.beta=0"}, "train.beta=0.0 must be greater than 0"),
        (
            {"CONFIG": "configs/gemma9b.py:lora", "FLAGS": "--config.data.path=gs://b/pairs.jsonl"},
            "policy.old is synth_old",
        ),
    ],
)
def test_what_the_program_would_refuse_is_refused_before_anything_is_made(cloud, given, said_of_it):
    code, said = cloud.run(**given)
    assert code == 2 and said_of_it in said and not cloud.calls()


def test_data_and_policies_in_a_bucket_are_taken(cloud):
    named = {"data.path": "pairs.jsonl", "policy.old": "old.yaml", "policy.new": "new.yaml"}
    flags = " ".join(f"--config.{key}=gs://bucket/{name}" for key, name in named.items())
    assert cloud.run(CONFIG="configs/gemma9b.py:lora", FLAGS=flags)[0] == 0
    assert cloud.starts() == 1


def test_without_a_commit_nothing_is_made(cloud):
    shutil.rmtree(cloud.checkout / ".git")
    code, said = cloud.run()
    assert code == 2 and "start from a git clone" in said and not cloud.calls()
