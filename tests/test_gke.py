"""launch/gke.sh, the JobSet that it fills in, and the image.

Against the interface as JobSet and Kubernetes publish it, and fakes of kubectl and docker.
"""

import os
import subprocess
import typing
from pathlib import Path

import children
import pydantic
import pytest
import yaml
from kubeflow_trainer_api import models

ROOT = Path(__file__).resolve().parents[1]
FAKES = Path(__file__).with_name("fakes")
SECRET = "very secret"
JOB_SET = models.JobsetV1alpha2JobSet


def faults(model: type[pydantic.BaseModel], data: dict, place: str = "") -> list[str]:
    """What a cluster would refuse in `data`, or drop without a word: types and unknown fields."""
    found = [] if place else _wrong_types(model, data)
    fields = {field.alias or name: field for name, field in model.model_fields.items()}
    for key, value in data.items():
        if key not in fields:
            found.append(f"{place}.{key}: unknown")
        elif (inner := _model_in(fields[key].annotation)) is not None:
            for each in value if isinstance(value, list) else [value]:
                found += faults(inner, each, f"{place}.{key}")
    return found


def _wrong_types(model: type[pydantic.BaseModel], data: dict) -> list[str]:
    try:
        model.model_validate(data)
    except pydantic.ValidationError as error:
        return [
            f".{'.'.join(map(str, e['loc']))}: {e['msg']}"
            for e in error.errors()
            if not (_is_quantity(e) and isinstance(e["input"], int | str))
        ]
    return []


def _is_quantity(error: dict) -> bool:
    """A number or a text like 16Gi, for which the models have a class of their own."""
    return error.get("ctx", {}).get("class_name", "").endswith("ResourceQuantity")


def _model_in(annotation) -> type[pydantic.BaseModel] | None:
    """The model of a field, of the items of a list, or of an optional one of these."""
    if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        return annotation
    if typing.get_origin(annotation) is dict:
        return None
    return next(filter(None, map(_model_in, typing.get_args(annotation))), None)


class Cluster:
    """A folder that stands for a cluster and a registry."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.write(states="none\n", calls="", args="", codes="", hosts="1", turns="")
        self.write(log="2026-01-01T00:00:00.000000001Z hello\n", lines="99\n")
        self.write(pods="pod/first\n", waits="\n")

    def write(self, **files: str) -> None:
        for name, text in files.items():
            (self.folder / name).write_text(text)

    def run(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
        own = {
            "IMAGE": "eu/trace_jax:1", "WORKDIR": "gs://bucket/run", "NAME": "mine", "WAIT": "0.1",
            "CLOUD": str(self.folder), "GEMINI_API_KEY": SECRET, "HF_TOKEN": "",
            "OUT": str(self.folder / "out"), "PATH": f"{FAKES}:{os.environ['PATH']}",
        }  # fmt: skip
        return subprocess.run(
            ["bash", str(ROOT / "launch" / "gke.sh"), *arguments],
            env=os.environ | own | variables, capture_output=True, text=True,
            timeout=children.PATIENCE,
        )  # fmt: skip

    def calls(self, *words: str) -> list[str]:
        lines = (self.folder / "calls").read_text().splitlines()
        return [line for line in lines if all(word in line for word in words)]

    def applied(self) -> dict:
        return yaml.safe_load((self.folder / "applied").read_text())


@pytest.fixture
def cluster(tmp_path) -> Cluster:
    return Cluster(tmp_path)


@pytest.fixture(scope="module")
def job_set(tmp_path_factory) -> dict:
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    cluster.write(states="none\nCompleted\n")
    done = cluster.run("run", HOSTS="8", CHIPS="4", FLAGS='--config.name="a&b"\\c')
    assert done.returncode == 0, done.stderr
    return cluster.applied()


def test_the_job_set_has_only_fields_that_the_interface_knows(job_set):
    assert faults(JOB_SET, job_set) == []
    assert job_set["apiVersion"] == "jobset.x-k8s.io/v1alpha2"


def test_what_the_interface_does_not_know_is_found(job_set):
    (job,) = job_set["spec"]["replicatedJobs"]
    outside = job | {
        "template": job["template"] | {"podFailurePolicy": {}}
    }  # belongs into its spec
    container = {"name": "x", "imagePolicy": "Always", "tty": "yes"}
    pod = {"spec": {"template": {"spec": {"containers": [container]}}}}
    spec = {"replicatedJobs": [outside, {"name": "slice", "replicas": "1", "template": pod}]}
    found = "\n".join(faults(JOB_SET, job_set | {"spec": spec}))
    for place in ("template.podFailurePolicy: unknown", "containers.imagePolicy: unknown"):
        assert place in found
    for place in ("replicas: Input should be", "containers.0.tty: Input should be"):
        assert place in found


def test_one_process_a_host_with_its_chips(job_set):
    (job,) = job_set["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert spec["parallelism"] == spec["completions"] == 8
    (container,) = spec["template"]["spec"]["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert container["args"] == [
        "--config=configs/gemma9b.py:full", "--workdir=gs://bucket/run", "--distributed",
        '--config.name="a&b"\\c',
    ]  # fmt: skip
    assert container["securityContext"]["runAsUser"] == 1000


def test_a_tag_that_was_pushed_anew_is_pulled(job_set):
    (job,) = job_set["spec"]["replicatedJobs"]
    (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
    assert (container["image"], container["imagePullPolicy"]) == ("eu/trace_jax:1", "Always")


def test_refused_input_is_not_started_again(job_set):
    """Exit code 2 fails the job, that fails the set; all else starts the set again."""
    (job,) = job_set["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    (rule,) = spec["podFailurePolicy"]["rules"]
    name = spec["template"]["spec"]["containers"][0]["name"]
    codes = {"containerName": name, "operator": "In", "values": [2]}
    assert rule == {"action": "FailJob", "onExitCodes": codes}
    assert spec["template"]["spec"]["restartPolicy"] == "Never"  # podFailurePolicy needs it
    policy = job_set["spec"]["failurePolicy"]
    (rule,) = policy["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    assert policy["maxRestarts"] == 20


def test_from_the_image_to_the_results(cluster):
    cluster.write(states="none\nerror\nrunning\nCompleted\n")
    done = cluster.run("run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("hello") == 1
    steps = [cluster.calls(word) for word in ("docker build", "docker push", " apply ", " logs ")]
    order = [cluster.calls().index(found[0]) for found in steps]
    assert order == sorted(order)
    assert (cluster.folder / "secret").read_text() == f"GEMINI_API_KEY={SECRET}\n"
    assert SECRET not in "".join(cluster.calls()) + (cluster.folder / "applied").read_text()
    assert cluster.calls("storage rsync --recursive gs://bucket/run")


def test_without_keys_here_the_secret_there_stays(cluster):
    cluster.write(states="none\nCompleted\n")
    assert cluster.run("run", GEMINI_API_KEY="").returncode == 0
    assert not cluster.calls("secret")


def test_a_job_that_runs_is_followed_and_not_touched(cluster):
    args = '["--config=configs/gemma9b.py:full","--workdir=gs://bucket/run","--distributed"]'
    cluster.write(states="running\nCompleted\n", args=args)
    done = cluster.run("run")
    assert done.returncode == 0 and "runs already" in done.stderr and "hello" in done.stdout
    assert not cluster.calls(" apply ") and not cluster.calls("delete")
    cluster.write(states="running\n")
    done = cluster.run("run", FLAGS="--config.seed=3")
    assert done.returncode == 2 and "runs with other arguments" in done.stderr


def test_a_job_that_has_ended_makes_room(cluster):
    cluster.write(states="Failed\nCompleted\n")
    assert cluster.run("run").returncode == 0
    assert cluster.calls("delete jobset mine") and cluster.calls(" apply ")


def test_lines_between_two_connections_are_shown_and_none_twice(cluster):
    """kubectl takes a time to the second; a connection lasts for 2, 3, 4, then all lines."""
    lines = [f"2026-01-01T00:00:0{at}Z line {n}" for n, at in enumerate(("1.1", "1.2", "1.3"))]
    lines += ["2026-01-01T00:00:02.100000000Z line 3", "2026-01-01T00:00:02.100000001Z line 4"]
    cluster.write(log="\n".join(lines) + "\n", lines="2\n3\n4\n99\n")
    cluster.write(states="none\nrunning\nrunning\nrunning\nCompleted\n")
    done = cluster.run("run")
    assert done.returncode == 0, done.stderr
    shown = [line for line in done.stdout.splitlines() if line.startswith("line")]
    assert shown == [f"line {n}" for n in range(5)]
    assert done.stderr.count("the connection broke") == 3


def test_the_log_of_another_pod_is_shown_from_its_beginning(cluster):
    cluster.write(states="none\nrunning\nCompleted\n", pods="pod/first\npod/second\n")
    assert cluster.run("run").stdout.count("hello") == 2


def test_what_pods_wait_for_is_said_when_it_changes(cluster):
    no_nodes = "0/3 nodes are available: 3 Insufficient google.com/tpu."
    no_image = "ImagePullBackOff Back-off pulling image"
    cluster.write(
        states="none\n" + "running\n" * 4 + "Completed\n",
        pods="\n" * 4 + "pod/first\n",
        waits=f" \n  {no_nodes}  ;{no_nodes}\n{no_nodes}\n  {no_image};  \n",
    )
    done = cluster.run("run")
    assert done.returncode == 0 and "hello" in done.stdout, done.stderr
    begin = "the pods are not at work yet"
    told = [line for line in done.stderr.splitlines() if line.startswith(begin)]
    assert told == [begin, f"{begin}: {no_nodes}", f"{begin}: {no_image}"]


@pytest.mark.parametrize(("codes", "ends"), [("137 2 137", 2), ("1 12", 1), ("", 1)])
def test_a_failed_job_says_why(cluster, codes, ends):
    cluster.write(states="none\nFailed\n", codes=codes)
    done = cluster.run("run")
    assert done.returncode == ends and "why it failed" in done.stderr
    assert not cluster.calls("rsync")


def test_a_cluster_that_does_not_answer_gets_nothing(cluster):
    cluster.write(states="error\n")
    assert cluster.run("run").returncode != 0
    assert not cluster.calls("docker") and not cluster.calls(" apply ")


def test_a_dry_run_shows_the_manifest_and_touches_nothing(cluster):
    done = cluster.run("run", "--dry-run")
    assert done.returncode == 0 and cluster.calls() == [] and SECRET not in done.stdout
    text = done.stdout
    shown = text[text.index("apiVersion") : text.index("+ kubectl --namespace=default apply")]
    assert faults(JOB_SET, yaml.safe_load(shown)) == []
    assert "+ docker push eu/trace_jax:1" in text
    for action in ("fetch", "delete"):
        assert cluster.run(action, "--dry-run").returncode == 0 and cluster.calls() == []


@pytest.mark.parametrize(
    ("name", "value", "says"), [("WORKDIR", "/tmp/run", "in a bucket"), ("IMAGE", "", "IMAGE")]
)
def test_what_is_missing_is_said(cluster, name, value, says):
    done = cluster.run("run", **{name: value})
    assert done.returncode == 2 and says in done.stderr and cluster.calls() == []


def test_the_image_is_made_of_what_is_there_and_runs_as_a_plain_user():
    text = (ROOT / "launch" / "Dockerfile").read_text().replace("\\\n", " ")
    steps = [line.split(maxsplit=1) for line in text.splitlines() if line and line[0] != "#"]
    known = {"FROM", "WORKDIR", "COPY", "RUN", "ENV", "USER", "ENTRYPOINT"}
    assert steps[0][0] == "FROM" and {name for name, _ in steps} <= known
    for name, value in steps:
        if name == "COPY":
            *sources, target = value.split()
            assert target.startswith("./") and all((ROOT / source).exists() for source in sources)
        if name == "ENV":
            assert not any(word in value.upper() for word in ("KEY", "TOKEN", "SECRET", "PASSWORD"))
    copied = " ".join(value for name, value in steps if name == "COPY").split()
    assert {"setup.py", "README.md", "LICENSE", "constraints.txt", "trace_jax", "configs"} <= {
        *copied
    }
    (user,) = (value for name, value in steps if name == "USER")
    assert user.isdigit() and int(user) > 0
    assert f"--uid {user} " in next(value for name, value in steps if name == "RUN")
    assert yaml.safe_load(steps[-1][1]) == ["python", "-m", "trace_jax.launch"]
