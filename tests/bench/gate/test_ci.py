"""What a CI uses: the shell script, the workflow, the examples, and the step of our own CI."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from bench.commands.gate import command

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = ROOT / "docs" / "ci" / "gate.sh"
README = ROOT / "docs" / "ci" / "README.md"
WORKFLOW = ROOT / ".github" / "workflows" / "gate.yml"

GIT = {f"GIT_{who}_{what}": "t@t" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
GIT |= {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}


def executable(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)
    return path


def git(folder, *arguments):
    subprocess.run(["git", *arguments], cwd=folder, check=True, env=os.environ | GIT)


@pytest.fixture
def checkout(tmp_path):
    """A project of two commits with the script, and a vqbench that notes how it was called."""
    folder = tmp_path / "a project"
    (folder / "docs" / "ci").mkdir(parents=True)
    shutil.copy(SCRIPT, folder / "docs" / "ci")
    shutil.copy(ROOT / "pyproject.toml", folder)
    shutil.copy(ROOT / "constraints.txt", folder)
    (folder / ".gitignore").write_text("fake\n.venv*\n")
    git(folder, "init", "-q")
    git(folder, "add", "-A")
    for message in ("one", "two"):
        git(folder, "commit", "-q", "--allow-empty", "-m", message)
    executable(folder / "fake" / "vqbench", 'printf "%s\\n" "$@" >"$CALLED"; exit "${CODE:-0}"')
    return folder


def run(folder, *arguments, **variables):
    """Run the script; its process, and how vqbench was called (None: it wasn't)."""
    called = folder.parent / "called"
    called.unlink(missing_ok=True)
    values = {"PATH": os.environ["PATH"], "CALLED": str(called)}
    values |= {"VQBENCH": str(folder / "fake" / "vqbench")} | GIT | variables
    done = subprocess.run(
        [folder / "docs" / "ci" / "gate.sh", *arguments],
        cwd="/",
        env={name: value for name, value in values.items() if value},
        capture_output=True,
        text=True,
    )
    return done, called.read_text().splitlines() if called.exists() else None


def parsed(called):
    """The options as the command reads them: any that it doesn't know is an error."""
    assert called[0] == "gate"
    return command.make_context("gate", called[1:]).params


def test_the_gate_is_called_with_reports_and_the_previous_commit(checkout):
    done, called = run(checkout)
    assert done.returncode == 0, done.stderr
    params = parsed(called)
    assert params["baseline"] == "HEAD~1"
    assert not params["strict"]
    out = Path("gate-report")
    assert [params[name] for name in ("json", "junit", "md", "results")] == [
        out / "gate.json",
        out / "gate.xml",
        out / "gate.md",
        out / "records",
    ]
    assert (checkout / out).is_dir()


def test_what_the_environment_and_the_arguments_say_reaches_the_gate(checkout, tmp_path):
    summary = tmp_path / "summary of a step.md"
    done, called = run(
        checkout,
        "--pairs",
        "9",
        BASELINE="HEAD",
        SELECTION="-w minilm  -k * -l *.query -m 1 -m 8",
        STRICT="1",
        OUT=str(tmp_path / "my out"),
        GITHUB_STEP_SUMMARY=str(summary),
    )
    assert done.returncode == 0, done.stderr
    params = parsed(called)
    assert params["kernels"] == ("*",)  # not the names of files here
    assert params["layers"] == ("*.query",)
    assert params["ms"] == (1, 8)
    assert params["pairs"] == 9
    assert params["baseline"] == "HEAD"
    assert params["strict"]
    assert params["md"] == summary
    assert params["json"] == tmp_path / "my out" / "gate.json"


@pytest.mark.parametrize("code", [0, 1, 3, 4])
def test_the_exit_code_is_the_gates(checkout, code):
    assert run(checkout, CODE=str(code))[0].returncode == code


def test_a_baseline_may_be_a_folder_or_a_file(checkout):
    assert parsed(run(checkout, BASELINE="docs")[1])["baseline"] == "docs"
    shutil.rmtree(checkout / ".git")
    assert parsed(run(checkout, BASELINE="constraints.txt")[1])["baseline"] == "constraints.txt"


def test_changes_that_are_not_committed_are_part_of_the_candidate(checkout):
    (checkout / "pyproject.toml").write_text("changed")
    assert run(checkout)[1] is not None


def refused(folder, **variables):
    done, called = run(folder, **variables)
    assert called is None
    assert done.returncode == 2
    assert not done.stdout
    (line,) = done.stderr.splitlines()
    return line


def test_a_baseline_that_is_not_there_is_told_in_one_line(checkout, tmp_path):
    assert "there is no revision nonsense here" in refused(checkout, BASELINE="nonsense")
    shallow = tmp_path / "shallow"
    git(tmp_path, "clone", "-q", "--depth", "1", f"file://{checkout}", str(shallow))
    assert "HEAD~1 isn't in this shallow clone" in refused(shallow)
    git(checkout, "checkout", "-q", "--orphan", "first")
    git(checkout, "commit", "-q", "-m", "the first")
    assert "there is no revision HEAD~1 here" in refused(checkout)
    shutil.rmtree(checkout / ".git")
    assert "this is no git checkout" in refused(checkout)


# A python that makes environments of itself and notes what it installs.
PYTHON = """
case "$*" in
  --version) echo Python 3.11.0 ;;
  "-m venv "*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; cp fake/vqbench "$3/bin/vqbench" ;;
  *install*) all=$*; echo "${all##* install }" >>"$INSTALLED"; exit "${FAILS:-0}" ;;
esac
"""


@pytest.fixture
def installing(checkout, tmp_path):
    """Call the script without a vqbench; what was called and what was installed meanwhile."""
    python = executable(checkout / "fake" / "python", PYTHON)
    executable(checkout / "fake" / "nvidia-smi", "exit 9")  # no GPU, on any machine
    installed = tmp_path / "installed"

    def call(**variables):
        installed.write_text("")
        path = f"{checkout / 'fake'}:{os.environ['PATH']}"
        values = {"VQBENCH": "", "PYTHON": str(python), "INSTALLED": str(installed), "PATH": path}
        done, called = run(checkout, **values | variables)
        return done, called, installed.read_text().splitlines()

    return call


def test_an_environment_is_made_once_and_kept(installing, checkout):
    done, called, lines = installing(TORCH_ARGS="--index-url https://example.org/cpu")
    assert done.returncode == 0, done.stderr
    assert called[0] == "gate"
    pin = re.search(r"TORCH := (\S+)", (ROOT / "Makefile").read_text())[1]
    assert lines == [
        f"{pin} --index-url https://example.org/cpu -c constraints.txt",
        "-e .[cpu,real] -c constraints.txt",
    ]
    _, called, lines = installing()
    assert called is not None
    assert lines == []
    with (checkout / "constraints.txt").open("a") as file:
        file.write("another==1.0\n")
    assert len(installing()[2]) == 2
    assert installing()[2] == []


def test_with_a_gpu_its_kernels_are_installed_too(installing, checkout):
    executable(checkout / "fake" / "nvidia-smi", "exit 0")
    assert installing()[2][1] == "-e .[cpu,real,triton,cuda] -c constraints.txt"


def test_an_install_that_fails_ends_in_2_and_is_done_again(installing):
    done, called, lines = installing(FAILS="1")
    assert done.returncode == 2
    assert called is None
    assert "the environment .venv-gate can't be made" in done.stderr
    assert len(lines) == 1  # nothing is installed on top of what failed
    assert len(installing()[2]) == 2


def workflow(text):
    """A workflow as GitHub reads it: YAML 1.1 takes the key `on` for a truth value."""
    read = yaml.safe_load(text)
    return {("on" if key is True else key): value for key, value in read.items()}


def test_the_workflow_hands_its_inputs_to_the_script_as_variables():
    read = workflow(WORKFLOW.read_text())
    inputs = read["on"]["workflow_call"]["inputs"]
    text = WORKFLOW.read_text()
    assert set(re.findall(r"inputs\.(\w+)", text)) == set(inputs)
    assert read["permissions"] == {"contents": "read"}
    job = read["jobs"]["gate"]
    assert job["concurrency"]["cancel-in-progress"] is False
    steps = {step.get("uses", step.get("run", "")).split("@")[0]: step for step in job["steps"]}
    assert steps["actions/checkout"]["with"]["fetch-depth"] == 0
    step = steps["docs/ci/gate.sh"]
    head = SCRIPT.read_text().split("set -euo")[0]
    assert all(re.search(rf"^#   {name} ", head, re.MULTILINE) for name in step["env"])
    assert steps["actions/upload-artifact"]["with"]["path"].rstrip("/") == step["env"]["OUT"]
    # an input within a script's text would be run as code
    assert not [one for one in job["steps"] if "${{" in one.get("run", "")]


def examples():
    """The YAML of the README, by its first line."""
    blocks = re.findall(r"^```yaml\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    return {block.splitlines()[0]: block for block in blocks}


@pytest.mark.parametrize("first", ["name: kernels", "name: cpu kernels"])
def test_the_examples_call_the_workflow_as_it_is(first):
    inputs = workflow(WORKFLOW.read_text())["on"]["workflow_call"]["inputs"]
    job = workflow(examples()[first])["jobs"]["gate"]
    assert job["uses"] == f"./{WORKFLOW.relative_to(ROOT)}"
    given = job["with"]
    required = {name for name, one in inputs.items() if one.get("required")}
    assert required <= set(given) <= set(inputs)
    kinds = {"string": str, "number": int, "boolean": bool}
    assert all(isinstance(value, kinds[inputs[name]["type"]]) for name, value in given.items())
    assert isinstance(yaml.safe_load(given["runner"]), list)
    command.make_context("gate", given["selection"].split())


def test_the_example_for_gitlab_uses_the_scripts_variables():
    job = yaml.safe_load(examples()["gate:"])["gate"]
    head = SCRIPT.read_text().split("set -euo")[0]
    for name in set(job["variables"]) - {"GIT_DEPTH"}:
        assert re.search(rf"^#   {name} ", head, re.MULTILINE)
    assert job["artifacts"]["reports"]["junit"] == "gate-report/gate.xml"


@pytest.mark.parametrize("code", [0, 1, 2])
def test_in_our_own_ci_the_gate_fails_nothing_and_tests_have_the_last_word(tmp_path, code):
    own = tmp_path / ".ci" / "run"
    own.parent.mkdir()
    shutil.copy(ROOT / ".ci" / "run", own)
    executable(tmp_path / "docs" / "ci" / "gate.sh", f'echo "gate of $SELECTION"; exit {code}')
    executable(tmp_path / "bin" / "make", 'echo "== 7 passed in $1 =="')
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    done = subprocess.run([own], env={"PATH": path}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    first, said, told, last = done.stdout.splitlines()
    assert (first, last) == ("== 7 passed in test ==", "== 7 passed in test-sweeps ==")
    assert told.startswith(f"gate: exit code {code},")
    command.make_context("gate", said.removeprefix("gate of ").split())


def test_in_our_own_ci_a_test_that_fails_ends_it(tmp_path):
    own = tmp_path / ".ci" / "run"
    own.parent.mkdir()
    shutil.copy(ROOT / ".ci" / "run", own)
    executable(tmp_path / "bin" / "make", "exit 2")
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    done = subprocess.run([own], env={"PATH": path}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert not done.stdout
