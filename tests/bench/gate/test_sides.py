"""Which code a side is, and its configs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.gate import sides
from bench.gate.sides import opposite, parse_configs, resolve, running, write_harness
from vqkernels.errors import BackendError, ConfigError, SpecError


def git(folder: Path, *words: str) -> str:
    who = ["-c", "user.name=x", "-c", "user.email=x@example.com"]
    done = subprocess.run(
        ["git", "-C", folder, *who, *words], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """Two commits and a change that is in none."""
    place = tmp_path / "repository"
    (place / "vqkernels").mkdir(parents=True)
    init = place / "vqkernels" / "__init__.py"
    for number, text in enumerate(("first", "second")):
        init.write_text(text, encoding="utf-8")
        if not number:
            git(place, "init", "-b", "main")
        git(place, "add", ".")
        git(place, "commit", "-m", text)
    init.write_text("uncommitted", encoding="utf-8")
    monkeypatch.chdir(place)
    return place


def code(side) -> str:
    return (Path(side.root) / "vqkernels" / "__init__.py").read_text(encoding="utf-8")


def test_a_revision_is_its_files_and_leaves_nothing_in_git(repository, tmp_path):
    before = git(repository, "worktree", "list")
    for name, text in (("HEAD~1", "first"), ("main", "second")):
        side = resolve(name, tmp_path / text)
        commit = git(repository, "rev-parse", name)
        assert code(side) == text
        assert side.revision == commit
        assert side.what == f"{name} ({commit[:9]})"
        assert side.path == (str(tmp_path / text),)
        assert side.python == sys.executable
    assert git(repository, "worktree", "list") == before
    assert git(repository, "status", "--porcelain") == "M vqkernels/__init__.py"


def test_a_revision_is_held_against_the_working_tree(repository, tmp_path):
    """Found from within it, and on the same kind of path."""
    inside = repository / "vqkernels"
    os.chdir(inside)
    baseline = resolve("HEAD", tmp_path / "files")
    side = opposite(baseline)
    assert (code(side), side.what) == ("uncommitted", "working tree")
    assert len(side.path) == len(baseline.path)
    assert opposite(resolve(str(repository), tmp_path / "unused")) == running()
    assert opposite(None) == running()


def test_a_commit_is_called_by_its_hash_once(repository, tmp_path):
    commit = git(repository, "rev-parse", "HEAD")
    assert resolve(commit, tmp_path / "a").what == commit[:9]


def test_a_folder_is_what_is_there_now(repository, tmp_path):
    side = resolve(".", tmp_path / "unused")
    assert code(side) == "uncommitted"
    assert side.revision is None
    assert not (tmp_path / "unused").exists()


def test_a_package_with_kernels_of_its_own_keeps_the_running_vqkernels(tmp_path):
    (tmp_path / "plugin" / "src").mkdir(parents=True)
    side = resolve(str(tmp_path / "plugin"), tmp_path / "unused")
    here = running()
    assert side.root == here.root
    assert side.path == (str(tmp_path / "plugin"), str(tmp_path / "plugin" / "src"), *here.path)


def test_an_environment_brings_its_interpreter(tmp_path):
    place = tmp_path / "env"
    place.mkdir()
    (place / "pyvenv.cfg").touch()
    with pytest.raises(BackendError, match="without bin/python"):
        resolve(str(place), tmp_path / "unused")
    (place / "bin").mkdir()
    (place / "bin" / "python").symlink_to(sys.executable)
    side = resolve(str(place), tmp_path / "unused")
    assert (side.python, side.path, side.root) == (str(place / "bin" / "python"), (), None)


@pytest.mark.parametrize("name", ["no-such", "--upload-pack=x", "HEAD~99", ""])
def test_what_is_nothing_is_one_line(repository, tmp_path, name):
    with pytest.raises(BackendError, match="git knows no such revision") as error:
        resolve(name or "''", tmp_path / "unused")
    assert "\n" not in str(error.value)


def test_outside_a_checkout_there_are_no_revisions(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BackendError, match="no git checkout is here"):
        resolve("main", tmp_path / "unused")


def test_files_that_can_not_be_had_are_one_line(repository, tmp_path, monkeypatch):
    (blob,) = (repository / ".git" / "objects").glob(
        "/".join(_object(git(repository, "rev-parse", "HEAD:vqkernels/__init__.py")))
    )
    blob.unlink()
    with pytest.raises(BackendError, match="fetch the whole history") as error:
        resolve("HEAD", tmp_path / "files")
    assert "\n" not in str(error.value)


def _object(name: str) -> tuple[str, str]:
    return name[:2], name[2:]


def test_the_harness_is_this_builds(tmp_path):
    folder = Path(write_harness(tmp_path / "harness"))
    assert sorted(path.name for path in folder.iterdir()) == ["autotune", "bench"]
    here = Path(sides.__file__).parent.parent
    assert (folder / "bench").resolve() == here.resolve()


def test_configs_are_values_of_the_kernels_own_space():
    found = parse_configs(["numba/table:row_tile=8192", "numba/table:row_tile=4096"])
    assert found == {"numba/table": {"row_tile": 4096}}
    assert isinstance(found["numba/table"]["row_tile"], int)


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("numba/table", ConfigError, "write kernel:name=value"),
        ("numba/table:row_tile", ConfigError, "write kernel:name=value"),
        ("numba/table:rows=1", ConfigError, "no parameter 'rows'; there are"),
        ("numba/table:row_tile=7", ConfigError, "row_tile=7 is not one of"),
        ("nobody/*:a=1", SpecError, "no kernel matches"),
    ],
)
def test_configs_that_are_none(text, error, words):
    with pytest.raises(error, match=words.replace("*", r"\*")):
        parse_configs([text])
