"""Right outputs without the work: each way is refused, and the reason says which it is."""

import dataclasses

import pytest
import torch

from autotune import escapes as controls
from autotune import memory
from autotune.evaluate import Step, check, evaluate, evaluate_steps, make_subject
from autotune.measurement import Measurement
from tests.autotune import escapes, fake_cuda, zoo
from vqkernels.kernel import Footprint, Packed
from vqkernels.tensor import random_tensor

ALL = escapes.AT_ONCE | escapes.ONCE_TIMED


@pytest.fixture(autouse=True)
def _one_thread():
    """So that tiny products wait for no other thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _patience(request, monkeypatch):
    """However busy the machine is, a thread in the background gets its turn; nothing else waits."""
    late = "a thread" in request.node.name or "threads" in request.node.name
    monkeypatch.setattr(controls, "_LATE_S", 5.0 if late else 0.0)
    monkeypatch.setattr(controls, "_LATER_S", 0.1 if "writes again" in request.node.name else 1e-3)


@pytest.fixture
def subject():
    return make_subject(zoo.tensor(bias=True), 3, zoo.DEVICE)


def attempt(kernel, subject, **options) -> Measurement:
    return evaluate(kernel, subject, **{"budget": zoo.BUDGET} | options)


def assert_refused(measured, words):
    assert measured.status == "incorrect", measured
    assert words in measured.reason
    assert "\n" not in measured.reason
    assert measured.samples_s == ()


@pytest.mark.parametrize("cold", [True, False])
@pytest.mark.parametrize("name", ALL)
def test_an_escape_is_refused_by_name(name, cold):
    make, words = ALL[name]
    subject = make_subject(zoo.tensor(), 3, zoo.DEVICE)
    assert_refused(attempt(make(), subject, cold=cold), words)


@pytest.mark.parametrize("name", escapes.AT_ONCE)
def test_a_check_refuses_it_too(name):
    make, words = escapes.AT_ONCE[name]
    assert_refused(check(make(), make_subject(zoo.tensor(), 3, zoo.DEVICE)), words)


@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("name", escapes.ONCE_TIMED)
def test_an_escape_in_one_of_several_layers_is_refused_by_name(name, at):
    make, words = escapes.ONCE_TIMED[name]
    subject = make_subject(zoo.tensor(), 3, zoo.DEVICE)
    kernels = [zoo.make_kernel()] * 3
    kernels[at] = make()
    steps = [Step(kernel, subject) for kernel in kernels]
    (measured,) = evaluate_steps(steps, timers=(None,), budget=zoo.BUDGET)
    assert_refused(measured, words)


@pytest.mark.parametrize("name", escapes.BIG_ESCAPES)
def test_a_weight_that_is_decoded_and_kept_shows_in_memory(name):
    if memory.peak_during(lambda: None, "cpu") is None:
        pytest.skip("this system doesn't tell a process's memory")
    make, words = escapes.BIG_ESCAPES[name]
    device = dataclasses.replace(zoo.DEVICE, llc_bytes=1 << 10)
    subject = make_subject(zoo.tensor(*escapes.BIG), 3, device)
    assert_refused(attempt(make(), subject), words)


@pytest.mark.parametrize(
    ("n", "k", "cold"), [(37, 22, True), (37, 22, False), (*escapes.BIG, True)]
)
def test_a_kernel_that_decodes_at_every_call_is_ok(n, k, cold):
    kernel = escapes.from_codes(escapes.decoding, n, k)
    measured = attempt(kernel, make_subject(zoo.tensor(n, k), 3, zoo.DEVICE), cold=cold)
    assert measured.status == "ok", measured.reason


@pytest.mark.parametrize("vector_axis", ["in", "out"])
def test_a_right_kernel_is_ok_with_what_surrounds_codes(vector_axis):
    spec = dataclasses.replace(
        zoo.SPEC, vector_axis=vector_axis, group_axis="row", group_size=8, scale_axis="row"
    )
    tensor = random_tensor(spec, 40, 32, bias=True)
    for m in (1, 3):
        measured = attempt(
            zoo.make_kernel(escapes.biased(tensor)), make_subject(tensor, m, zoo.DEVICE)
        )
        assert measured.status == "ok", measured.reason


def test_a_layout_whose_size_depends_on_the_codes_is_not_exchanged_in_place(subject):
    def pack(tensor, config, problem):
        packs.append(1)
        return Packed({"weight": tensor.decode(torch.float32), "runs": torch.zeros(len(packs))})

    packs = []
    subject = make_subject(zoo.tensor(), 3, zoo.DEVICE)
    kernel = zoo.make_kernel(pack=pack, footprint=lambda *_: Footprint(1 << 20, 0, 1))
    assert attempt(kernel, subject).status == "ok"


def test_the_floor_by_operations_holds_for_weights_in_cache_too():
    slow, fast = (
        dataclasses.replace(zoo.DEVICE, flops={"float16": flops, "float32": 1.0})
        for flops in (1.0, 1e30)
    )
    for cold in (True, False):
        refused = attempt(zoo.make_kernel(), make_subject(zoo.tensor(), 3, slow), cold=cold)
        assert_refused(refused, "us to do its operations: it did not do the work")
        # fp32 may be split into halves: the faster unit counts
        subject = make_subject(zoo.tensor(), 3, fast)
        measured = attempt(zoo.make_kernel(), subject, cold=cold)
        assert measured.status == "ok"
        assert measured.floor_s == pytest.approx(subject.problem.flops / 1e30 / 1.25)


def test_an_unknown_rate_is_no_floor():
    device = dataclasses.replace(zoo.DEVICE, flops={"int8": 1.0})
    measured = attempt(zoo.make_kernel(), make_subject(zoo.tensor(), 3, device))
    assert (measured.status, measured.floor_s) == ("ok", None)


# On a GPU that only keeps time, with another stream


@pytest.fixture
def on_gpu(monkeypatch):
    gpu = fake_cuda.install(monkeypatch)
    device = dataclasses.replace(zoo.DEVICE, kind="cuda")
    return gpu, make_subject(zoo.tensor(), 3, device, place="cpu:0")


def launching(gpu, run=zoo.right):
    return lambda packed, x, out: gpu.launch(1e-5, run=lambda: run(packed, x, out))


def test_work_on_a_side_stream_is_refused_by_name(on_gpu):
    gpu, subject = on_gpu
    kernel = zoo.make_kernel(escapes.on_side_stream(gpu))
    for measured in (attempt(kernel, subject), check(kernel, subject)):
        assert_refused(measured, "on a stream of its own")


@pytest.mark.parametrize("timer", ["cuda_event", "cuda_graph"])
def test_work_that_moves_to_a_side_stream_once_timed_is_refused_by_name(on_gpu, timer):
    gpu, subject = on_gpu
    calls = []

    def run(packed, x, out):
        calls.append(1)
        one = launching(gpu) if len(calls) <= escapes.CHECKED else escapes.on_side_stream(gpu)
        one(packed, x, out)

    measured = attempt(zoo.make_kernel(run), subject, timer=timer)
    assert_refused(measured, "on a stream of its own" if timer == "cuda_event" else "nothing was")


@pytest.mark.parametrize("timer", ["cuda_event", "cuda_graph"])
def test_a_weight_kept_by_address_is_refused_on_a_gpu_too(on_gpu, timer):
    gpu, subject = on_gpu
    for since in (0, escapes.CHECKED):
        kernel = escapes.from_codes(
            lambda template, since=since: launching(
                gpu, escapes.hiding(escapes.by_address, since)(template)
            )
        )
        assert_refused(attempt(kernel, subject, timer=timer), "keeps a copy of its weight")
