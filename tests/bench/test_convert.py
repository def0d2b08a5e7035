"""`vqbench convert`: every layout from every other, bit for bit, and nothing lost on the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file

from bench import conversion
from bench.cli import cli
from tests.bench.checkpoints import (
    CONFIG,
    DENSE,
    RQ,
    O,
    Q,
    assert_same,
    make_aqlm,
    make_container,
    make_vptq,
    matrices,
)
from vqkernels import container
from vqkernels.errors import VqError
from vqkernels.formats import CheckpointSource, open_source
from vqkernels.parallel import open_rank
from vqkernels.source import TensorSource


def convert(source: Path, target: Path, *arguments: str) -> Result:
    return CliRunner().invoke(cli, ["convert", str(source), "-o", str(target), *arguments])


def converted(source: Path, target: Path, *arguments: str) -> Result:
    """It works, and leaves nothing beside what it made."""
    before = set(target.parent.iterdir())
    result = convert(source, target, *arguments)
    assert result.exit_code == 0, f"{result.output}{result.exception}"
    assert set(target.parent.iterdir()) == before | {target}
    return result


def snapshot(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def refused(source: Path, target: Path, says: str, *arguments: str) -> None:
    """It fails with these words, and everything is as it was."""
    before = snapshot(source.parent)
    result = convert(source, target, *arguments)
    assert result.exit_code != 0
    told = str(result.exception) if isinstance(result.exception, VqError) else result.stderr
    assert says in told
    assert snapshot(source.parent) == before


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.safetensors"
    make_container(path)
    return path


# ------------------------------------------------------------------------------------------------
# layouts

LAYOUTS: dict[str, tuple[str, list[str]]] = {
    "file": ("out.safetensors", []),
    "ans": ("out.safetensors", ["--codes", "ans"]),
    "shards": ("out", ["--shard-size", "200"]),
    "shards unasked": ("out", []),
    "ranks": ("out", ["--tensor-parallel", "2"]),
    "npz": ("out.npz", []),
    "plain": ("out", ["--to", "plain"]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_there_and_back(layout: str, source: Path, tmp_path: Path) -> None:
    name, arguments = LAYOUTS[layout]
    result = converted(source, tmp_path / name, *arguments)
    assert "every matrix reads back equal" in result.stderr
    found = open_source(tmp_path / name)
    for key, tensor in matrices(RQ).items():
        assert_same(found[key], tensor)
    converted(tmp_path / name, tmp_path / "back.safetensors")
    # the provenance too, how each was made, and their order
    assert (tmp_path / "back.safetensors").read_bytes() == source.read_bytes()


def test_the_sizes_of_shards(source: Path, tmp_path: Path) -> None:
    converted(source, tmp_path / "one")
    converted(source, tmp_path / "two", "--shard-size", "200")
    assert len(list((tmp_path / "one").glob("*.safetensors"))) == 1
    assert len(list((tmp_path / "two").glob("*.safetensors"))) == 2


def test_ranks_from_ranks_of_another_number(source: Path, tmp_path: Path) -> None:
    result = converted(source, tmp_path / "a", "--tensor-parallel", "4")
    size = sum(len(content) for content in snapshot(tmp_path / "a").values())
    assert f"wrote {tmp_path / 'a'} ({size:,} bytes)" in result.stderr
    converted(tmp_path / "a", tmp_path / "b", "--tensor-parallel", "3", "--column", "*.q_proj")
    assert open_rank(tmp_path / "a", 1).outline(Q).n == 6
    assert open_rank(tmp_path / "a", 1).outline(O).n == 24
    shapes = [(o.n, o.k) for o in (open_rank(tmp_path / "b", 1).outline(name) for name in (Q, O))]
    assert shapes == [(24, 8), (24, 8)]
    converted(tmp_path / "b", tmp_path / "c", "--tensor-parallel", "2", "--row", "*")
    assert open_rank(tmp_path / "c", 1).outline(O).n == 12
    converted(tmp_path / "c", tmp_path / "back.safetensors")
    assert (tmp_path / "back.safetensors").read_bytes() == source.read_bytes()


def test_codes_in_another_order(source: Path, tmp_path: Path) -> None:
    converted(source, tmp_path / "out.safetensors", "--traversal", "column")
    found = container.open_container(tmp_path / "out.safetensors")
    for name, tensor in matrices(RQ).items():
        assert_same(found[name], tensor, traversal="column")
    converted(tmp_path / "out.safetensors", tmp_path / "back.safetensors", "--traversal", "row")
    assert (tmp_path / "back.safetensors").read_bytes() == source.read_bytes()


def test_codes_of_few_entries_take_less_when_they_are_coded(tmp_path: Path) -> None:
    tensors = {
        name: tensor.replace_parts(codes=tensor.parts["codes"].clamp(max=1))
        for name, tensor in matrices(RQ, 256, 256).items()
    }
    container.save(tmp_path / "in.safetensors", tensors)
    result = converted(tmp_path / "in.safetensors", tmp_path / "out.safetensors", "--codes", "ans")
    info = container.describe(tmp_path / "out.safetensors")
    assert {coding for tensor in info.tensors for coding in tensor.coding} >= {"ans"}
    rows = [line.split() for line in result.stdout.splitlines()]
    (shown,) = (row for row in rows if row[0] == "all")
    before, after = (int(cell.replace(",", "")) for cell in shown[2:4])
    assert after == sum(tensor.stored_bytes for tensor in info.tensors)
    assert float(shown[4]) == round(100 * (after / before - 1), 2) < -15


def test_some_of_the_tensors(source: Path, tmp_path: Path) -> None:
    result = converted(source, tmp_path / "out.npz", "-t", "*.q_*")
    assert list(open_source(tmp_path / "out.npz")) == [Q]
    assert "left out 1 tensors that no --tensor matches" in result.stderr
    converted(source, tmp_path / "both.npz", "-t", "*.q_*", "-t", "*.o_proj")
    assert list(open_source(tmp_path / "both.npz")) == [Q, O]


@pytest.mark.parametrize("sharded", [False, True])
def test_a_checkpoint_becomes_a_checkpoint_with_all_its_tensors(
    sharded: bool, tmp_path: Path
) -> None:
    tensors = make_vptq(tmp_path / "in", shard_bytes=500 if sharded else 10**9)
    result = converted(tmp_path / "in", tmp_path / "out", "--to", "vptq", "--shard-size", "500")
    assert "left out" not in result.stderr
    found = open_source(tmp_path / "out")
    for name, tensor in tensors.items():
        assert_same(found[name], tensor)
    assert isinstance(found, CheckpointSource)
    assert set(found.dense_keys()) == set(DENSE)
    for key, value in DENSE.items():
        assert torch.equal(found.checkpoint.read(key), value)
    assert found.checkpoint.config.items() >= CONFIG.items()
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2


def test_a_checkpoint_through_files_of_ours(tmp_path: Path) -> None:
    tensors = make_aqlm(tmp_path / "in")
    result = converted(tmp_path / "in", tmp_path / "a.npz")
    assert "left out what isn't quantised" in result.stderr
    converted(tmp_path / "a.npz", tmp_path / "b.safetensors")
    converted(tmp_path / "b.safetensors", tmp_path / "c", "--to", "aqlm")
    found = open_source(tmp_path / "c")
    assert isinstance(found, CheckpointSource)
    assert found.checkpoint.method == "aqlm"
    for name, tensor in tensors.items():
        assert_same(found[name], tensor)
    weights = load_file(tmp_path / "c/model.safetensors")
    assert torch.equal(
        weights[f"{Q}.codes"], load_file(tmp_path / "in/model.safetensors")[f"{Q}.codes"]
    )


def test_what_a_format_can_not_hold(source: Path, tmp_path: Path) -> None:
    refused(source, tmp_path / "out", f"matrix {Q!r}: ", "--to", "vptq")


# ------------------------------------------------------------------------------------------------
# what is refused


def test_nothing_is_overwritten_unasked(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out.npz").write_text("mine")
    refused(source, tmp_path / "out.npz", "out.npz: is there already; choose another name, or add")
    converted(source, tmp_path / "out.npz", "--force")
    assert set(open_source(tmp_path / "out.npz")) == {Q, O}


def test_an_empty_folder_is_nothing_to_lose(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    converted(source, tmp_path / "out")
    assert set(open_source(tmp_path / "out")) == {Q, O}


@pytest.mark.parametrize("name", ["in.safetensors", "link.safetensors"])
def test_the_input_is_never_replaced(name: str, source: Path, tmp_path: Path) -> None:
    (tmp_path / "link.safetensors").symlink_to(source)
    refused(source, tmp_path / name, "is what is read, or holds it", "--force")


def test_a_folder_that_holds_the_input_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models/layers.json").touch()
    make_container(tmp_path / "models/in.safetensors")
    inner = tmp_path / "models/in.safetensors"
    refused(inner, tmp_path / "models", "is what is read, or holds it", "--to", "plain", "--force")


def test_only_folders_of_matrices_are_replaced(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "sub").mkdir(parents=True)
    (out / "thesis.tex").write_text("mine")
    refused(source, out, "is a folder of something else", "--to", "plain", "--force")
    (out / "thesis.tex").replace(out / "layers.json")
    converted(source, out, "--to", "plain", "--force")
    assert not (out / "sub").exists()
    converted(source, out, "--force")
    assert not list(out.glob("*.bin"))
    assert set(open_source(out)) == {Q, O}


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("out.npz", ["--codes", "ans"], "--codes is of containers: leave it out for npz"),
        ("out", ["--to", "plain", "--shard-size", "2GB"], "--shard-size is of containers"),
        ("out", ["--to", "aqlm", "--traversal", "row"], "--traversal is of containers"),
        ("out.npz", ["--tensor-parallel", "2"], "--tensor-parallel is of containers"),
        ("out", ["--tensor-parallel", "2", "--shard-size", "1GB"], "leave one of them out"),
        ("out", ["--row", "*"], "--row and --column say how to cut: add --tensor-parallel"),
        (
            "out",
            ["--tensor-parallel", "2", "--row", "*.q_proj", "--column", "*"],
            f"{Q!r} is named by --row and by --column",
        ),
        ("out", ["--tensor-parallel", "2", "--row", "x"], "no tensor matches 'x'"),
        ("out", ["--tensor-parallel", "99"], f"tensor {Q!r}: 24 outputs can't be cut for 99"),
        ("out", ["--to", "npz"], "is no name for that"),
        ("out.npz", ["--to", "plain"], "is no name for that"),
        ("out.safetensors", ["--to", "vptq"], "is no name for that"),
        ("out.safetensors", ["--shard-size", "2GB"], "is no name for that"),
        ("out", ["--shard-size", "2 bananas"], "'2 bananas' is no size; write 2GB"),
        ("out", ["--shard-size", "0"], "'0' is no size"),
        ("out", ["--shard-size", "0.1"], "'0.1' is no size"),
        ("out", ["-t", "*.up_proj"], "no tensor matches '*.up_proj'; there are model.layers.0"),
        ("..", [], "is no name for something new"),
        ("none/out", [], "make the folder first"),
    ],
)
def test_options_that_do_not_go_together(
    name: str, arguments: list[str], says: str, source: Path, tmp_path: Path
) -> None:
    refused(source, tmp_path / name, says, *arguments)


@pytest.mark.parametrize(
    ("text", "size"),
    [("2GB", 2 * 10**9), ("1.5 kib", 1536), ("500mb", 500 * 10**6), ("7", 7), ("1TiB", 1 << 40)],
)
def test_sizes(text: str, size: int, source: Path, tmp_path: Path, monkeypatch: Any) -> None:
    seen = []
    monkeypatch.setitem(
        conversion._WRITERS,
        "shards",
        lambda path, view, layout, origin: seen.append(layout.shard_bytes),
    )
    convert(source, tmp_path / "out", "--shard-size", text)
    assert seen == [size]


def test_an_input_that_is_not_there(tmp_path: Path) -> None:
    refused(tmp_path / "none.npz", tmp_path / "out.npz", "none.npz: can't be read (No such file")


# ------------------------------------------------------------------------------------------------
# what goes wrong on the way


def write_badly(change: Any) -> Any:
    def write(path: Path, view: TensorSource, *_: object) -> None:
        container.save(path, change(dict(view)))

    return write


def changed(tensors: dict[str, Any]) -> dict[str, Any]:
    codes = tensors[O].parts["codes"].clone()
    codes[0, 0, 0] ^= 1
    return {**tensors, O: tensors[O].replace_parts(codes=codes)}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (changed, f"out.safetensors: tensor {O!r} doesn't read back as it was; report it"),
        (lambda tensors: {Q: tensors[Q]}, f"out.safetensors: tensor {O!r} is missing or too many"),
        (lambda tensors: {**tensors, "x": tensors[Q]}, "tensor 'x' is missing or too many"),
    ],
)
def test_what_does_not_read_back_gets_no_name(
    change: Any, says: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(conversion._WRITERS, "container", write_badly(change))
    refused(source, tmp_path / "out.safetensors", says)
    assert ".vqbench-" not in str(convert(source, tmp_path / "out.safetensors").exception)


def test_reading_back_can_be_left_out(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(conversion._WRITERS, "container", write_badly(changed))
    result = converted(source, tmp_path / "out.safetensors", "--no-verify")
    assert "nothing was read back" in result.stderr


@pytest.mark.parametrize("there", [False, True])
def test_ctrl_c_leaves_what_was_there(
    there: bool, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(path: Path, view: TensorSource, *_: object) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    if there:
        (tmp_path / "out.safetensors").write_text("mine")
    before = snapshot(tmp_path)
    monkeypatch.setitem(conversion._WRITERS, "container", interrupt)
    result = convert(source, tmp_path / "out.safetensors", "--force")
    assert result.exit_code == 130
    assert f"interrupted: {tmp_path / 'out.safetensors'} was not written" in result.stderr
    assert snapshot(tmp_path) == before


def test_damaged_input_is_told_by_its_own_name(source: Path, tmp_path: Path) -> None:
    content = bytearray(source.read_bytes())
    content[-1] ^= 1
    source.write_bytes(content)
    refused(source, tmp_path / "out.npz", f"{source}: tensor ")
