import dataclasses
import json
import subprocess
from pathlib import Path

import pytest

from bench import environment
from bench.environment import describe_host, device_state, project_revision
from tests.autotune.zoo import DEVICE
from tests.bench import fake_nvml


def git(folder: Path, *words: str) -> None:
    who = ["-c", "user.name=x", "-c", "user.email=x@example.com"]
    subprocess.run(["git", "-C", folder, *who, *words], check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    (tmp_path / "code.py").write_text("1", encoding="utf-8")
    git(tmp_path, "init")
    git(tmp_path, "add", "code.py")
    git(tmp_path, "commit", "-m", "one")
    monkeypatch.setattr(environment, "_ROOT", tmp_path)
    return tmp_path


def test_a_clean_checkout_has_a_commit(checkout):
    revision = project_revision()
    assert len(revision["commit"]) == 40
    assert revision["dirty"] is False


def test_a_changed_file_makes_it_dirty_and_a_new_one_does_not(checkout):
    (checkout / "results.jsonl").write_text("{}", encoding="utf-8")
    assert project_revision()["dirty"] is False
    (checkout / "code.py").write_text("2", encoding="utf-8")
    assert project_revision()["dirty"] is True


def test_outside_a_checkout_nothing_is_claimed(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "_ROOT", tmp_path)
    assert project_revision() == {"commit": None, "dirty": None}


def test_another_projects_commit_is_not_ours(checkout, monkeypatch):
    installed = checkout / ".venv" / "site-packages"
    installed.mkdir(parents=True)
    monkeypatch.setattr(environment, "_ROOT", installed)
    assert project_revision() == {"commit": None, "dirty": None}


def test_without_git_nothing_is_claimed(checkout, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert project_revision() == {"commit": None, "dirty": None}


def test_the_head_of_a_record_says_where_it_ran():
    host = describe_host(DEVICE)
    assert host["host"]
    assert "Linux" in host["system"]
    assert host["device"] == DEVICE.to_dict()
    assert {"python", "torch", "numpy"} <= set(host["versions"])
    assert set(host["project"]) == {"commit", "dirty"}
    assert json.loads(json.dumps(host, allow_nan=False)) == host


def test_the_state_of_a_device_is_its_kinds_own(monkeypatch):
    fake_nvml.install(monkeypatch)
    gpu = dataclasses.replace(DEVICE, kind="cuda", index=1, uuid=fake_nvml.UUID)
    assert device_state(gpu)["sm_mhz"] == 1980
    assert device_state(DEVICE)["load_1m"] >= 0
