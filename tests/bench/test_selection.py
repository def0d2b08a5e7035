import itertools

import pytest

from bench import selection
from bench.selection import DEFAULT, Selection, byte_code_formats, matching_kernels
from bench.workload import load_workload
from tests.autotune import zoo
from vqkernels.device import detect_cpu
from vqkernels.errors import SpecError
from vqkernels.kernel import Registry
from vqkernels.presets import PRESETS

CASES = [case for chosen in DEFAULT for case in chosen.cases()]


def names(workload: str) -> set[tuple[str, str]]:
    return {(layer.name, name) for one, layer, name in CASES if one.name == workload}


def make(**fields) -> Selection:
    return Selection(**{"workload": "llama2-7b", "formats": ("rq-2x256x8",)} | fields)


def layers(*patterns: str) -> list[str]:
    return [layer.name for _, layer, _ in make(layers=patterns).cases()]


def test_by_default_every_real_layer_is_run_at_two_stages():
    every = {layer.name for layer in load_workload("minilm").layers}
    assert len(every) == 6 * 6 + 1  # of each block, and the pooler
    assert names("minilm") == {(layer, "rq-2x256x8") for layer in every}


def test_by_default_two_layers_are_run_in_every_format_of_up_to_256_entries():
    small = [name for name, spec in PRESETS.items() if spec.max_entries <= 256 == spec.stages[0]]
    assert len(small) == 12
    assert names("llama2-7b") == set(itertools.product(("q_proj", "down_proj"), small))


def test_nothing_is_run_twice_by_default():
    assert len(CASES) == len(names("minilm")) + len(names("llama2-7b"))


def test_formats_of_byte_codes():
    assert all(PRESETS[name].max_entries <= 256 for name in byte_code_formats())
    assert not {"aqlm-1x16", "vptq-65536-256", "toy-16-4"} & set(byte_code_formats())


@pytest.mark.parametrize(
    ("patterns", "chosen"),
    [
        (("q_proj",), ["q_proj"]),
        (("[qkv]_proj",), ["q_proj", "k_proj", "v_proj"]),
        (("down*", "up_*"), ["up_proj", "down_proj"]),
        (("q_proj", "q_*"), ["q_proj"]),
    ],
)
def test_layers_are_chosen_by_glob_in_the_models_order(patterns, chosen):
    assert layers(*patterns) == chosen


def test_fused_layers_are_chosen_as_they_are_called():
    cases = make(fuse=True, layers=("*_proj",)).cases()
    names = [layer.name for _, layer, _ in cases]
    assert names == ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]


def test_every_format_is_run_on_every_layer():
    cases = make(layers=("q_proj", "k_proj"), formats=("vq-256x8", "pq-m8")).cases()
    assert [(layer.name, name) for _, layer, name in cases] == [
        ("q_proj", "vq-256x8"),
        ("q_proj", "pq-m8"),
        ("k_proj", "vq-256x8"),
        ("k_proj", "pq-m8"),
    ]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"layers": ("Q_PROJ", "x*")}, ["no layer matches Q_PROJ;", "q_proj, k_proj"]),
        ({"workload": "llama9"}, ["'llama9' is unknown", "llama2-7b"]),
        ({"formats": ("vq-256x8", "vq-none")}, ["'vq-none' is unknown", "vq-512x8"]),
        ({"formats": ("gone.toml",)}, ["gone.toml", "No such file"]),
    ],
)
def test_a_bad_name_is_one_line_before_anything_runs(fields, words):
    cases = make(**fields).cases()
    with pytest.raises(SpecError) as error:
        next(cases)
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words), error.value


@pytest.fixture
def kernels(monkeypatch):
    found = [
        zoo.make_kernel(name="one", reads="codes"),
        zoo.make_kernel(name="dense"),
        zoo.make_kernel(name="two", backend="other", reads="codes"),
    ]
    known = Registry({kernel.id: kernel for kernel in found}, {})
    monkeypatch.setattr(selection, "registry", lambda: known)
    peer = zoo.make_kernel(name="peer", backend="theirs", reads="codes")
    monkeypatch.setattr(selection, "peers", lambda: {peer.id: peer})


@pytest.mark.parametrize(
    ("patterns", "chosen"),
    [
        ((), ["test/dense", "test/one", "other/two"]),
        (("*/[!p]*",), ["test/dense", "test/one", "other/two"]),
        (("theirs/*",), ["theirs/peer"]),  # only where it is named
        (("test/*",), ["test/dense", "test/one"]),
        (("other/two", "test/one"), ["test/one", "other/two"]),
        (("test/one", "test/o?e"), ["test/one"]),
    ],
)
def test_kernels_are_chosen_by_glob_the_baseline_first(kernels, patterns, chosen):
    assert [kernel.id for kernel in matching_kernels(patterns, detect_cpu())] == chosen


def test_a_pattern_without_a_kernel_names_those_there_are(kernels):
    with pytest.raises(SpecError, match=r"no kernel matches two; there are: test/one, ") as error:
        matching_kernels(("two",), detect_cpu())
    assert "\n" not in str(error.value)
