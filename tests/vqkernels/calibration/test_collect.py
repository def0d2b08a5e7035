"""Moments from a run: against numpy on recorded inputs, and what may go wrong on the way."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from vqkernels.calibration import Calibration, CalibrationWarning, collect
from vqkernels.calibration.sums import Sums
from vqkernels.errors import TensorError
from vqkernels.nn import VQLinear
from vqkernels.quantize import quantize
from vqkernels.spec import CodebookSpec


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Block(nn.Module):
    """Tokens in, as a language model's: an embedding, two linear layers, a head on the first."""

    def __init__(self, width=8):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(50, width)
        self.up = nn.Linear(width, 2 * width)
        self.drop = nn.Dropout(0.5)
        self.norm = nn.BatchNorm1d(2 * width)
        self.down = nn.Linear(2 * width, width)
        self.head = nn.Linear(width, 3)

    def forward(self, input_ids, attention_mask=None, flat=False):
        x = self.embed(input_ids)
        x = x.flatten(0, 1) if flat else x
        x = self.drop(torch.relu(self.up(x)))
        x = self.down(self.norm(x.flatten(0, -2)).reshape(x.shape))
        return self.head(x.reshape(*input_ids.shape, -1)[:, 0])


def tokens(samples, length, seed=0):
    return torch.randint(0, 50, (samples, length), generator=torch.Generator().manual_seed(seed))


def quiet(*args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)
        return collect(*args, **options)


def recorded(model, batches):
    """What each linear layer is given, as numpy arrays, by torch's own hooks."""
    found = {}
    hooks = [
        module.register_forward_hook(
            lambda _, args, __, name=name: found.setdefault(name, []).append(args[0].numpy())
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    model.eval()
    with torch.no_grad():
        for batch in batches:
            model(**batch) if isinstance(batch, dict) else model(batch)
    for hook in hooks:
        hook.remove()
    return found


def agrees(moments, rows):
    rows = rows.astype(np.float64)
    assert moments.count == len(rows)
    gram = rows.T @ rows / len(rows)
    np.testing.assert_allclose(moments.gram, gram, rtol=1e-6, atol=1e-7 * gram.max())
    np.testing.assert_allclose(moments.diagonal, np.square(rows).mean(0), rtol=1e-6)
    moments.check("here")
    assert torch.equal(moments.gram, moments.gram.T)


# --- what is summed up ---


def test_moments_are_numpys_of_the_inputs_that_torch_records():
    model, batches = Block(), [tokens(4, 6, seed=seed) for seed in range(5)]
    ours = collect(model, batches, holdout=0)
    theirs = recorded(model, batches)
    assert set(ours) == {"up", "down", "head"} == set(theirs)
    for name, inputs in theirs.items():
        agrees(ours[name], np.concatenate([x.reshape(-1, x.shape[-1]) for x in inputs]))
        assert ours[name].inputs is None
    agrees(ours.of_weight("up.weight"), np.concatenate([x.reshape(-1, 8) for x in theirs["up"]]))
    assert ours.of_weight("embed.weight") is None


@pytest.mark.parametrize("flat", [False, True])
def test_padding_counts_in_no_moment(flat):
    model, ids = Block(), tokens(8, 7)
    mask = (torch.arange(7) < torch.tensor([7, 3, 5, 1, 7, 2, 6, 4])[:, None]).long()
    batch = {"input_ids": ids, "attention_mask": mask, "flat": flat}
    ours = quiet(model, [batch], holdout=0)
    theirs = recorded(model, [batch])
    for name in ("up", "down"):
        x = theirs[name][0]
        agrees(ours[name], x.reshape(56, -1)[mask.flatten().numpy() == 1])
    # one token of each sample: not the batch's tokens
    agrees(ours["head"], theirs["head"][0])
    assert ours["up"].count == 35


def test_every_tenth_sample_is_held_out_and_none_of_it_counts():
    model = Block()
    batches = [tokens(8, 5, seed=seed) for seed in range(5)]  # 40 samples
    ours = quiet(model, batches, holdout=0.1)
    theirs = recorded(model, batches)
    x = np.concatenate([one.reshape(8, 5, -1) for one in theirs["up"]])
    held = np.arange(40) % 10 == 4
    agrees(ours["up"], x[~held].reshape(-1, 8))
    np.testing.assert_array_equal(ours["up"].inputs, x[held].reshape(-1, 8))
    head = np.concatenate(theirs["head"])
    agrees(ours["head"], head[~held])
    np.testing.assert_array_equal(ours["head"].inputs, head[held])


def test_padding_is_held_out_no_more_than_it_counts():
    model, ids = Block(), tokens(10, 4)
    mask = torch.ones(10, 4, dtype=torch.bool)
    mask[:, 2:] = False
    ours = quiet(model, [{"input_ids": ids, "attention_mask": mask}])
    assert ours["up"].count == 18
    assert torch.equal(ours["up"].inputs, model.embed(ids[4, :2]).detach())


def test_held_inputs_are_some_of_many_each_as_likely():
    inputs = torch.arange(6000.0)[:, None]
    ours = Calibration.from_activations({"a": inputs}, holdout=0.4)["a"]
    rows = ours.inputs[:, 0]
    assert rows.shape == (256,)
    assert len(set(rows.tolist())) == 256
    assert bool((rows >= 3600).all())  # the last ones
    assert bool((rows.diff() > 0).all())
    # a quarter of them from each quarter: 64, a deviation of about 7
    assert all(43 <= int(c) <= 85 for c in torch.histc(rows, 4, 3600, 6000))
    parts = [inputs[at : at + 100] for at in range(0, 6000, 100)]
    ours = quiet(nn.Sequential(nn.Linear(1, 1)), parts, holdout=0.1)["0"]
    assert all(43 <= int(c) <= 85 for c in torch.histc(ours.inputs[:, 0], 4, 0, 6000))


def test_a_batch_may_be_a_tensor_a_tuple_a_mapping_or_a_data_loaders():
    model, x = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2)), normal(64, 6)
    expected = collect(model, [x])
    for batches in ([(x,)], [[x]], DataLoader(TensorDataset(x), batch_size=16), [{"input": x}]):
        found = collect(model, batches)
        assert torch.allclose(found["0"].gram, expected["0"].gram, rtol=1e-6, atol=1e-7)
    pairs = DataLoader(TensorDataset(x, normal(64, 1)), batch_size=16)
    found = collect(model, pairs, forward=lambda model, batch: model(batch[0]))
    assert torch.allclose(found["1"].gram, expected["1"].gram, rtol=1e-5, atol=1e-6)


def test_wide_layers_are_summed_in_tiles_and_long_runs_in_chunks(monkeypatch):
    x = normal(1100, 600)
    plain = Calibration.from_activations({"a": x}, holdout=0)["a"]  # a tile and a bit
    monkeypatch.setattr("vqkernels.calibration.sums.TILE", 250)
    monkeypatch.setattr("vqkernels.calibration.sums.CHUNK", 600 * 90)
    pieces = Calibration.from_activations({"a": x}, holdout=0)["a"]
    for moments in (plain, pieces):
        agrees(moments, x.numpy())


@pytest.mark.filterwarnings("ignore::vqkernels.calibration.CalibrationWarning")
def test_sums_have_the_same_bits_on_one_and_two_threads(monkeypatch):
    x = normal(700, 1100)
    before, found, inside = torch.get_num_threads(), [], set()
    add = Sums._add

    def watched(*args):
        inside.add(torch.get_num_threads())
        add(*args)

    monkeypatch.setattr(Sums, "_add", watched)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(Calibration.from_activations({"a": x})["a"])
        assert torch.get_num_threads() == threads
        found.append(Calibration.from_activations({"a": x}, full=False)["a"])
    torch.set_num_threads(before)
    assert inside == {1}  # most libraries split products so that no bit shows it, some do not
    assert torch.equal(found[0].gram, found[2].gram)
    assert torch.equal(found[0].inputs, found[2].inputs)
    assert torch.equal(found[1].diagonal, found[3].diagonal)


def test_sums_are_exact_where_float32_would_lose_them():
    # 1 beside 4096^2 is lost in float32 after the first token
    x = torch.ones(3000, 2)
    x[0] = 4096.0
    ours = Calibration.from_activations({"a": x}, holdout=0)["a"]
    assert float(ours.diagonal[0]) == pytest.approx((4096**2 + 2999) / 3000, rel=1e-7)


def test_the_diagonal_alone():
    model, batches = Block(), [tokens(4, 6)]
    whole, thin = quiet(model, batches), collect(model, batches, full=False)
    for name in whole:
        assert thin[name].gram is None
        assert torch.allclose(thin[name].diagonal, whole[name].diagonal, rtol=1e-6)
        thin[name].check(name)


def test_low_precision_inputs_are_summed_in_float64():
    layer = nn.Sequential(nn.Linear(4, 4)).bfloat16()
    x = normal(32, 4).bfloat16()
    agrees(collect(layer, [x], holdout=0)["0"], x.float().numpy())


# --- which layers ---


def test_quantised_layers_count_as_the_dense_ones_they_stand_for():
    class Decoded(VQLinear):  # whose product takes no kernel, which would be compiled first
        def forward(self, x):
            return x @ self.quantized.decode().float().T

    spec = CodebookSpec(vector_length=4, stages=(4,))
    dense = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 4, bias=False))
    layers = [Decoded.from_quantized(quantize(one.weight, spec)) for one in dense]
    x = normal(40, 8)
    ours = collect(nn.Sequential(*layers), [x], holdout=0)
    agrees(ours["0"], x.numpy())
    agrees(ours["1"], layers[0](x).detach().numpy())


def test_layers_are_chosen_by_glob():
    model, batches = Block(), [tokens(4, 6)]
    assert set(quiet(model, batches, layers=["up", "d*"])) == {"up", "down"}
    assert set(quiet(model, batches, layers=["up.weight", "h*.weight"])) == {"up", "head"}
    with pytest.raises(
        TensorError, match="'q\\*' names no linear layer; there are 'up' and 2 more"
    ):
        collect(model, batches, layers=["up", "q*"])
    with pytest.raises(TensorError, match="has no linear layer"):
        collect(nn.ReLU(), batches)


def test_a_layer_of_two_names_is_counted_once_under_both():
    layer = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": layer, "b": layer})
    ours = collect(model, [normal(20, 4)], forward=lambda model, x: model["a"](x), holdout=0)
    assert ours["a"] is ours["b"]
    assert ours["a"].count == 20
    called_twice = nn.Sequential(layer, layer)
    assert collect(called_twice, [normal(20, 4)], holdout=0)["0"].count == 40


def test_a_layer_that_reorders_its_input_counts_every_row():
    class Expert(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(3, 3)

        def forward(self, x):
            return self.inner(x.flatten(0, 1)[:7])

    x = normal(4, 5, 3)
    ours = collect(Expert(), [x], holdout=0.25)["inner"]
    agrees(ours, x.flatten(0, 1)[:7].numpy())
    assert ours.inputs is None


# --- the model is left as it was ---


def test_the_model_is_left_as_it_was():
    model = Block()
    model.down.eval()
    before = {name: module.training for name, module in model.named_modules()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    graphs = []
    watch = model.up.register_forward_hook(lambda _, __, y: graphs.append(y.requires_grad))
    first = quiet(model, [tokens(4, 6)])
    watch.remove()
    assert graphs == [False]
    assert {name: module.training for name, module in model.named_modules()} == before
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(value.grad is None and value.requires_grad for value in model.parameters())
    assert torch.is_grad_enabled()
    # no dropout: the same again
    again = quiet(model, [tokens(4, 6)])
    assert torch.equal(first["down"].gram, again["down"].gram)
    model.up(normal(2, 8)).sum().backward()
    assert model.up.weight.grad is not None


def test_an_error_in_the_model_leaves_nothing_behind():
    model = Block()
    with pytest.raises(IndexError):
        collect(model, [tokens(2, 3), torch.full((2, 3), 99)])
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(module.training for module in model.modules())
    assert torch.is_grad_enabled()


# --- what is refused or warned of ---


def test_inputs_that_are_not_finite_are_refused_with_the_layers_name():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[0].bias.data[2] = float("inf")
    with pytest.raises(TensorError, match="2: its input holds NaN or infinity; run the model in"):
        collect(model, [normal(8, 4)])
    ids = {"input_ids": tokens(2, 3), "attention_mask": torch.tensor([[1, 1, 0], [1, 1, 0]])}
    block = Block()
    block.embed.weight.data[ids["input_ids"][:, 2]] = float("nan")
    keep = ids["input_ids"][:, :2]
    assert not set(keep.flatten().tolist()) & set(ids["input_ids"][:, 2].tolist())
    assert quiet(block, [ids], layers=["up"])["up"].count == 4  # padding may hold anything


def test_batches_without_tensors_and_bad_shares_are_refused():
    model = Block()
    with pytest.raises(TensorError, match="a batch holds no tensor; give tensors"):
        collect(model, [{"input_ids": [[1, 2]]}])
    with pytest.raises(TensorError, match="no token reached any layer"):
        collect(model, [])
    for share in (-0.1, 0.5, float("nan")):
        with pytest.raises(TensorError, match=r"holdout .*; use 0 or more, and less than 0.5"):
            collect(model, [tokens(2, 3)], holdout=share)
    with pytest.raises(TensorError, match=r"a: torch.int64 \[3, 4\]; give inputs as floats"):
        Calibration.from_activations({"a": torch.ones(3, 4, dtype=torch.int64)})


def test_a_layer_that_no_token_reached_is_warned_of():
    model = nn.ModuleDict({"used": nn.Linear(4, 4), "idle": nn.Linear(4, 4)})
    with pytest.warns(CalibrationWarning, match=r"reached 1 of 2 layers \(idle\)") as caught:
        ours = collect(model, [normal(8, 4)], forward=lambda model, x: model["used"](x))
    assert set(ours) == {"used"}
    assert "idle" not in ours
    assert [one.filename for one in caught] == [__file__]


def test_fewer_tokens_than_inputs_are_warned_of():
    layer = nn.Sequential(nn.Linear(16, 2))
    collect(layer, [normal(16, 16)], holdout=0)
    text = r"1 of 1 layers have fewer tokens than inputs \(0: 15 tokens, 16 inputs\)"
    with pytest.warns(CalibrationWarning, match=text) as caught:
        collect(layer, [normal(15, 16)], holdout=0)
    assert [one.filename for one in caught] == [__file__]
    with pytest.warns(CalibrationWarning, match="lacks rank"):
        Calibration.from_activations({"a": normal(15, 16)}, holdout=0)
    collect(layer, [normal(15, 16)], holdout=0, full=False)


# --- what it is for ---


def test_moments_lower_the_error_of_a_layers_output_on_inputs_held_out():
    spec = CodebookSpec(vector_length=4, stages=(32,), codebook_dtype="float32")
    # inputs of one vector differ by up to a factor of 100, as a model's do
    scales = torch.logspace(-1, 1, 32)[
        torch.randperm(32, generator=torch.Generator().manual_seed(5))
    ]
    mixed = normal(4000, 32, seed=1) @ (torch.eye(32) + 0.2 * normal(32, 32, seed=2)) * scales
    model = nn.Sequential(nn.Linear(32, 64, bias=False))
    model[0].weight.data = normal(64, 32)
    moments = collect(model, mixed.split(100))["0"]
    weight = model[0].weight.detach()

    def lost(tensor):
        return float((moments.inputs.double() @ (tensor.decode() - weight).T).square().sum())

    plain = lost(quantize(weight, spec))
    assert lost(quantize(weight, spec, hessian=moments.diagonal)) < 0.4 * plain  # 0.36
    assert lost(quantize(weight, spec, hessian=moments.gram)) < 0.4 * plain
