import contextlib
import dataclasses
import functools
import itertools
import json
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch

import autotune.timers
import bench.cases
import bench.options
import bench.run
import vqkernels.device
from autotune.bandwidth import Bandwidth
from autotune.timers import Budget
from tests.autotune import fake_cuda, zoo
from vqkernels.kernel import library_versions
from vqkernels.presets import parse_format

pytest_plugins = ["pytester"]

ROOT = Path(bench.run.__file__).parents[1]
TINY = """
about = "two ragged layers"
source = "a test"
blocks = 1
[[layer]]
name = "wide"
n = 37
k = 42
[[layer]]
name = "odd"
n = 41
k = 19
"""
SELECT = (
    "--vqbench-workload",
    "tiny.toml",
    "--vqbench-format",
    "vq-16x4",
    "--vqbench-layer",
    "odd",
)
JSON = ("--benchmark-json", "out.json")
MINE = """
import pytest

@pytest.mark.vqbench(workload="tiny.toml", layers=["wide"], formats=["vq-16x4"], ms=[1, 2])
@pytest.mark.benchmark(group="mine", min_rounds=9)
@pytest.mark.parametrize("word", ["a"])
def test_product(vqbench_case, word):
    measured = vqbench_case.measure()
    assert len(measured.samples_s) == 9
    assert (vqbench_case.layer, vqbench_case.kernel) == ("wide", "test/fake")

def test_other():
    pass
"""


class Keeper:
    """pytester forgets what a run imported, which would load numba and our kernels twice."""

    def __init__(self):
        self.modules = {}

    def pytest_unconfigure(self):
        self.modules = dict(sys.modules)

    def put_back(self, folder):
        for name, module in self.modules.items():
            path = getattr(module, "__file__", None) or ""
            if name != "bench.pytest_plugin" and not path.startswith(str(folder)):
                sys.modules.setdefault(name, module)


@pytest.fixture
def suite(pytester, monkeypatch):
    """pytest with the plugin in a folder of its own, on a CPU with small caches.

    Warnings are errors there too.
    """
    # an inner run would take this process for a worker, and time nothing
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    # what takes seconds: asking for the CPU, reading memory, warming up, compiling the pinning
    monkeypatch.setattr("pytest_benchmark.plugin.get_cpu_info", dict)
    monkeypatch.setattr("pytest_benchmark.plugin.get_tag", lambda: "tag")
    monkeypatch.setattr(bench.cases, "measure_bandwidth", lambda device: Bandwidth(5e17, 1e18, 1))
    monkeypatch.setattr(autotune.timers, "Budget", functools.partial(Budget, warmup_s=0))
    monkeypatch.setattr(autotune.timers, "pinned_threads", lambda: contextlib.nullcontext(False))
    monkeypatch.setattr(vqkernels.device, "detect_gpus", list)
    monkeypatch.setattr(bench.options, "detect_cpu", lambda threads=None: zoo.DEVICE)
    pytester.makefile(".toml", tiny=TINY)
    pytester.makeini("[pytest]\naddopts = -p no:cacheprovider\nfilterwarnings = error\n")

    def run(*words):
        keeper = Keeper()
        plugins = ("-p", "pytest_benchmark.plugin", "-p", "bench.pytest_plugin")
        quick = ("--benchmark-max-time", "0", "--benchmark-storage", "saved")
        done = pytester.runpytest_inprocess(*plugins, *quick, *words, plugins=[keeper])
        keeper.put_back(pytester.path)
        return done

    run.path = pytester.path
    run.write = pytester.makepyfile
    return run


@pytest.fixture
def kernels(monkeypatch):
    """What the patterns match."""
    chosen = [zoo.make_kernel()]
    monkeypatch.setattr(bench.cases, "matching_kernels", lambda patterns, device: chosen)
    return chosen


@pytest.fixture
def measured(monkeypatch):
    """What was measured, in order."""
    real, done = bench.cases.evaluate, []

    def evaluate(kernel, subject, **options):
        done.append(real(kernel, subject, **options))
        return done[-1]

    monkeypatch.setattr(bench.cases, "evaluate", evaluate)
    return done


def jittering():
    """Right within the bound, but never twice the same."""
    calls = itertools.count()

    def run(packed, x, out):
        zoo.right(packed, x, out)
        out[0, 0] *= 1 + 1e-6 * (next(calls) % 2)

    return run


def cases(suite):
    """Of the JSON that a run with `JSON` wrote."""
    text = (suite.path / "out.json").read_text(encoding="utf-8")
    assert "UNSERIALIZABLE" not in text
    return json.loads(text)["benchmarks"]


def saved(suite):
    (path,) = (suite.path / "saved").rglob("*.json")
    return path


def test_options_make_cases_and_the_json_has_their_samples(suite, measured):
    ms = [word for m in "131" for word in ("--vqbench-m", m)]
    patterns = ("--vqbench-kernel", "torch/d*", *ms)
    done = suite(*SELECT, *patterns, *JSON)
    done.assert_outcomes(passed=4)
    found = cases(suite)
    assert [one["fullname"] for one in found] == [
        f"vqbench::tiny-odd-vq-16x4-m{m}-float32-torch/{kernel}"
        for m in (1, 3)
        for kernel in ("dense", "dequant")
    ]
    assert [one["stats"]["data"] for one in found] == [list(one.samples_s) for one in measured]
    assert found[0]["stats"]["median"] == measured[0].median_s
    assert {one["options"]["timer"] for one in found} == {"perf_counter"}
    groups = [one["group"] for one in found]
    assert groups == [f"tiny odd 41x19 vq-16x4 m{m} float32" for m in (1, 1, 3, 3)]
    done.stdout.fnmatch_lines(["collected 4 items", f"*benchmark '{groups[-1]}': 2 tests*"])


def test_extra_info_is_the_record(suite, kernels, measured):
    suite(*SELECT, *JSON)
    (one,), (ours,) = cases(suite), measured
    facts = one["extra_info"]
    assert (facts["kernel"], facts["kernel_source"]) == (kernels[0].id, kernels[0].source_hash)
    assert (facts["config"], facts["config_from"]) == ({"tile": 8}, "default")
    assert (facts["workload"], facts["layer"], facts["format"]) == ("tiny", "odd", "vq-16x4")
    assert (facts["n"], facts["k"], facts["m"], facts["dtype"]) == (41, 19, 1, "float32")
    assert facts["spec"] == json.loads(json.dumps(parse_format("vq-16x4").to_dict()))
    assert facts["effective_bits"] == pytest.approx((5 * 41 * 4 + 16 * 4 * 16) / (41 * 19))
    for name in ("weight_bytes", "peak_bytes", "moved_bytes", "flops", "floor_s", "compile_s"):
        assert facts[name] is not None
        assert facts[name] == getattr(ours, name)
    assert facts["correctness"] == dataclasses.asdict(ours.correctness)
    assert facts["correctness"]["controls"]
    assert facts["timing"] == dataclasses.asdict(ours.timing)
    assert facts["timing"]["cache"]["codes"] == "cold"
    assert facts["device"] == json.loads(json.dumps(zoo.DEVICE.to_dict()))
    assert facts["versions"] == library_versions()
    assert set(facts["state"]) == {"before", "after"}
    assert facts["bandwidth"]["best"] == 1e18
    assert facts["budget"]["seconds"] == 0
    assert set(facts["project"]) == {"commit", "dirty"}
    assert not {"samples_s", "argv"} & set(facts)


def test_a_gpu_is_timed_by_its_events(suite, kernels, measured, monkeypatch):
    device = dataclasses.replace(zoo.DEVICE, kind="cuda", name="Fake", arch="sm_90", uuid="GPU-1")
    monkeypatch.setattr(vqkernels.device, "detect_gpus", lambda: [device])
    on_cpu = functools.partial(bench.run.make_subject, place="cpu")
    monkeypatch.setattr(bench.run, "make_subject", on_cpu)
    real, gpus = bench.cases.evaluate, []

    def on_gpu(*args, **options):
        with monkeypatch.context() as patch:  # pytest-benchmark keeps the host's clock
            gpus.append(fake_cuda.install(patch))
            return real(*args, **options)

    monkeypatch.setattr(bench.cases, "evaluate", on_gpu)

    def run(packed, x, out):
        gpus[-1].launch(3e-5, host_s=1e-3, run=lambda: zoo.right(packed, x, out))

    kernels[:] = [zoo.make_kernel(run)]
    suite(*SELECT, "--vqbench-dtype", "float32", *JSON).assert_outcomes(passed=1)
    (one,), (ours,) = cases(suite), measured
    assert one["options"]["timer"] == one["extra_info"]["timing"]["timer"] == "cuda_event"
    assert one["stats"]["data"] == list(ours.samples_s)
    assert one["stats"]["median"] == pytest.approx(3e-5), "the host is 33 times slower"
    assert one["extra_info"]["device"]["uuid"] == "GPU-1"
    assert {state["uuid"] for state in one["extra_info"]["state"].values()} == {"GPU-1"}


def test_a_test_of_ones_own_gets_its_cases_from_a_marker(suite, kernels, measured):
    suite.write(test_mine=MINE)
    suite(*JSON).assert_outcomes(passed=3)
    found = cases(suite)
    ids = [f"tiny-wide-vq-16x4-m{m}-float32-test/fake" for m in (1, 2)]
    assert [one["fullname"] for one in found] == [
        f"test_mine.py::test_product[{name}-a]" for name in ids
    ]
    assert [one["params"] for one in found] == [{"vqbench_case": name, "word": "a"} for name in ids]
    assert {one["group"] for one in found} == {"mine"}
    assert [one["stats"]["data"] for one in found] == [list(one.samples_s) for one in measured]


def test_options_take_the_place_of_files_that_nobody_named(suite, kernels):
    suite.write(test_mine=MINE)
    suite(*SELECT).assert_outcomes(passed=1)
    suite(*SELECT, "test_mine.py", "-k", "odd or other").assert_outcomes(passed=2, deselected=2)


def test_a_saved_run_is_compared_by_name(suite, kernels):
    suite(*SELECT, "--benchmark-autosave").assert_outcomes(passed=1)
    kernels[:] = [zoo.make_kernel(about="with another source hash")]
    compare = ("--benchmark-compare", "--benchmark-compare-fail", "median:1.0")
    done = suite(*SELECT, *compare)
    done.assert_outcomes(passed=1)
    done.stdout.fnmatch_lines_random(["tiny-odd-*fake (0001_*", "tiny-odd-*fake (NOW)*"])


def test_a_saved_run_of_another_device_is_told(suite, kernels):
    suite(*SELECT, "--benchmark-autosave")
    path = saved(suite)
    run = json.loads(path.read_text())
    facts = run["benchmarks"][0]["extra_info"]
    facts["device"]["name"] = "Other"
    facts["state"]["after"]["cpus"] = "2-5"
    path.write_text(json.dumps(run))
    done = suite(*SELECT, "--benchmark-compare", "-W", "default")
    done.assert_outcomes(passed=1, warnings=1)
    done.stdout.fnmatch_lines(
        ["*device: Other (none) then, Test (none) now; set of CPUs changed: 2-5 *"]
    )


@pytest.mark.parametrize("mode", [(), ("--benchmark-disable",)], ids=["timed", "disabled"])
def test_a_wrong_kernel_fails_with_its_reason_and_a_refusal_is_skipped(suite, kernels, mode):
    kernels[:] = [
        zoo.make_kernel(zoo.zeros, name="wrong"),
        zoo.make_kernel(jittering(), name="jittering"),
        zoo.make_kernel(name="refusing", supports=lambda problem, device: "too ragged for me"),
        zoo.make_kernel(name="right"),
    ]
    done = suite(*SELECT, *mode, *JSON, "-rs")
    done.assert_outcomes(failed=2, skipped=1, passed=1)
    done.stdout.fnmatch_lines(
        [
            "tiny-odd-vq-16x4-m1-float32-test/wrong: incorrect: error * times its bound*",
            "tiny-odd-vq-16x4-m1-float32-test/jittering: incorrect: gives other bits*",
        ]
    )
    done.stdout.fnmatch_lines(["SKIPPED*test/refusing: too ragged for me"])
    done.stdout.no_fnmatch_line("*pytest_plugin.py*Error*")
    if not mode:
        assert [one["extra_info"]["kernel"] for one in cases(suite)] == ["test/right"]


def test_after_the_last_case_its_memory_is_free(suite, kernels, monkeypatch):
    made = []

    def make_product(*args):
        product = bench.run.make_product(*args)
        made.append(weakref.ref(product.subject))
        return product

    monkeypatch.setattr(bench.cases, "make_product", make_product)
    kernels[:] = [zoo.make_kernel(name="one"), zoo.make_kernel(name="two")]
    monkeypatch.setattr(bench.cases, "made", made, raising=False)
    suite.write(
        test_after="import gc, bench.cases\ndef test_free():\n"
        "    gc.collect()\n    assert [one() for one in bench.cases.made] == [None]\n"
    )
    suite.write(
        test_mine=MINE.replace("ms=[1, 2]", "ms=[1]").replace('"test/fake"', "vqbench_case.kernel")
    )
    suite("test_mine.py", "test_after.py").assert_outcomes(passed=4)


def test_disabled_nothing_is_timed(suite, kernels, monkeypatch):
    monkeypatch.setattr(bench.cases, "evaluate", zoo.raising)
    monkeypatch.setattr(bench.cases, "measure_bandwidth", zoo.raising)
    done = suite(*SELECT, "--benchmark-disable")
    done.assert_outcomes(passed=1)
    done.stdout.no_fnmatch_line("*Rounds*")


def test_a_layer_without_weights_is_skipped(suite, kernels):
    package = 'package = "no_such_package_here"\nfile = "model.safetensors"\n'
    (suite.path / "tiny.toml").write_text(package + TINY + 'tensor = "odd.weight"\n')
    done = suite(*SELECT, "-rs")
    done.assert_outcomes(skipped=1)
    done.stdout.fnmatch_lines(["SKIPPED*pip install no-such-package-here"])


def test_hot_is_in_the_name(suite, kernels):
    suite(*SELECT, "--vqbench-hot", *JSON)
    (one,) = cases(suite)
    assert one["name"] == "tiny-odd-vq-16x4-m1-float32-hot-test/fake"
    assert one["extra_info"]["timing"]["cache"]["codes"] == "hot"


def test_threads_are_the_devices_while_a_case_runs(suite, kernels):
    before, seen = torch.get_num_threads(), set()

    def run(packed, x, out):
        seen.add(torch.get_num_threads())
        zoo.right(packed, x, out)

    kernels[:] = [zoo.make_kernel(run)]
    torch.set_num_threads(2)
    try:
        suite(*SELECT).assert_outcomes(passed=1)
        assert (seen, torch.get_num_threads()) == ({zoo.DEVICE.units}, 2)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ((*SELECT, "--vqbench-format", "nope"), "ERROR: format 'nope' is unknown*"),
        (("--vqbench-workload", "nope"), "ERROR: workload 'nope' is unknown*"),
        ((*SELECT, "--vqbench-fuse"), "ERROR: workload tiny names no layers that run as one*"),
        ((*SELECT, "--vqbench-kernel", "nope/*"), "ERROR: no kernel matches nope/*"),
        ((*SELECT, "--vqbench-device", "cuda"), "ERROR: device cuda: 0 NVIDIA*"),
        ((*SELECT, "--vqbench-m", "0"), "*--vqbench-m: '0' is not a whole number of at least 1"),
    ],
)
def test_a_usage_error_is_a_line(suite, words, line):
    done = suite(*words)
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    done.stderr.fnmatch_lines([line])


def test_without_pytest_benchmark_it_says_what_to_install(pytester):
    done = pytester.runpytest_inprocess("-p", "no:benchmark", "-p", "bench.pytest_plugin")
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    done.stderr.fnmatch_lines(["ERROR: *run: pip install pytest-benchmark"])


@pytest.mark.parametrize(
    ("marker", "line"),
    [
        ("skipif(False, reason='')", "*vqbench_case needs @pytest.mark.vqbench(workload=*"),
        ("vqbench(model='tiny.toml')", "*the vqbench marker takes workload, layers, *"),
        ("vqbench('tiny.toml')", "*the vqbench marker takes workload, layers, *"),
        ("vqbench(workload='tiny.toml', ms=[0])", "*ms are whole numbers of at least 1"),
        ("vqbench(workload='nope.toml')", "*::test_it: workload 'nope.toml' is unknown*"),
    ],
)
def test_a_marker_that_selects_nothing_is_a_line(suite, kernels, marker, line):
    suite.write(f"import pytest\n@pytest.mark.{marker}\ndef test_it(vqbench_case): pass\n")
    done = suite()
    done.assert_outcomes(errors=1)
    done.stdout.fnmatch_lines([line])
    done.stdout.no_fnmatch_line("*bench/pytest_plugin.py*")


def test_naming_the_plugin_loads_no_torch():
    code = "import sys, bench.pytest_plugin; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
