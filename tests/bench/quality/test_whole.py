"""`vqbench quality` end to end: the sections that encoders, language models and evaluators fill."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from bench import cli
from bench.commands import quality as command
from bench.quality import embedding, perplexity
from bench.quality.whole import EndToEnd
from tests.bench.quality import tiny
from tests.bench.quality.models import make_model, make_quantised
from vqkernels import container
from vqkernels.errors import ContainerError
from vqkernels.quantize import quantize
from vqkernels.spec import CodebookSpec

LAYER = "encoder.layer.0.intermediate.dense.weight"

SENTENCES = """
[sentences.home]
kettle = "The kettle boils."
cat = "The cat sleeps on the warm piano."
bus = "When it rains, the bus is late."
"""
CANARIES = """
[[nearer]]
name = "cats"
text = "The cat sleeps."
near = "The cat sleeps on the piano."
far = "In an hour, the bus is late; less than that, it rains."
margin = 0.06
"""
SIZE = "import json, os, sys; print(json.dumps({'accuracy': os.path.exists(sys.argv[1])*0.5}))"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.cli, ["quality", *map(str, arguments)])


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_bert(tmp_path_factory.mktemp("whole") / "bert")


def test_an_encoder_is_compared_and_its_canaries_count(bert: Path, tmp_path: Path) -> None:
    sentences, canaries, target = (
        tmp_path / name for name in ("sentences.toml", "canaries.toml", "report.json")
    )
    sentences.write_text(SENTENCES)
    canaries.write_text(CANARIES)
    exact = tiny.linears(bert)
    bad = exact | {LAYER: tiny.damaged(exact[LAYER])}
    paths = [tmp_path / "good.safetensors", tmp_path / "bad.safetensors"]
    for path, tensors in zip(paths, (exact, {"elsewhere": exact[LAYER], **bad}), strict=True):
        container.save(path, tensors)
    options = ["--end-to-end", "--sentences", sentences, "--canaries", canaries]
    result = run(bert, *paths, *options, "--json", target)
    content = json.loads(target.read_text())
    for judged, tensors in zip(content["candidates"], (exact, bad), strict=True):
        expected = embedding.compare(bert, tensors, sentences=sentences, canaries=canaries)
        section = judged["sections"]["embedding"]
        assert section["report"] == expected.to_dict()
        assert section["rows"] == expected.rows()
        assert section["canaries"] == expected.canary_rows()
    assert "good.safetensors: embedding\n" in result.stdout
    assert "bad.safetensors: embedding, canaries\n" in result.stdout
    assert result.exit_code == 1
    failed = [line for line in result.stderr.splitlines() if line.startswith("failed: ")]
    assert len(failed) == 1
    assert failed[0].startswith("failed: bad.safetensors: canary 'cats': ")
    again = run(target)
    assert (again.stdout, again.stderr, again.exit_code) == (result.stdout, result.stderr, 1)
    limit = "embedding.groups.all.cosine_min>=0.999"
    lines = [line for line in run(target, "--limit", limit).stderr.splitlines() if "cosine" in line]
    assert len(lines) == 1
    assert lines[0].startswith("beyond its limit: bad.safetensors: embedding.groups.all.cosine_min")


def test_a_language_model_and_an_evaluator(tmp_path: Path) -> None:
    folder, text, target = (tmp_path / name for name in ("llama", "text.txt", "report.json"))
    tiny.make_llama(folder)
    text.write_text(tiny.TEXT)
    evaluator = f"{shlex.quote(sys.executable)} -c {shlex.quote(SIZE)} {{model}}"
    options = ["-f", "vq-16x4", "--perplexity", text, "--evaluator", evaluator, "--seed", 3]
    result = run(folder, *options, "-l", "*proj*", "--json", target, "--totals")
    (judged,) = json.loads(target.read_text())["candidates"]
    spec = CodebookSpec(vector_length=4, stages=(16,))
    weights = tiny.weights(folder)
    names = [layer["layer"] for layer in judged["layers"]]
    assert sorted(names) == sorted(name for name in weights if "proj" in name)
    tensors = {name: quantize(weights[name], spec, seed=3) for name in names}
    expected = perplexity.compare(folder, tensors, text)
    assert judged["sections"]["perplexity"]["report"] == expected.to_dict()
    (figure,) = judged["sections"]["evaluators"]["rows"]
    assert (figure["metric"], figure["dense"], figure["change"]) == ("accuracy", 0.5, 0)
    assert "vq-16x4: perplexity\n" in result.stdout
    for limit, code in (
        ("evaluators.figures.accuracy.change>=0", 0),
        ("evaluators.figures.accuracy.quantised>=0.6", 1),
        ("perplexity.difference.perplexity<=1e-3", 1),
    ):
        lines = run(target, "--limit", limit).stderr
        assert (f"{limit.partition('=')[0][:-1]} " in lines) == bool(code), limit
    missing = run(target, "--limit", "evaluators.figures.bleu.change>=0")
    assert "the report has no such number" in str(missing.exception)


def test_a_file_without_a_model_around_it_runs_nowhere(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model.safetensors")
    result = run(model, make_quantised(tmp_path / "x"), "--end-to-end")
    assert isinstance(result.exception, ContainerError)
    assert "there is no config.json beside it" in str(result.exception)


def test_directions_need_their_evaluator(bert: Path) -> None:
    result = run(bert, "-f", "vq-16x4", "--direction", "+x", "--evaluator", "a", "--evaluator", "b")
    assert result.exit_code == 2
    assert "--direction is of one --evaluator" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "runs"),
    [
        (["minilm"], True),
        (["minilm", "--no-end-to-end"], False),
        (["other"], False),
        (["other", "--end-to-end"], True),
    ],
)
def test_only_minilm_runs_unasked(
    arguments: list[str], runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(command, "make_report", asked.append)
    run(*arguments, "-f", "vq-16x4")
    assert bool(asked[0].end_to_end) == runs


def test_whatever_is_asked_for_runs() -> None:
    assert not EndToEnd()
    assert EndToEnd(evaluators=("a:b",))
    assert EndToEnd(text=Path("x"))
