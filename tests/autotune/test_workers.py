"""Tasks that crash, hang or raise are outcomes; the pool goes on, and leaves no process behind."""

import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from autotune import workers
from autotune.workers import Pool, Task


def double(number):
    return 2 * number


def process_id(_=None):
    return os.getpid()


def crash():
    os.kill(os.getpid(), signal.SIGSEGV)


def hang():
    time.sleep(600)


def hang_with_child(path):
    child = subprocess.Popen(["sleep", "600"])
    path.write_text(str(child.pid), encoding="ascii")
    time.sleep(600)


def fail():
    raise ValueError("first line\nsecond line")


def leave():
    sys.exit(3)


def quit_at_once():
    os._exit(4)


def big():
    return bytes(8 << 20)


def unpicklable():
    return lambda: None


def lose_the_gpu():
    """What a CUDA error leaves behind: every later synchronisation reports it."""

    def synchronize():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    cuda = types.SimpleNamespace(is_initialized=lambda: True, synchronize=synchronize)
    sys.modules["torch"] = types.SimpleNamespace(cuda=cuda)
    return os.getpid()


def alive(pid):
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii")
    except FileNotFoundError:
        return False
    return text.rpartition(")")[2].split()[0] != "Z"


def gone(pid):
    end = time.monotonic() + 10
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.01)
    return not alive(pid)


def run(tasks, jobs=1, limit_s=60.0, **options):
    with Pool(jobs, limit_s) as pool:
        return list(pool.run(tasks, **options))


def test_values_come_back_and_workers_are_used_again():
    with Pool(2, 60) as pool:
        done = list(pool.run([Task(double, (number,)) for number in range(7)]))
        assert {outcome.value for outcome in done} == {0, 2, 4, 6, 8, 10, 12}
        assert all(outcome.value == 2 * outcome.task.arguments[0] for outcome in done)
        pids = {outcome.value for outcome in pool.run([Task(process_id)] * 6)}
    assert 1 <= len(pids) <= 2
    assert os.getpid() not in pids


def test_bad_tasks_are_outcomes_with_reasons_and_the_rest_goes_on():
    bad = [crash, fail, leave, quit_at_once, unpicklable]
    done = run([Task(function) for function in bad] + [Task(double, (21,)), Task(big)])
    by_name = {outcome.task.function.__name__: outcome for outcome in done}
    reasons = {name: (one.status, one.reason) for name, one in by_name.items()}
    assert reasons["crash"] == ("died", "the process was ended by SIGSEGV")
    assert reasons["fail"] == ("raised", "ValueError: first line")
    assert reasons["leave"] == ("died", "the process ended with exit code 3")
    assert reasons["quit_at_once"] == ("died", "the process ended with exit code 4")
    assert reasons["unpicklable"][0] == "raised"
    assert "pickle" in reasons["unpicklable"][1]
    assert by_name["double"].value == 42
    assert len(by_name["big"].value) == 8 << 20


def test_a_task_that_hangs_is_ended_with_what_it_started(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "START_S", 20.0)
    path = tmp_path / "child"
    with Pool(1, 0.5) as pool:
        (warm,) = pool.run([Task(process_id)])
        start = time.monotonic()
        hung, after = pool.run([Task(hang_with_child, (path,)), Task(process_id)])
        assert time.monotonic() - start < 15
    assert (hung.status, hung.reason) == ("timeout", "not done after 0.5 s")
    assert after.status == "done"
    assert after.value != warm.value
    assert gone(warm.value)
    assert gone(int(path.read_text(encoding="ascii")))


def test_a_worker_whose_gpu_is_lost_is_replaced_and_its_outcome_kept():
    lost, after = run([Task(lose_the_gpu), Task(process_id)])
    assert (lost.status, after.status) == ("done", "done")
    assert lost.value != after.value


def test_outcomes_come_as_tasks_end():
    with Pool(2, 60) as pool:
        list(pool.run([Task(process_id)] * 2))
        order = [one.task.arguments for one in pool.run([Task(time.sleep, (s,)) for s in (1, 0)])]
    assert order == [(0,), (1,)]


def test_a_task_is_drawn_only_when_it_can_start():
    seen = []

    def tasks():
        for number in range(3):
            seen.append(f"draw {number}")
            yield Task(double, (number,))

    with Pool(1, 60) as pool:
        seen.extend(f"done {outcome.value}" for outcome in pool.run(tasks()))
    assert seen == ["draw 0", "done 0", "draw 1", "done 2", "draw 2", "done 4"]


def test_what_the_time_does_not_reach_is_told():
    done = run([Task(double, (1,)), Task(double, (2,))], until=time.monotonic() - 1)
    assert [one.status for one in done] == ["unstarted"] * 2
    assert all("time" in one.reason for one in done)


@pytest.mark.parametrize("how", ["left", "error"])
def test_no_process_outlives_the_pool(how):
    pids = []
    try:
        with Pool(2, 60) as pool:
            pids += [one.value for one in pool.run([Task(process_id), Task(process_id)])]
            if how == "error":
                for _ in pool.run([Task(double, (1,)), Task(hang)]):
                    raise ZeroDivisionError
    except ZeroDivisionError:
        assert how == "error"
    assert pids
    assert all(gone(pid) for pid in pids)


def test_a_task_may_have_a_limit_of_its_own():
    with Pool(1, 60) as pool:
        list(pool.run([Task(process_id)]))  # started: from here on the limit alone counts
        (hung,) = pool.run([Task(hang, limit_s=0.2)])
    assert (hung.status, hung.reason) == ("timeout", "not done after 0.2 s")


def steps(pause_s=0.0):
    workers.step("compile")
    time.sleep(pause_s)
    workers.step("time")
    time.sleep(600)


def talk_and_crash():
    sys.stdout.write("said before it crashed\n")
    sys.stdout.flush()
    workers.step("check")
    crash()


def take_steps():
    workers.step("compile")
    time.sleep(0.05)
    workers.step("time")
    time.sleep(0.2)
    workers.step("compile")
    time.sleep(0.05)


def test_an_outcome_tells_how_long_each_step_took():
    (done,) = run([Task(take_steps)])
    assert set(done.steps_s) == {"compile", "time"}
    assert done.steps_s["time"] >= 0.2
    assert done.steps_s["compile"] >= 0.1
    (plain,) = run([Task(double, (1,))])
    assert plain.steps_s == {}


def environment():
    return os.environ.get("VQBENCH_TEST_WORD"), "VQBENCH_TEST_GONE" in os.environ, str(Path.cwd())


def test_a_fresh_process_has_the_environment_of_its_time(monkeypatch, tmp_path):
    monkeypatch.setenv("VQBENCH_TEST_GONE", "1")
    run([Task(environment)])  # the server has begun at the latest now
    monkeypatch.delenv("VQBENCH_TEST_GONE")
    monkeypatch.setenv("VQBENCH_TEST_WORD", "set later")
    monkeypatch.chdir(tmp_path)
    (done,) = run([Task(environment)])
    assert done.value == ("set later", False, str(tmp_path))


def threads():
    return Path("/proc/self/status").read_text().split("Threads:")[1].split()[0]


def test_a_fresh_process_has_run_nothing():
    """A fork of a process with OpenMP threads can't use OpenMP."""
    (done,) = run([Task(threads)])
    assert done.value == "1"


def test_what_has_ended_can_be_asked_without_waiting():
    with Pool(1, 60) as pool:
        list(pool.run([Task(process_id)]))
        assert pool.ended(0.0) == []
        pool.start(Task(time.sleep, (0.2,)))
        assert not pool.free
        assert pool.ended(0.0) == []
        (done,) = pool.ended()
        assert done.status == "done"
        assert pool.free


def test_each_step_has_a_limit_of_its_own():
    slow = Task(steps, (1.0,), limits={"compile": 60.0, "time": 0.3})
    stuck = Task(steps, (600.0,), limits={"compile": 0.3, "time": 60.0})
    first, second = run([slow, stuck])
    assert (first.step, first.reason) == ("time", "time: not done after 0.3 s")
    assert (second.step, second.reason) == ("compile", "compile: not done after 0.3 s")


def test_what_a_process_said_before_it_died_is_its_log():
    first, second, third = run([Task(talk_and_crash), Task(double, (1,)), Task(crash)])
    assert (first.status, first.step) == ("died", "check")
    assert first.log.startswith("said before it crashed")
    assert "Segmentation fault" in first.log
    assert second.log == ""
    assert "said before" not in third.log


def test_outside_a_worker_steps_are_nothing():
    workers.step("compile")
