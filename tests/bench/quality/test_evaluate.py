from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bench.quality import evaluate
from bench.quality.evaluate import EvaluatorError
from tests.bench.quality import tiny
from vqkernels.errors import ContainerError, SpecError, TensorError, UnsupportedError, VqError

NAME = "model.layers.1.mlp.up_proj.weight"

# An evaluator as a user writes it, as functions and as a command.
MODULE = """
from pathlib import Path
import torch
from safetensors.torch import load_file
from vqkernels.errors import SpecError

def of_file(path):
    return load_file(Path(path) / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]

def of_model(model):
    assert not model.training
    return {"score_sum": model.model.layers[1].mlp.up_proj.weight.double().sum()}

def of_folder(folder: Path, scale=1.0):
    assert (folder / "tokenizer.json").is_file() and (folder / "config.json").is_file()
    return {"accuracy": of_file(folder).double().sum() * scale}

def of_both(model, tokenizer):
    return {"perplexity": float(model(torch.tensor([tokenizer("The dog")["input_ids"]]))[0].mean())}

def drawn(model):
    return {"drawn": float(torch.rand(1))}

def broken(model):
    raise RuntimeError("no luck\\nat all")

def nan(model):
    return {"loss": float("nan")}

def words(model):
    return {"loss": "0.5"}

def own(model):
    raise SpecError("mine")

def flag(model):
    return {"passed": True}

def nothing(model):
    return {}

def other(data):
    return {"a": 1}

class Scores:
    @staticmethod
    def one(folder):
        return {"one": of_file(folder).double().sum()}
"""

# Without torch, which takes seconds to import.
SCRIPT = f"""
import json, struct, sys
data = open(sys.argv[1] + "/model.safetensors", "rb").read()
start = 8 + struct.unpack("<Q", data[:8])[0]
first, last = json.loads(data[8:start])[{NAME!r}]["data_offsets"]
values = struct.unpack(f"<{{(last - first) // 4}}f", data[start + first : start + last])
print("some talk", {{"not": "json"}})
print(json.dumps({{"accuracy": sum(values)}}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    (folder / "mine_to_run.py").write_text(MODULE)
    (folder / "script.py").write_text(SCRIPT)
    return tiny.make_llama(folder / "llama")


@pytest.fixture(autouse=True)
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)


@pytest.fixture(scope="module")
def tensors(folder: Path) -> dict[str, object]:
    """One matrix, of other numbers than the dense one."""
    weight = tiny.weights(folder)[NAME]
    return {NAME: tiny.exact((weight * 2 + 1).half().float())}


def sums(folder: Path, tensors) -> tuple[float, float]:
    dense = tiny.weights(folder)[NAME].double().sum()
    return float(dense), float(tensors[NAME].decode().sum())


def command(text: str) -> str:
    return f"{sys.executable} {text}"


def script(body: str) -> str:
    return command(f'-c "{body}" {{model}}')


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("evaluator", "metric", "better"),
    [
        ("mine_to_run:of_model", "score_sum", None),
        ("mine_to_run:of_folder", "accuracy", "higher"),
        ("mine_to_run:Scores.one", "one", None),
        (command("script.py {model}"), "accuracy", "higher"),
    ],
)
def test_functions_and_commands_see_both_models(
    evaluator: str, metric: str, better: str | None, folder: Path, tensors
) -> None:
    before, path = contents(folder), list(sys.path)
    rows = evaluate.run(evaluator, folder, tensors)
    dense, after = sums(folder, tensors)
    assert [(row.metric, row.better) for row in rows] == [(metric, better)]
    assert rows[0].dense == pytest.approx(dense, rel=1e-12)
    assert rows[0].quantised == pytest.approx(after, rel=1e-12)
    assert contents(folder) == before
    assert sys.path == path


def test_a_model_and_its_tokenizer_go_together(folder: Path, tensors) -> None:
    (row,) = evaluate.run("mine_to_run:of_both", folder, tensors)
    assert row.dense != row.quantised
    (same,) = evaluate.run("mine_to_run:of_both", folder, {NAME: exact_of(folder)})
    assert same.dense == same.quantised == row.dense


def exact_of(folder: Path):
    return tiny.exact(tiny.weights(folder)[NAME])


def test_what_is_drawn_at_random_is_the_same_for_both(folder: Path, tensors) -> None:
    state = torch.random.get_rng_state()
    (row,) = evaluate.run("mine_to_run:drawn", folder, tensors)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert row.dense == row.quantised == float(torch.rand(1))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_copy_is_gone_afterwards(folder: Path, tensors, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    body = f"import json,os; print(json.dumps(dict(here=len(os.listdir('{tmp_path}')))))"
    (row,) = evaluate.run(script(body), folder, tensors)
    assert (row.dense, row.quantised) == (0, 1)
    with pytest.raises(EvaluatorError):
        evaluate.run(script("import sys; sys.exit('vqbench-' in sys.argv[1])"), folder, tensors)
    assert list(tmp_path.iterdir()) == []


def test_a_copy_has_shards_dtypes_and_all_but_other_weights(folder: Path, tmp_path: Path) -> None:
    model = tiny.transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16)
    model.save_pretrained(tmp_path / "shards", max_shard_size="4KB")
    source = tmp_path / "shards"
    (source / "pytorch_model.bin").write_bytes(b"old")
    (source / "part").mkdir()
    (source / "part" / "model.safetensors").write_bytes(b"another's")
    tensor = tiny.exact(torch.full((32, 16), 1 / 3))
    with evaluate.decoded_folder(source, {NAME.removesuffix(".weight"): tensor}) as copy:
        names = {str(path.relative_to(source)) for path in source.rglob("*")}
        found = {str(path.relative_to(copy)) for path in copy.rglob("*")}
        assert found == names - {"pytorch_model.bin"}
        shards = [path.name for path in source.glob("*.safetensors")]
        assert len(shards) > 1
        for name in shards:
            assert load_file(copy / name).keys() == load_file(source / name).keys()
        old = tiny.transformers.AutoModelForCausalLM.from_pretrained(source).state_dict()
        new = tiny.transformers.AutoModelForCausalLM.from_pretrained(copy).state_dict()
    assert old.keys() == new.keys()
    for name, value in new.items():
        expected = torch.full((32, 16), 1 / 3).half() if name == NAME else old[name]
        assert value.dtype == torch.float16, name
        assert torch.equal(value, expected), name
    assert not copy.exists()


@pytest.mark.parametrize(
    ("evaluator", "message"),
    [
        ("no_such_module:f", r"can't be imported \(ModuleNotFoundError"),
        ("mine_to_run:no_such", r"can't be imported \(AttributeError"),
        ("mine_to_run:MODEL.x", r"can't be imported"),
        ("mine_to_run:other", "takes data; its parameters have to be of model, tokenizer, folder"),
        ("mine_to_run:broken", r"fails \(RuntimeError: no luck\)"),
        ("mine_to_run:nan", "its 'loss' is nan, no finite number"),
        ("mine_to_run:words", "its 'loss' is '0.5', no finite number"),
        ("mine_to_run:flag", "its 'passed' is True, no finite number"),
        ("mine_to_run:nothing", r"gives \{\}; let it give figures by name"),
        ("score it", r"lacks \{model\}"),
        ("score '{model}", "No closing quotation; correct the quotes"),
        ("no-such-program {model}", "no-such-program can't be started"),
        (script("import sys; sys.exit('out of\\nluck')"), r"ends with status 1 \(luck\)"),
        (script("print('x')"), "its last line is no JSON: 'x'"),
        (script("pass"), "its last line is no JSON: ''"),
        (script("print([1])"), r"gives \[1\]; let it give figures by name"),
    ],
)
def test_what_an_evaluator_does_wrong_is_one_line(
    evaluator: str, message: str, folder: Path, tensors
) -> None:
    with pytest.raises(EvaluatorError, match=message) as caught:
        evaluate.run(evaluator, folder, tensors)
    assert str(caught.value).startswith("evaluator ")
    assert "\n" not in str(caught.value)


def test_nan_in_json_is_no_figure(folder: Path, tensors) -> None:
    with pytest.raises(EvaluatorError, match="its 'a' is nan, no finite number"):
        evaluate.run(script("print(chr(123), chr(34), 'a', chr(34), ':NaN}', sep='')"), folder, {})


def test_a_command_that_does_not_end_is_ended_with_its_children(folder: Path, tmp_path) -> None:
    mark = tmp_path / "pid"
    line = f"sh -c 'sleep 60 & echo $! > {mark}; wait' {{model}}"
    with pytest.raises(EvaluatorError, match="has not ended after 1 s"):
        evaluate.run(line, folder, {}, timeout_s=1)
    stat = Path(f"/proc/{mark.read_text().strip()}/stat")
    for _ in range(100):  # a killed process goes a moment later
        try:
            state = stat.read_text().split()[2]
        except OSError:
            return
        if state == "Z":
            return
        time.sleep(0.1)
    pytest.fail("the command's child is still there")


def test_a_command_has_a_session_of_its_own(folder: Path, tensors) -> None:
    body = "import json,os; print(json.dumps(dict(own=int(os.getsid(0) == os.getpid()))))"
    (row,) = evaluate.run(script(body), folder, tensors)
    assert row.dense == row.quantised == 1


def test_errors_of_ours_are_passed_on(folder: Path, tensors) -> None:
    with pytest.raises(SpecError, match=r"^mine$"):
        evaluate.run("mine_to_run:own", folder, tensors)


def test_figures_of_one_model_alone_are_refused(folder: Path, tensors) -> None:
    body = "import json,sys; print(json.dumps({'vqbench-' in sys.argv[1] and 'a' or 'b': 1}))"
    with pytest.raises(EvaluatorError, match="gives 'a' for one of the two models only"):
        evaluate.run(script(body), folder, tensors)


def test_directions_are_the_users_first(folder: Path, tensors) -> None:
    evaluator = "mine_to_run:of_model"
    (row,) = evaluate.run(evaluator, folder, tensors, directions=["-score_sum"])
    assert row.better == "lower"
    assert row.worse is (row.quantised > row.dense)
    (row,) = evaluate.run(evaluator, folder, tensors, directions=["+score_sum"])
    assert row.worse is (row.quantised < row.dense)
    json.dumps(row.to_dict(), allow_nan=False)
    with pytest.raises(EvaluatorError, match="gives no 'sum', only score_sum"):
        evaluate.run(evaluator, folder, tensors, directions=["+sum"])
    with pytest.raises(EvaluatorError, match=r"write \+name"):
        evaluate.run(evaluator, folder, tensors, directions=["score_sum"])


@pytest.mark.parametrize(
    ("name", "better"),
    [
        ("accuracy", "higher"),
        ("acc_norm", "higher"),
        ("eval/exact_match", "higher"),
        ("rouge2", "higher"),
        ("rougeL", "higher"),
        ("f1", "higher"),
        ("BLEU-4", "higher"),
        ("ndcg@10", "higher"),
        ("word_perplexity", "lower"),
        ("eval_loss", "lower"),
        ("WER", "lower"),
        ("accuracy_loss", None),
        ("seconds", None),
        ("mismatch", None),
    ],
)
def test_usual_names_say_which_way_is_better(name: str, better: str | None) -> None:
    assert evaluate.better(name) == better


def test_worse_is_unknown_without_a_direction() -> None:
    assert evaluate.MetricRow("e", "m", None, 1, 2).worse is None
    assert evaluate.MetricRow("e", "m", "higher", 1, 1).worse is False


@pytest.mark.parametrize("evaluator", ["mine_to_run:of_model", "mine_to_run:of_folder"])
def test_tensors_of_another_model_are_refused(evaluator: str, folder: Path) -> None:
    weight = tiny.weights(folder)[NAME]
    with pytest.raises(TensorError, match="'elsewhere'"):
        evaluate.run(evaluator, folder, {"elsewhere": tiny.exact(weight)})
    with pytest.raises(TensorError, match="made for another model"):
        evaluate.run(evaluator, folder, {NAME: tiny.exact(weight[:, :8])})


def test_folders_that_are_no_dense_models_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ContainerError, match="is no folder"):
        evaluate.run("mine_to_run:of_model", tmp_path / "none", {})
    (tmp_path / "config.json").write_text('{"architectures": ["Nonsense"]}')
    with pytest.raises(ContainerError, match="architectures names no model of transformers"):
        evaluate.run("mine_to_run:of_model", tmp_path, {})
    with (
        pytest.raises(ContainerError, match="safetensors"),
        evaluate.decoded_folder(tmp_path, {}),
    ):
        pass
    (tmp_path / "config.json").write_text('{"quantization_config": {}}')
    with pytest.raises(UnsupportedError, match="is quantised already"):
        evaluate.run("mine_to_run:of_model", tmp_path, {})


def test_every_error_is_a_vqerror() -> None:
    assert issubclass(EvaluatorError, VqError)
