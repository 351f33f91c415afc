"""The job scripts, against stand-ins for gcloud, kubectl, Slurm and the hosts of a slice.

The stand-ins log their arguments and answer from files: each line of `answers/KIND` is the status
and output of one call, the last one of all further calls.
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "configs/llava15_7b_twig.py"
SECOND = "configs/llava15_7b_twigpp_stage2.py"

STAND_IN = r"""#!/usr/bin/env bash
name=${0##*/}
printf '%s\0' "$name" "$@" $'\n' >> "$PLAY/log"
case "$name $*" in
  "gcloud "*" queued-resources "*) kind=$4 ;;
  "gcloud "*" scp --recurse "*) kind=fetch ;;
  "gcloud "*" scp "*) kind=scp ;;
  "gcloud "*" ssh "*tail*) kind=follow ;;
  "gcloud "*" ssh "*setsid*) kind=start ;;
  "gcloud "*" ssh "*) kind=install ;;
  *) kind=$name ;;
esac
[[ $name != kubectl ]] || cat > "$PLAY/manifest"
[[ ! -e $PLAY/$kind.signal ]] || kill -"$(< "$PLAY/$kind.signal")" "$PPID"
if [[ $name == gcloud && $3 == tpu-vm && -d $PLAY/home ]]; then
  cd "$PLAY/home" || exit
  for argument; do
    case $argument in
      --command=*) HOME=$PWD PATH=${PATH#*:} exec bash -c "${argument#--command=}" ;;
      build/*) exec cp "$REPOSITORY/$argument" twig_jax.tgz ;;
      *:*) exec cp -r "${argument#*:}" "$REPOSITORY/$7" ;;
    esac
  done
fi
[[ -e $PLAY/answers/$kind ]] || exit 0
read -r status output < "$PLAY/answers/$kind"
[[ $(wc -l < "$PLAY/answers/$kind") == 1 ]] || sed -i 1d "$PLAY/answers/$kind"
[[ -z $output ]] || echo "$output"
exit "$status"
"""

# As Slurm does: a copy of the script runs from elsewhere, in the folder it was submitted from.
SBATCH = r"""#!/usr/bin/env bash
while [[ $1 == --* ]]; do
  [[ $1 != --ntasks-per-node=* ]] || export SLURM_NTASKS_PER_NODE=${1#*=}
  [[ $1 != --gpus-per-node=* ]] || export SLURM_GPUS_ON_NODE=${1#*=}
  shift
done
cp "$1" "$PLAY/slurm_script"
SLURM_JOB_ID=7 exec bash "$PLAY/slurm_script" "${@:2}"
"""


class Play:
    """A copy of the repository's launchers in which scripts run, and what they ran."""

    def __init__(self, folder):
        self.folder, self.repository = folder / "play", folder / "repository"
        for made in (self.folder / "answers", self.folder / "bin", self.repository):
            made.mkdir(parents=True)
        shutil.copytree(ROOT / "launch", self.repository / "launch")
        for name in ("configs", "twig_jax"):
            (self.repository / name).mkdir()
        for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE", CONFIG, SECOND):
            (self.repository / name).touch()
        for name in ("gcloud", "kubectl", "srun", "scontrol", "sleep", "docker"):
            self.script(self.folder / "bin" / name, STAND_IN)
        self.script(self.folder / "bin" / "sbatch", SBATCH)

    @staticmethod
    def script(path, text):
        path.write_text(text)
        path.chmod(0o755)

    def answer(self, kind, *lines):
        (self.folder / "answers" / kind).write_text("".join(f"{line}\n" for line in lines))

    def run(self, *command, **variables):
        environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
        environment |= {"PLAY": str(self.folder), "REPOSITORY": str(self.repository), **variables}
        environment["PATH"] = f"{self.folder / 'bin'}:{environment['PATH']}"
        return subprocess.run(
            [str(c) for c in command],
            cwd=self.repository,
            env=environment,
            capture_output=True,
            text=True,
            timeout=20,
        )

    def log(self):
        """The calls since the last look."""
        path = self.folder / "log"
        calls = path.read_text().split("\0\n\0")[:-1] if path.exists() else []
        path.unlink(missing_ok=True)
        return [call.split("\0") for call in calls]

    def kinds(self):
        """The calls in short: gcloud's verbs, what goes over ssh, the names of the rest."""
        kinds = []
        for call in self.log():
            command = next((c for c in call if c.startswith("--command=")), "")
            if call[0] != "gcloud":
                kinds.append(call[0])
            elif command:
                found = [k for k in ("tail", "setsid", "uv venv") if k in command]
                kinds.append({"tail": "follow", "setsid": "start", "uv venv": "install"}[found[0]])
            else:
                kinds.append("fetch" if "--recurse" in call else call[4])
        return kinds


@pytest.fixture
def play(tmp_path):
    return Play(tmp_path)


def tpu(*more):
    command = "launch/tpu.sh --name twig --zone us-west4-a --type v5litepod-8"
    command += f" --version v2-alpha-tpuv5-lite --config {CONFIG} --out gs://bucket/twig"
    return [*command.split(), *more]


def gke(*more):
    command = "launch/gke.sh --name twig --image registry/twig --accelerator tpu-v5-lite-podslice"
    command += f" --topology 4x4 --config {CONFIG} --out gs://bucket/twig"
    return [*command.split(), *more]


def slurm(*more):
    return ["sbatch", "launch/slurm.sh", "--config", CONFIG, *more]


ATTEMPT = ["scp", "install", "start", "follow"]
ODD = ["--", "--set", 'name=it\'s a "twig"', "--set", "x=$(date) *\\"]


def test_the_scripts_are_clean():
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    shellcheck = shutil.which("shellcheck", path=path)
    assert shellcheck, "pip install '.[test]' brings shellcheck"
    scripts = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "launch").glob("*.sh"))
    assert len(scripts) == 4
    done = subprocess.run(
        [shellcheck, "-x", *scripts], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("command", [tpu, gke, slurm])
def test_a_dry_run_prints_what_a_run_runs_and_calls_nothing(play, command):
    more = {
        tpu: [
            "--spot",
            "--project",
            "p",
            "--data",
            "gs://b/data",
            "--export",
            "the twig",
            "--delete",
        ],
        gke: ["--spot", "--data", "gs://b/data", "--export", "gs://bucket/the twig"],
        slurm: ["--out", "runs/a b", "--export", "the twig"],
    }[command]
    dry = play.run(*command("--dry_run", *more, *ODD))
    assert dry.returncode == 0, dry.stderr
    assert play.log() == [] and dry.stderr == ""
    assert not (play.repository / "build").exists() and not (play.repository / "runs").exists()
    play.answer("list", "0", "0 ACTIVE")
    done = play.run(*command(*more, *ODD))
    assert done.returncode == 0, done.stderr
    real = play.log()
    manifest = play.folder / "manifest"
    real_manifest = manifest.read_text() if manifest.exists() else ""
    # What it prints is a script that does the same.
    play.answer("list", "0", "0 ACTIVE")
    again = play.run("bash", "-c", dry.stdout)
    assert again.returncode == 0, again.stderr
    assert play.log() == real and len(real) > 0
    assert (manifest.read_text() if manifest.exists() else "") == real_manifest


@pytest.mark.parametrize("script", ["tpu", "gke", "slurm"])
def test_help_and_mistakes(play, script):
    path = f"launch/{script}.sh"
    helped = play.run("bash", path, "-h")
    assert helped.returncode == 0 and f"launch/{script}.sh" in helped.stdout
    source = (ROOT / path).read_text().replace("\\\n  ", "")
    valued, switches = re.search(r'^parse_flags "(.*)" "(.*)" "\$@"$', source, re.M).groups()
    for flag in f"{valued} {switches}".split():
        assert f"  --{flag} " in helped.stdout
    assert "set -euo" not in helped.stdout

    whole = {"tpu": tpu, "gke": gke, "slurm": slurm}[script]()
    for wrong, said in [
        (["--nmae", "x"], "unknown flag --nmae"),
        (["--dry_run=yes"], "unknown flag --dry_run"),
        (["steps=3"], "steps=3 is not a flag; arguments for launch.train come after --"),
        (["--export"], "--export needs a value"),
        (["--export", "--dry_run"], "--export needs a value"),
        (["--config", "configs/none.py"], "--config configs/none.py: no such file"),
    ]:
        done = play.run(*whole, *wrong)
        assert done.returncode == 2 and said in done.stderr, done.stderr
    elsewhere = subprocess.run(
        ["bash", str(ROOT / path)], cwd=play.folder, capture_output=True, text=True, timeout=60
    )
    assert elsewhere.returncode == 2 and "repository's folder" in elsewhere.stderr
    assert play.log() == []


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["launch/tpu.sh"], "give --name --zone --type --version --config --out"),
        (tpu("--out", "runs/twig"), "gs://BUCKET/FOLDER"),
        (tpu("--data", "data"), "--data data: not gs://BUCKET/FOLDER"),
        (tpu("--name", "My twig"), "--name My twig: up to 63"),
        (tpu("--restarts", "1e3"), "--restarts 1e3: not a whole number"),
        (tpu("--export", "launch"), "--export launch: is there already"),
        (tpu("--export", "none/twig"), "make its parent folder first"),
        (tpu("--config", "README.md"), "only what is in configs/ reaches the hosts"),
        (["launch/gke.sh"], "give --name --image --accelerator --topology --config --out"),
        (gke("--topology", "4by4"), "--topology 4by4: not AxB"),
        (gke("--topology", "3x2"), "its 6 chips are not hosts of --chips 4"),
        (gke("--chips", "0"), "--chips 0"),
        (gke("--config", "/etc/passwd"), "the image's copy is read, name it as in this folder"),
        (gke("--data", "gs://bucket/my data"), "--data gs://bucket/my data: not gs://"),
        (gke("--export", "twig"), "--export twig: pods keep no files"),
        (["bash", "launch/slurm.sh", "--config", CONFIG], "not in a Slurm job"),
        (["sbatch", "--gpus-per-node=8", *slurm()[1:]], "give sbatch --ntasks-per-node=8"),
    ],
)
def test_mistakes_are_named_before_anything_runs(play, command, said):
    done = play.run(*command)
    assert done.returncode == 2 and said in done.stderr, done.stderr
    assert play.log() == []


def test_a_slice_is_created_once_it_can_be(play):
    play.answer("list", "0", "0 WAITING_FOR_RESOURCES", "0 PROVISIONING", "0 ACTIVE")
    done = play.run(*tpu("--spot", "--export", "twig"))
    assert done.returncode == 0, done.stderr
    waiting = ["list", "create", "list", "sleep", "list", "sleep", "list"]
    assert play.kinds() == [*waiting, *ATTEMPT, "fetch"]
    assert "the slice stays and costs" in done.stderr


def test_a_slice_that_is_there_is_used(play):
    play.answer("list", "0 ACTIVE")
    assert play.run(*tpu("--delete")).returncode == 0
    assert play.kinds() == ["list", *ATTEMPT, "delete"]


def test_a_preempted_run_goes_on(play):
    play.answer("list", "0 ACTIVE", "0 SUSPENDED", "0", "0 ACTIVE")
    play.answer("follow", "75", "0")
    done = play.run(*tpu())
    assert done.returncode == 0, done.stderr
    recreated = ["list", "sleep", "delete", "list", "create", "list"]
    assert play.kinds() == ["list", *ATTEMPT, "sleep", *recreated, *ATTEMPT]
    assert "restart 1 of 10 in 10 seconds" in done.stderr


def test_a_slice_that_vanishes_while_training_is_replaced(play):
    play.answer("list", "0 ACTIVE", "0 SUSPENDING", "0 SUSPENDED", "0", "0 ACTIVE")
    play.answer("follow", "70", "255", "0")
    done = play.run(*tpu())
    assert done.returncode == 0, done.stderr
    kinds = play.kinds()
    assert kinds.count("create") == kinds.count("delete") == 1
    assert kinds.count("install") == kinds.count("follow") == 3


def test_a_failed_run_is_not_tried_again(play):
    play.answer("list", "0 ACTIVE")
    play.answer("follow", "70 steps must be above 0")
    done = play.run(*tpu("--delete"))
    assert done.returncode == 1
    assert "steps must be above 0" in done.stdout and "training failed" in done.stderr
    assert play.kinds() == ["list", *ATTEMPT, "list", "delete"]


def test_restarts_are_bounded(play):
    play.answer("list", "0 ACTIVE")
    play.answer("follow", "75")
    done = play.run(*tpu("--restarts", "9"))
    assert done.returncode == 75 and "all 9 restarts are used up" in done.stderr
    calls = play.log()
    pauses = [int(c[1]) for c in calls if c[0] == "sleep"]
    assert pauses == [10, 20, 40, 80, 160, 320, 640, 640, 640]
    assert sum("tail" in c[-1] for c in calls) == 10


@pytest.mark.parametrize(("kind", "calls"), [("list", ["list"]), ("create", ["list", "create"])])
def test_what_gcloud_refuses_at_first_is_not_tried_again(play, kind, calls):
    play.answer(kind, "1 PERMISSION_DENIED")
    done = play.run(*tpu())
    assert done.returncode == 1 and "nothing was started" in done.stderr
    assert play.kinds() == calls


def test_what_gcloud_refuses_later_is_tried_again(play):
    play.answer("list", "0 ACTIVE", "1", "0", "0", "0 ACTIVE")
    play.answer("create", "1", "0")
    play.answer("fetch", "1", "0")
    done = play.run(*tpu("--export", "twig"))
    assert done.returncode == 0, done.stderr
    recreated = ["list", "sleep", "list", "create", "sleep", "list", "create", "list"]
    fetched = [*ATTEMPT, "fetch"]
    assert play.kinds() == ["list", *fetched, "sleep", *recreated, *fetched]


@pytest.fixture
def interruptible():
    """Shells have what runs in the background ignore interrupts, and with it what that starts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_leaves_the_slice(play, interruptible):
    play.answer("list", "0 ACTIVE")
    (play.folder / "follow.signal").write_text("INT")
    done = play.run(*tpu("--delete"))
    assert done.returncode == 130 and "slice and training, if started, go on" in done.stderr
    assert play.kinds() == ["list", *ATTEMPT]


UV = r"""#!/usr/bin/env bash
printf '%s\0' uv "$@" $'\n' >> "$PLAY/log"
[[ $1 == venv ]] || exit 0
mkdir -p .venv/bin && cp "$PLAY/python" .venv/bin/python
"""
PYTHON = r"""#!/usr/bin/env bash
trap 'sleep 0.5; touch "$PLAY/saved"; exit 75' TERM
printf '%s\0' python "$@" $'\n' >> "$PLAY/log"
echo "a line of the log"
read -r status < "$PLAY/answers/python"
sed -i 1d "$PLAY/answers/python"
mkdir -p export && echo weights > export/model.safetensors
exit "$status"
"""


@pytest.fixture
def host(play):
    """A folder in which the commands for hosts run, with stand-ins for uv and Python."""
    home = play.folder / "home"
    (home / ".local" / "bin").mkdir(parents=True)
    play.script(home / ".local" / "bin" / "uv", UV)
    play.script(play.folder / "python", PYTHON)
    play.answer("list", "0 ACTIVE")
    return home


def test_on_the_hosts(play, host):
    play.answer("python", "0")
    done = play.run(*tpu("--export", "the twig", *ODD))
    assert done.returncode == 0, done.stderr
    assert (play.repository / "the twig" / "model.safetensors").read_text() == "weights\n"
    assert done.stdout.endswith("a line of the log\n")
    sent = {p.name for p in (host / "twig_jax").iterdir()}
    assert {"configs", "launch", "twig_jax", "pyproject.toml", "LICENSE", "train.log"} <= sent
    python = [c for c in play.log() if c[0] == "python"]
    train = f"python -m launch.train --distributed --config {CONFIG} --set out=gs://bucket/twig"
    assert python == [[*train.split(), "--export", "export", *ODD[1:]]]


def test_on_hosts_that_are_preempted_and_fail(play, host):
    play.answer("python", "75", "3")
    done = play.run(*tpu())
    assert done.returncode == 1
    assert done.stdout.endswith("a line of the log\nstatus 3\n")
    assert play.kinds().count("python") == 2


BUCKET = r"""#!/usr/bin/env bash
[[ $* == "storage rsync --recursive gs://bucket/data "* ]] || exit 1
echo "has" $(ls "$5") >> "$PLAY/copies"
echo rows > "$5/rows.json"
"""


def test_the_data_reach_the_hosts(play, host):
    """As data/ of the folder the run is in. They stay there when the code is replaced."""
    tools = play.folder / "tools"
    tools.mkdir()
    play.script(tools / "gcloud", BUCKET)
    path = f"{tools}:{os.environ['PATH']}"
    play.answer("python", "75", "0")
    done = play.run(*tpu("--data", "gs://bucket/data/"), PATH=path)
    assert done.returncode == 0, done.stderr
    assert (host / "twig_jax" / "data" / "rows.json").read_text() == "rows\n"
    assert (play.folder / "copies").read_text() == "has\nhas rows.json\n"
    play.log()
    done = play.run(*tpu("--data", "gs://bucket/none"), PATH=path)
    assert done.returncode == 1 and "python" not in play.kinds()


@pytest.fixture
def on_host(play, host):
    """on_host(i): runs the i-th command for hosts: install, start, follow."""
    dry = play.run(*tpu("--dry_run"))
    lines = shlex.split(dry.stdout, comments=True)
    commands = [w.removeprefix("--command=") for w in lines if w.startswith("--command=")]
    shutil.copyfile(play.folder / "python", host / "archived")
    subprocess.run(["tar", "-czf", host / "twig_jax.tgz", "-C", host, "archived"], check=True)

    def on_host(i):
        command = f"PATH=${{PATH#*:}}; cd '{host}' && {commands[i]}"
        return play.run("bash", "-c", command, HOME=str(host)).returncode

    return on_host


def test_a_start_that_is_repeated_starts_one_run(play, on_host):
    play.answer("python", "0", "0")
    assert [on_host(i) for i in (0, 1, 1, 2, 2)] == [0, 0, 0, 0, 0]
    assert [c[0] for c in play.log()] == ["uv", "uv", "python"]


def test_a_run_from_before_saves_before_the_next(play, host, on_host):
    play.script(play.folder / "python", PYTHON.replace("mkdir", "sleep 60 & wait; mkdir", 1))
    play.answer("python", "0", "0")
    assert on_host(0) == on_host(1) == 0
    started = time.monotonic()
    while not (host / "twig_jax" / "train.log").read_text():
        assert time.monotonic() - started < 10
        time.sleep(0.02)
    assert on_host(0) == 0
    assert (play.folder / "saved").exists()
    assert not (host / "twig_jax" / "pid").exists()


def test_a_host_that_cannot_install_is_a_failure(play, host, on_host):
    play.script(host / ".local" / "bin" / "uv", "#!/bin/sh\nexit 1\n")
    assert on_host(0) == 70


def test_a_run_without_a_status_was_preempted(play, host, on_host):
    assert on_host(0) == 0
    assert on_host(2) == 75


def test_the_jobset(play):
    done = play.run(*gke("--spot", "--restarts", "3", *ODD))
    assert done.returncode == 0, done.stderr
    assert play.log() == [["kubectl", "create", "--filename=-"]]
    # Of all hosts, of which kubectl by itself refuses more than five, and from the first line on.
    assert "--follow --tail=-1 --prefix --max-log-requests=4 shows its output" in done.stderr
    jobset = yaml.safe_load((play.folder / "manifest").read_text())
    assert jobset["metadata"]["name"] == "twig"
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] == 3
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert job["parallelism"] == job["completions"] == 4 and job["backoffLimit"] == 0
    disrupted, failed = job["podFailurePolicy"]["rules"]
    assert disrupted["action"] == "Count" and failed["action"] == "FailJob"
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    # An error, a configuration and a flag that are none end launch.train with 1, see test_train. A
    # host that is lost has the others abort, with 134: from there a run goes on, as from 75.
    codes = {"containerName": container["name"], "operator": "In", "values": [1]}
    assert failed["onExitCodes"] == codes
    assert pod["restartPolicy"] == "Never"
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x4",
        "cloud.google.com/gke-spot": "true",
    }
    train = f"python -m launch.train --distributed --config {CONFIG} --set out=gs://bucket/twig"
    # Kubernetes reads $$ as one $.
    assert [c.replace("$$", "$") for c in container["command"]] == [*train.split(), *ODD[1:]]
    assert "$$(date)" in container["command"][-1]


@pytest.mark.parametrize(
    ("data", "bucket", "options"),
    [
        ("gs://bucket/a/data/", "bucket", "implicit-dirs,only-dir=a/data"),
        ("gs://bucket", "bucket", "implicit-dirs"),
        (None, None, None),
    ],
)
def test_the_jobset_mounts_the_data(play, data, bucket, options):
    done = play.run(*gke(*(["--data", data] if data else [])))
    assert done.returncode == 0, done.stderr
    jobset = yaml.safe_load((play.folder / "manifest").read_text())
    template = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
    pod, (container,) = template["spec"], template["spec"]["containers"]
    if not data:
        assert "metadata" not in template and "volumes" not in pod
        assert "volumeMounts" not in container
        return
    assert template["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}
    (volume,), (mount,) = pod["volumes"], container["volumeMounts"]
    assert volume["csi"] == {
        "driver": "gcsfuse.csi.storage.gke.io",
        "readOnly": True,
        "volumeAttributes": {"bucketName": bucket, "mountOptions": options},
    }
    # The image's working folder is where the configurations' names begin.
    (folder,) = re.findall(r"^WORKDIR (.*)$", (ROOT / "launch" / "Dockerfile").read_text(), re.M)
    assert mount == {"name": volume["name"], "mountPath": f"{folder}/data", "readOnly": True}


def test_what_kubectl_refuses(play):
    play.answer("kubectl", "1 AlreadyExists")
    assert play.run(*gke()).returncode == 1


def test_a_slurm_job(play):
    done = play.run(*slurm("--out", "runs/a b", *ODD), SLURM_CPUS_PER_TASK="4")
    assert done.returncode == 0, done.stderr
    (call,) = play.log()
    assert call[0] == "srun" and "--output=runs/slurm/%j-%N.log" in call
    train = f"python -m launch.train --distributed --config {CONFIG}"
    assert call[call.index("python") :] == [*train.split(), "--set", "out=runs/a b", *ODD[1:]]
    assert (play.repository / "runs" / "slurm").is_dir()
    text = (ROOT / "launch" / "slurm.sh").read_text()
    assert set(re.findall(r"^#SBATCH --([a-z-]+)", text.split("\n\n")[0], re.M)) == {
        *("job-name", "nodes", "gpus-per-node", "ntasks-per-node", "signal", "requeue", "open-mode")
    }


@pytest.mark.parametrize("signalled", [False, True])
def test_a_preempted_slurm_job_is_queued_again(play, signalled):
    if signalled:
        (play.folder / "srun.signal").write_text("TERM")
    play.answer("srun", "75")
    done = play.run(*slurm())
    assert done.returncode == 75
    assert [c for c in play.log() if c[0] != "srun"] == [["scontrol", "requeue", "7"]]
    play.answer("scontrol", "1")
    done = play.run(*slurm())
    assert done.returncode == 75 and "submit the same command again" in done.stderr


def test_a_failed_slurm_job_is_not_queued_again(play):
    play.answer("srun", "1")
    done = play.run(*slurm())
    assert done.returncode == 1 and "see runs/slurm/7-*.log" in done.stderr
    assert [c[0] for c in play.log()] == ["srun"]


def test_the_documented_commands(play):
    text = (ROOT / "docs" / "jobs.md").read_text()
    blocks = re.findall(r"```sh\n(.*?)```", text, re.S)
    scripts = set()
    for line in "".join(blocks).replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        script = next((w for w in words if w.startswith("launch/") and w.endswith(".sh")), None)
        if script:
            scripts.add(script)
            words.insert(words.index(script) + 1, "--dry_run")
        done = play.run("bash", "-c", shlex.join(words).replace("'&&'", "&&"))
        assert done.returncode == 0, done.stderr
        assert not script or "launch.train" in done.stdout
    assert scripts == {"launch/tpu.sh", "launch/gke.sh", "launch/slurm.sh"}
    assert {c[0] for c in play.log()} == {"docker", "gcloud"}
