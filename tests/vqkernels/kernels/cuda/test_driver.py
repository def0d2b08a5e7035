"""What the driver is asked, and what it may answer: the driver is a fake, its types are real."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cuda.bindings import driver as bindings

from tests.vqkernels.kernels.cuda.fake_driver import GPU, OK, STREAM, FakeDriver, installed
from vqkernels.errors import BackendError
from vqkernels.kernel import registry
from vqkernels.kernels.cuda import driver
from vqkernels.presets import PRESETS
from vqkernels.problem import Problem


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDriver]:
    yield from installed(monkeypatch, FakeDriver())


def launcher(kernel_id: str = "cuda/fused_rq", **changes: Any) -> driver.Launcher:
    kernel = registry()[kernel_id]
    problem = Problem(m=3, n=40, k=64, spec=PRESETS["rq-2x256x8"], dtype="float16")
    config = kernel.default(problem, GPU).replace(**changes)
    (program,) = kernel.programs(config, problem)
    return driver.Launcher(program, GPU)


def tensors(seed: float = 0.0) -> dict[str, torch.Tensor]:
    names = ("x", "codes", "books", "out")
    return {name: torch.full((256,), seed) for name in names}


def test_a_launch_passes_the_struct(fake: FakeDriver) -> None:
    launch, given = launcher(), tensors()
    launch(given)
    launch(given)
    assert len(fake.loaded) == 1, "loaded once"
    one = fake.launches[0]
    sent = one["arguments"]
    for name, tensor in given.items():
        assert getattr(sent, name) == tensor.data_ptr()
    assert (sent.row_sets, sent.column_sets) == (None, None)
    assert (sent.m, sent.k, sent.width, sent.rows, sent.columns) == (3, 64, 40, 40, 8)
    assert one["grid"] == launch.program.grid
    assert one["block"] == (launch.program.threads, 1, 1)
    assert (one["stream"], one["function"], one["window"]) == (STREAM, 2, None)


def test_threads_do_not_mix_their_arguments(fake: FakeDriver) -> None:
    launch = launcher()
    launch(tensors())
    fake.launches.clear()
    fake.before_launch = lambda: time.sleep(0.002)  # lets the other threads in, as the driver does
    mine = [tensors(seed) for seed in range(4)]
    threads = [
        threading.Thread(target=lambda one=one: [launch(one) for _ in range(5)]) for one in mine
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sets = {tuple(one[name].data_ptr() for name in ("x", "codes", "books", "out")) for one in mine}
    sent = [one["arguments"] for one in fake.launches]
    assert len(sent) == 20
    assert {(one.x, one.codes, one.books, one.out) for one in sent} == sets


def test_more_shared_memory_than_usual_is_asked_for(fake: FakeDriver) -> None:
    launcher("cuda/staged", replicas=1)(tensors())
    assert fake.attributes == []
    launcher("cuda/staged", replicas=8)(tensors())
    ((_, nbytes, _, _),) = fake.attributes
    assert nbytes == 8 * 512 * 16
    assert fake.launches[-1]["shared"] == nbytes


def test_books_that_l2_shall_keep(fake: FakeDriver) -> None:
    given = tensors()
    launch = launcher("cuda/vectorized", books_in_l2=True)
    launch(given)
    nbytes = given["books"].nbytes
    assert fake.launches[-1]["window"] == (given["books"].data_ptr(), nbytes, 1.0)
    assert [value for _, value in fake.limits] == [nbytes]
    launch({**given, "books": given["x"]})
    assert fake.launches[-1]["window"] == (given["x"].data_ptr(), nbytes, 1.0)
    assert len(fake.limits) == 1, "room that is there is not asked for again"


def test_clusters_and_early_launches_are_asked_for(fake: FakeDriver) -> None:
    given = tensors() | {"scales": torch.ones(1)}
    launcher("cuda/table", split="cluster", splits=2, dependent=True)(given)
    launcher("cuda/table", split="workspace", splits=1, dependent=False)(given)
    both, neither = fake.launches
    assert (both["cluster"], both["early"]) == ((2, 1, 1), 1)
    assert both["grid"][0] % 2 == 0
    assert (neither["cluster"], neither["early"]) == (None, None)
    assert both["arguments"].scales == given["scales"].data_ptr()


def test_a_refused_launch(fake: FakeDriver) -> None:
    fake.refusal = bindings.CUresult.CUDA_ERROR_INVALID_VALUE
    with pytest.raises(BackendError, match=r"cuda/fused_rq: .*INVALID_VALUE; a grid of .*threads"):
        launcher()(tensors())


def test_a_refused_load(fake: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    refusal = bindings.CUresult.CUDA_ERROR_NO_BINARY_FOR_GPU
    monkeypatch.setattr(fake, "cuLibraryLoadData", lambda *_: (refusal, None), raising=False)
    with pytest.raises(BackendError, match=r"can't load the code: CUDA_ERROR_NO_BINARY"):
        launcher()(tensors())


def test_another_device_than_the_current(fake: FakeDriver, monkeypatch) -> None:
    entered: list[int] = []
    current = [1]

    class Guard:
        def __init__(self, index: int) -> None:
            entered.append(index)

        def __enter__(self) -> None:
            current.append(entered[-1])

        def __exit__(self, *_: object) -> None:
            current.pop()

    monkeypatch.setattr(torch.cuda, "device", Guard)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    launcher()(tensors())
    assert (entered, current, len(fake.launches)) == ([0], [1], 1)


def fake_bindings(monkeypatch: pytest.MonkeyPatch, **functions: Any) -> None:
    driver._driver.cache_clear()
    monkeypatch.setattr(driver, "driver", SimpleNamespace(**functions))


def test_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(flags: int) -> Any:
        raise RuntimeError("Failed to dlopen libcuda.so.1")

    fake_bindings(monkeypatch, cuInit=missing)
    with pytest.raises(BackendError, match=r"no NVIDIA driver answers .*libcuda.*--device cpu"):
        driver._driver()


def test_a_driver_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_bindings(monkeypatch, cuInit=lambda flags: (bindings.CUresult.CUDA_ERROR_NO_DEVICE,))
    with pytest.raises(BackendError, match=r"CUDA_ERROR_NO_DEVICE; check nvidia-smi"):
        driver._driver()


@pytest.mark.parametrize(("version", "old"), [(12080, True), (13000, False), (14010, False)])
def test_a_driver_older_than_the_compiler(monkeypatch, version: int, old: bool) -> None:
    fake_bindings(monkeypatch, cuInit=lambda flags: (OK,), cuDriverGetVersion=lambda: (OK, version))
    if not old:
        assert driver._driver()
        return
    with pytest.raises(BackendError, match=r"for CUDA 12\.8, too old .*NVRTC 13\.0.*update"):
        driver._driver()


@pytest.fixture(autouse=True)
def forget_driver() -> Iterator[None]:
    yield
    driver._driver.cache_clear()
