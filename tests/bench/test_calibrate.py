"""`vqbench calibrate`: models of a few thousand weights, made here, run over lines of text."""

import json
import shutil
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import nn

import bench.calibrating
from bench.calibrating import model_folder, read_texts
from bench.cli import cli
from vqkernels.calibration import load_calibration
from vqkernels.errors import BackendError, ContainerError, TensorError, VqError

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

WORDS = [
    "the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "tree", "and", "then", "slept",
    "all", "day", "in", "sun", "rain",
]  # fmt: skip
LINES = [
    " ".join(WORDS[(3 * i + j * j) % len(WORDS)] for j in range(2 + i * 5 % 9)) for i in range(40)
]


def tokeniser(**special):
    vocabulary = {word: at for at, word in enumerate(["[UNK]", "[PAD]", *WORDS])}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, unk_token="[UNK]", model_max_length=16, **special
    )


def encoder():
    config = transformers.BertConfig(
        vocab_size=24, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    return transformers.BertModel(config), tokeniser(pad_token="[PAD]")


def causal():
    config = transformers.LlamaConfig(
        vocab_size=24, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32,
    )  # fmt: skip
    # no token to pad with, as of most language models
    return transformers.LlamaForCausalLM(config), tokeniser(eos_token="[UNK]")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    found = {}
    for make in (encoder, causal):
        torch.manual_seed(0)
        model, tokenizer = make()
        folder = found[make.__name__] = tmp_path_factory.mktemp("models") / make.__name__
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return found


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("\n\n".join(LINES) + "\n", "utf-8")
    return path


def run(*arguments):
    result = CliRunner().invoke(cli, ["calibrate", *map(str, arguments), "--form", "json"])
    assert result.exit_code == 0, (result.output, result.exception)
    return json.loads(result.stdout), result.stderr


def refused(*arguments):
    result = CliRunner().invoke(cli, ["calibrate", *map(str, arguments)])
    assert isinstance(result.exception, VqError), (result.output, result.exception)
    assert "\n" not in str(result.exception)
    return result.exception


# --- what is written ---


@pytest.mark.parametrize("kind", ["encoder", "causal"])
def test_moments_are_those_of_lines_that_run_alone(folders, texts, tmp_path, kind):
    folder, target = folders[kind], tmp_path / "c"
    rows, _ = run(folder, "-o", target, "--texts", texts)
    found = load_calibration(target)
    auto = {"encoder": transformers.BertModel, "causal": transformers.LlamaForCausalLM}[kind]
    model = auto.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    inputs = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(
                lambda _, args, __, name=name: inputs.setdefault(name, []).append(
                    args[0].reshape(-1, args[0].shape[-1]).numpy()
                )
            )
    with torch.no_grad():
        for line in LINES:
            model(input_ids=tokenizer(line, return_tensors="pt")["input_ids"])
    names = {key.removesuffix(".weight") for key in load_file(folder / "model.safetensors")}
    assert set(found) == set(inputs) == {row["layer"] for row in rows} <= names | {"lm_head"}
    assert len(found) == {"encoder": 7, "causal": 8}[kind]
    for name, each in inputs.items():
        train = np.concatenate([x for at, x in enumerate(each) if at % 10 != 4]).astype(np.float64)
        held = np.concatenate([x for at, x in enumerate(each) if at % 10 == 4])
        assert found[name].count == len(train)
        gram = train.T @ train / len(train)
        np.testing.assert_allclose(found[name].gram, gram, rtol=1e-4, atol=1e-5 * gram.max())
        np.testing.assert_allclose(found[name].inputs, held, rtol=1e-3, atol=1e-5)
    first = rows[0]
    assert first["tokens"] == found[first["layer"]].count
    assert first["held_out"] == len(found[first["layer"]].inputs)
    assert first["inputs"] == 16
    assert first["rms"] == pytest.approx(float(found[first["layer"]].diagonal.mean().sqrt()))


def test_two_runs_write_the_same_bytes(folders, texts, tmp_path):
    for name in ("a", "b"):
        run(folders["encoder"], "-o", tmp_path / name, "--texts", texts)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    provenance = load_calibration(tmp_path / "a").provenance
    assert provenance["model"] == "encoder"
    assert provenance["texts"] == "texts.txt"
    train = [len(line.split()) for at, line in enumerate(LINES) if at % 10 != 4]
    assert provenance["tokens"] == str(sum(train))
    assert len(provenance["texts_sha256"]) == 64
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "texts.txt"]


def test_the_diagonal_of_some_layers_of_the_first_tokens(folders, texts, tmp_path):
    target = tmp_path / "c"
    options = ("-o", target, "--texts", texts, "--layer", "*.query", "--layer", "pooler.*weight")
    rows, _ = run(folders["encoder"], *options, "--diagonal", "--tokens", 50, "--holdout", 0)
    found = load_calibration(target)
    assert [row["layer"] for row in rows] == [
        "encoder.layer.0.attention.self.query",
        "pooler.dense",
    ]
    assert all(moments.gram is None and moments.inputs is None for moments in found.values())
    # the first 16 lines are one batch
    lengths = [len(line.split()) for line in LINES]
    assert rows[0]["tokens"] == sum(lengths[:16]) > 50
    assert rows[1]["tokens"] == 16


def test_lines_are_cut_to_what_the_model_takes(folders, tmp_path):
    (tmp_path / "long").write_text("the cat " * 100)
    options = ("-o", tmp_path / "c", "--texts", tmp_path / "long", "--diagonal", "-l", "*query")
    rows, _ = run(folders["encoder"], *options)
    assert rows[0]["tokens"] == 16  # the tokeniser's model_max_length; the model has 32 positions


def test_without_texts_it_runs_over_its_own(folders, tmp_path):
    _, stderr = run(folders["encoder"], "-o", tmp_path / "c", "--diagonal")
    found = load_calibration(tmp_path / "c")
    assert found.provenance["texts"] == "built-in"
    lines = read_texts(None)
    assert len(set(lines)) == len(lines) > 100
    assert stderr == f"wrote {tmp_path / 'c'}\n"


def test_its_own_texts_are_none_that_quality_is_judged_on():
    judged = Path(bench.calibrating.__file__).parent / "quality" / "sentences.toml"

    def strings(value):
        if isinstance(value, str):
            return {value}
        inner = value.values() if isinstance(value, dict) else value
        return set().union(*map(strings, inner)) if isinstance(value, dict | list) else set()

    assert not strings(tomllib.loads(judged.read_text("utf-8"))) & set(read_texts(None))


def test_what_is_doubtful_is_said_in_a_line(folders, texts, tmp_path):
    (tmp_path / "few").write_text("\n".join(LINES[:3]))
    _, stderr = run(folders["encoder"], "-o", tmp_path / "c", "--texts", tmp_path / "few")
    lines = stderr.splitlines()
    assert lines[0].startswith("warning: calibration: 7 of 7 layers have fewer tokens than inputs")
    assert lines[1:] == [f"wrote {tmp_path / 'c'}"]


# --- what is refused ---


def test_folders_without_a_model_are_refused(folders, texts, tmp_path):
    options = ("-o", tmp_path / "c", "--texts", texts)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "there is no such folder; give a model's" in str(refused(tmp_path / "no", *options))
    assert "is not a folder" in str(refused(texts, *options))
    assert "holds no config.json" in str(refused(empty, *options))
    (empty / "config.json").write_text("{}")
    assert "never loads pickles" in str(refused(empty, *options))
    shutil.copy(folders["encoder"] / "model.safetensors", empty)
    assert "holds no tokeniser (tokenizer.json, " in str(refused(empty, *options))
    shutil.copy(folders["encoder"] / "tokenizer.json", empty)
    assert "architectures names no model" in str(refused(empty, *options))
    (empty / "config.json").write_text("{")
    assert "is no valid JSON" in str(refused(empty, *options))
    shutil.copy(folders["encoder"] / "config.json", empty)
    (empty / "tokenizer.json").write_text("{}")
    assert "can't be loaded as AutoTokenizer" in str(refused(empty, *options))
    assert not (tmp_path / "c").exists()


def test_a_folder_that_lacks_weights_is_refused(folders, texts, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(folders["encoder"], folder)
    state = load_file(folder / "model.safetensors")
    gone = "encoder.layer.0.attention.self.query.weight"
    save_file({key: one for key, one in state.items() if key != gone}, folder / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    error = refused(folder, "-o", tmp_path / "c", "--texts", texts)
    assert f"holds no '{gone}', which BertModel needs" in str(error)


def test_a_model_that_needs_more_than_text_is_refused(folders, texts, tmp_path, monkeypatch):
    def forward(self, **batch):
        raise ValueError("You have to specify decoder_input_ids\nor something else")

    monkeypatch.setattr(transformers.BertModel, "forward", forward)
    error = refused(folders["encoder"], "-o", tmp_path / "c", "--texts", texts)
    assert isinstance(error, TensorError)
    assert str(error) == (
        f"{folders['encoder']}: its model can't be run over text (ValueError: You have to "
        f"specify decoder_input_ids); give an encoder or a causal language model"
    )
    assert not (tmp_path / "c").exists()


def test_unknown_layers_texts_and_devices_are_refused(folders, texts, tmp_path):
    options = (folders["encoder"], "-o", tmp_path / "c")
    error = refused(*options, "--texts", texts, "--layer", "q_proj")
    assert str(error).startswith(f"{folders['encoder']}: collect: 'q_proj' names no linear layer")
    assert "can't be read (No such file" in str(refused(*options, "--texts", tmp_path / "none"))
    (tmp_path / "empty").write_text("\n \n")
    assert "holds no text" in str(refused(*options, "--texts", tmp_path / "empty"))
    (tmp_path / "latin").write_bytes("über".encode("latin-1"))
    assert "is no UTF-8 text" in str(refused(*options, "--texts", tmp_path / "latin"))
    error = refused(*options, "--texts", texts, "--device", "abacus")
    assert isinstance(error, BackendError)
    assert "device 'abacus': torch can't use it" in str(error)
    usage = CliRunner().invoke(cli, ["calibrate", *map(str, options), "--holdout", "0.5"])
    assert usage.exit_code == 2
    assert "0<=x<0.5" in usage.output


def test_without_transformers_the_command_that_installs_it_is_named(folders, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    error = refused(folders["encoder"], "-o", tmp_path / "c")
    assert isinstance(error, BackendError)
    assert str(error).startswith("transformers can't be imported")


def test_minilm_is_the_installed_package(monkeypatch):
    pytest.importorskip("tokenizers")
    try:
        folder = model_folder("minilm")
    except BackendError as error:
        pytest.skip(str(error))
    assert (folder / "tokenizer.json").is_file()


# --- nothing is lost ---


def test_a_calibration_is_replaced_and_nothing_else_is(folders, texts, tmp_path, monkeypatch):
    target = tmp_path / "c"
    options = (folders["encoder"], "-o", target, "--texts", texts, "--diagonal")
    target.write_bytes(b"precious")
    assert "is there already and no calibration" in str(refused(*options))
    assert target.read_bytes() == b"precious"
    target.unlink()
    run(*options)
    before = target.read_bytes()
    run(*options, "--holdout", 0)
    after = target.read_bytes()
    assert after != before

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("bench.commands.calibrate.run", interrupted)
        assert CliRunner().invoke(cli, ["calibrate", *map(str, options)]).exit_code != 0
    assert target.read_bytes() == after
    assert not list(tmp_path.glob(".vqbench*"))


def test_a_place_that_cannot_be_written_is_refused_before_the_model_runs(
    folders, tmp_path, monkeypatch
):
    monkeypatch.setattr("bench.commands.calibrate.load", None)
    for target, message in (
        (tmp_path / "none" / "c", "there is no such folder; make it first"),
        (tmp_path, "can't be written; choose another name"),
    ):
        error = refused(folders["encoder"], "-o", target)
        assert isinstance(error, ContainerError)
        assert message in str(error)
