"""`vqbench inspect`: what a container says of itself, and whether it is true."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import save_file

from bench.cli import cli
from tests.vqkernels.container.crafted import Tensors, rebuild
from vqkernels import container
from vqkernels.errors import ContainerError
from vqkernels.parallel import save_parallel
from vqkernels.presets import parse_format
from vqkernels.spec import CodebookSpec
from vqkernels.tensor import QuantizedTensor, random_tensor

SPEC = CodebookSpec(vector_length=4, stages=(16, 4), method="rq", scale_axis="row")


def run(path: Path, *arguments: str) -> Result:
    return CliRunner().invoke(cli, ["inspect", str(path), *arguments])


def described(path: Path, *arguments: str) -> dict[str, Any]:
    result = run(path, *arguments, "-o", "json")
    assert result.exit_code == 0, result.output
    content: dict[str, Any] = json.loads(result.output)
    return content


def even(tensor: QuantizedTensor) -> QuantizedTensor:
    """Codes of stage 0 use 8 of 16 entries equally; those of stage 1 one entry."""
    codes = tensor.parts["codes"].clone()
    count = codes[..., 0].numel()
    codes[..., 0] = (torch.arange(count) % 8).reshape(codes.shape[:2])
    codes[..., 1] = 3
    return tensor.replace_parts(codes=codes)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "x.vq.safetensors"
    tensors = {"a": even(random_tensor(SPEC, 8, 16, bias=True)), "b": random_tensor(SPEC, 16, 16)}
    container.save(path, tensors, provenance={"note": "two\nlines\x1b[31m", "seed": "5"})
    return path


def test_describes_every_tensor(path: Path) -> None:
    content = described(path)
    assert (content["container_version"], content["spec_version"]) == (2, 2)
    assert content["provenance"]["seed"] == "5"
    a, b = content["tensors"]
    assert (a["tensor"], a["n"], a["k"], a["bias"]) == ("a", 8, 16, True)
    assert (b["tensor"], b["n"], b["k"], b["bias"]) == ("b", 16, 16, False)
    assert a["format"] == {
        "vector_length": 4,
        "stages": [16, 4],
        "method": "rq",
        "scale_axis": "row",
    }
    assert a["index_bits"] == 6 / 4
    assert a["codebook_bits"] == 20 * 4 * 16 / (8 * 16)
    assert a["side_bits"] == 16 / 16
    assert a["effective_bits"] == a["index_bits"] + a["codebook_bits"] + a["side_bits"]
    info = container.describe(path).tensors[0]
    assert a["stored_bytes"] == info.stored_bytes
    assert a["sha256"] == dict(info.checksums)
    assert a["decoded_sha256"] == info.decoded_checksum
    assert "stages" not in a


def test_shows_how_a_matrix_was_made_and_coded(tmp_path: Path) -> None:
    spec = CodebookSpec(vector_length=4, stages=(256, 2))
    tensor = random_tensor(spec, 128, 128)
    codes = tensor.parts["codes"] // 8
    made = {"seed": 5, "error": 0.123456, "clip": [-1.5, 2], "note": "\x1b[31m" + "x" * 99}
    path = tmp_path / "x.vq.safetensors"
    container.save(path, {"a": tensor.replace_parts(codes=codes)}, made={"a": made}, codes="ans")
    (a,) = described(path)["tensors"]
    assert a["made"] == made
    assert (a["coding"], a["usage"]) == (["ans", "packed"], True)
    # 128 rows of 32 cells of 9 bits; without stage 0, of 1 bit
    assert a["packed_bytes"] == 128 * 32 * 9 // 8
    sizes = container.describe(path).tensors[0].part_bytes
    assert sizes["codes"] == 128 * 32 // 8
    assert a["code_bytes"] == sizes["codes"] + sizes["ans_0"] + sizes["usage_0"]
    saved = 1 - a["code_bytes"] / a["packed_bytes"]
    assert 0.2 < saved < 3 / 9
    output = run(path).output
    assert f"ans+packed -{saved:.2%}" in output
    assert "'seed=5 error=0.1235 clip=-1.5,2 note=\\x1b[31mxxx" in output
    assert "x" * 80 not in output
    assert f"entropy coding: {a['code_bytes']:,} bytes of codes instead of 4,608" in output
    assert "every checksum of 1 tensors matches" in run(path, "--verify").output


def test_a_file_of_version_1() -> None:
    path = Path(__file__).parents[2] / "docs/vectors/version-1.safetensors"
    content = described(path, "--verify")
    assert content["container_version"] == 1
    for tensor in content["tensors"]:
        assert (tensor["coding"], tensor["usage"]) == (["packed", "packed"], False)
        assert tensor["made"] == {}
        assert tensor["verified"]
    assert "entropy coding" not in run(path).output


def test_a_set_of_shards_is_as_large_as_its_files(tmp_path: Path) -> None:
    tensors = {"a": random_tensor(SPEC, 8, 16), "b": random_tensor(SPEC, 16, 16)}
    container.save_shards(tmp_path, tensors, shard_bytes=1)
    size = sum(file.stat().st_size for file in tmp_path.iterdir())
    assert len(list(tmp_path.iterdir())) == 3
    assert run(tmp_path).output.startswith(f"{tmp_path}: {size:,} bytes, 2 tensors\n")
    assert [row["tensor"] for row in described(tmp_path, "--verify")["tensors"]] == ["a", "b"]


def test_ranks_tell_how_matrices_were_cut(tmp_path: Path) -> None:
    tensors = {"q_proj": random_tensor(SPEC, 9, 16), "o_proj": random_tensor(SPEC, 16, 16)}
    save_parallel(tmp_path, tensors, ranks=2)
    content = described(tmp_path)
    assert content["ranks"] == 2
    q, o = content["tensors"]
    assert (q["tensor"], q["axis"], q["cuts"]) == ("q_proj", "row", [0, 4, 9])
    assert (o["tensor"], o["axis"], o["cuts"]) == ("o_proj", "column", [0, 8, 16])
    assert "verified" not in q
    verified = run(tmp_path, "--verify")
    size = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())
    assert verified.output.startswith(f"{tmp_path}: {size:,} bytes, 2 tensors, 2 ranks\n")
    assert "0,8,16" in verified.output
    assert "every checksum of 2 tensors matches, in each rank and merged" in verified.output


def test_a_damaged_rank_is_refused(tmp_path: Path) -> None:
    save_parallel(tmp_path, {"q_proj": random_tensor(SPEC, 9, 16)}, ranks=2)
    shard = next(tmp_path.rglob("rank-1-of-2/*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert run(tmp_path).exit_code == 0
    result = run(tmp_path, "--verify")
    assert isinstance(result.exception, ContainerError)
    assert str(result.exception).startswith(f"{shard}: tensor 'q_proj': ")


def test_verify_counts_used_entries_and_entropy(path: Path) -> None:
    a = described(path, "--verify")["tensors"][0]
    assert a["verified"]
    first, second = a["stages"]
    assert first == {"used_entries": 8, "entries": 16, "entropy_bits": 3.0, "code_bits": 4}
    assert second == {"used_entries": 1, "entries": 4, "entropy_bits": 0.0, "code_bits": 2}


def test_entropy_is_of_each_codebook(tmp_path: Path) -> None:
    # two codebooks, each always coded by one entry of its own: no information
    spec = CodebookSpec(vector_length=4, stages=(8,), subspaces=2)
    tensor = random_tensor(spec, 8, 16)
    codes = torch.tensor([2, 5]).repeat(2).expand(8, 4).to(torch.uint8)[..., None].contiguous()
    path = tmp_path / "x.vq.safetensors"
    container.save(path, {"a": tensor.replace_parts(codes=codes)})
    (stage,) = described(path, "--verify")["tensors"][0]["stages"]
    assert stage == {"used_entries": 2, "entries": 16, "entropy_bits": 0.0, "code_bits": 3}


def test_entropy_of_uneven_codes(tmp_path: Path) -> None:
    spec = CodebookSpec(vector_length=4, stages=(4,))
    tensor = random_tensor(spec, 4, 16)
    codes = torch.tensor([0] * 12 + [1] * 4, dtype=torch.uint8).reshape(4, 4, 1)
    path = tmp_path / "x.vq.safetensors"
    container.save(path, {"a": tensor.replace_parts(codes=codes)})
    (stage,) = described(path, "--verify")["tensors"][0]["stages"]
    expected = -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25))
    assert stage["entropy_bits"] == pytest.approx(expected, rel=1e-6)


def test_table(path: Path) -> None:
    output = run(path, "--verify").output
    digest = container.describe(path).tensors[0].decoded_checksum
    line = next(line for line in output.splitlines() if line.strip().startswith("a "))
    assert digest[:12] in line
    assert digest not in output
    assert "vector_length=4 stages=16,4 method=rq scale_axis=row" in line
    assert "8/16 + 1/4" in line
    assert "3.00/4 + 0.00/2" in line
    assert "every checksum of 2 tensors matches" in output


def test_provenance_cannot_write_to_the_terminal(path: Path) -> None:
    output = run(path).output
    assert "\x1b" not in output
    assert r"note: 'two\nlines\x1b[31m'" in output


def test_from_quantize_to_verify(tmp_path: Path) -> None:
    model = tmp_path / "m.safetensors"
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(1))
    save_file({"layer.weight": weight, "layer.bias": weight[:, 0].contiguous()}, model)
    made = CliRunner().invoke(
        cli, ["quantize", str(model), "-f", "rq-2x32x4", "-o", str(tmp_path), "--bias"]
    )
    assert made.exit_code == 0, made.output
    content = described(tmp_path / "m.rq-2x32x4.vq.safetensors", "--verify")
    (tensor,) = content["tensors"]
    assert content["provenance"]["source"] == "m.safetensors"
    assert (tensor["tensor"], tensor["bias"], tensor["verified"]) == ("layer.weight", True, True)
    assert tensor["effective_bits"] == 2 * 5 / 4 + 2 * 32 * 4 * 16 / (32 * 64)
    for stage in tensor["stages"]:
        assert 24 < stage["used_entries"] <= 32
        assert 4 < stage["entropy_bits"] <= 5


def test_verify_compares_the_usage(path: Path) -> None:
    def other(_: object, tensors: Tensors) -> None:
        tensors["b/usage_1"][:2] += torch.tensor([1, -1], dtype=torch.int8).view(torch.uint8)

    rebuild(path, other)
    assert run(path).exit_code == 0
    assert "'b': usage_1 is not of its codes" in str(run(path, "--verify").exception)


def test_verify_finds_a_flipped_bit_that_the_header_hides(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert run(path).exit_code == 0
    message = str(run(path, "--verify").exception)
    assert message.startswith(f"{path}: tensor '")
    assert "doesn't match its checksum" in message


def test_bad_files(tmp_path: Path) -> None:
    plain = tmp_path / "plain.safetensors"
    save_file({"x": torch.ones(2)}, plain)
    cut = tmp_path / "cut.safetensors"
    container.save(cut, {"a": random_tensor(parse_format("vq-16x4"), 16, 16)})
    cut.write_bytes(cut.read_bytes()[:-9])
    for file, words in (
        (tmp_path / "none", "there is no such file"),
        (plain, "not a vqbench container"),
        (cut, "is truncated"),
    ):
        error = run(file).exception
        assert isinstance(error, ContainerError)
        assert str(error).startswith(f"{file}: ")
        assert words in str(error)
        assert "\n" not in str(error)
