"""Tiny models in folders, tokenizers with them, and quantisations of theirs that lose nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from tokenizers import (
    Tokenizer,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from torch import Tensor

from vqkernels.parts import part_table
from vqkernels.spec import CodebookSpec
from vqkernels.tensor import QuantizedTensor

TEXT = (
    "The kettle boils. The dog barks at the postman, and the cat sleeps on the warm piano. "
    "When it rains, the bus is late; when it snows, nobody goes out. A loaf of bread takes an "
    "hour to rise, and less than that to bake. The moon pulls the sea, and the tide comes in."
)


def make_llama(folder: Path, *, positions: int = 64, tied: bool = False, seed: int = 0) -> Path:
    """A causal language model of two layers; its weights are large, so that it has opinions."""
    torch.manual_seed(seed)
    tokenizer = _tokenizer("[CLS] $A")
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        tie_word_embeddings=tied,
        initializer_range=0.4,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_gpt2(folder: Path) -> Path:
    """GPT-2, whose matrices lie in Conv1D layers, transposed, and whose head is its embedding."""
    torch.manual_seed(1)
    tokenizer = _tokenizer("[CLS] $A")
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_positions=32, n_embd=16, n_layer=1, n_head=2
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_bert(folder: Path, *, pooling: Mapping[str, object] | None = None) -> Path:
    """A sentence encoder as sentence-transformers stores it."""
    torch.manual_seed(2)
    tokenizer = _tokenizer("[CLS] $A [SEP]")
    config = transformers.BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=40,
        initializer_range=0.3,
    )
    transformers.BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    kinds = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
    modules = [
        {"idx": at, "name": str(at), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for at, (kind, path) in enumerate(kinds.items())
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 24}')
    (folder / "1_Pooling").mkdir()
    settings = {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling or settings))
    return folder


def make_t5(folder: Path) -> Path:
    """A model that takes no sentence without being told what to answer."""
    tokenizer = _tokenizer("[CLS] $A [SEP]")
    config = transformers.T5Config(
        vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2
    )
    transformers.T5Model(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of its file."""
    return load_file(folder / "model.safetensors")


def exact(weight: Tensor, length: int = 8) -> QuantizedTensor:
    """A quantisation of `weight` that decodes to it: each vector is an entry."""
    n, k = weight.shape
    vectors = weight.reshape(-1, length)
    spec = CodebookSpec(
        vector_length=length, stages=(max(2, len(vectors)),), codebook_dtype="float32"
    )
    table = part_table(spec, n, k, bias=False)
    codes = torch.arange(len(vectors), dtype=torch.int32).to(table["codes"].dtype)
    parts = {
        "codes": codes.reshape(table["codes"].shape),
        "codebook_0": vectors.float().clone().reshape(table["codebook_0"].shape),
    }
    return QuantizedTensor(spec, n, k, parts)


def damaged(tensor: QuantizedTensor) -> QuantizedTensor:
    """The same entries in a wrong order: a matrix of the right size that does nothing right."""
    generator = torch.Generator().manual_seed(3)
    codes = tensor.parts["codes"]
    order = torch.randperm(codes.numel(), generator=generator)
    return tensor.replace_parts(codes=codes.flatten()[order].reshape(codes.shape))


def linears(folder: Path) -> dict[str, QuantizedTensor]:
    """Every matrix of the model's layers, exact."""
    return {
        name: exact(weight)
        for name, weight in weights(folder).items()
        if weight.ndim == 2 and ("layer" in name or ".h." in name)
    }


def _tokenizer(template: str) -> transformers.PreTrainedTokenizerFast:
    """Short words and letters of TEXT. Listed, not trained: a trainer's ties fall by chance."""
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    letters = sorted(set(TEXT.lower()) - {" "}) + sorted("bfgjqvxyz0123456789")
    short = sorted(set(re.findall(r"\b[a-z]{2,4}\b", TEXT.lower())))
    pieces = dict.fromkeys([*names, *letters, *(f"##{one}" for one in letters), *short])
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    )


def taught(folder: Path, steps: int = 60) -> Path:
    """Teach the causal language model in `folder` to say TEXT, so that damage can be heard."""
    torch.manual_seed(4)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([tokenizer(TEXT)["input_ids"]])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    return folder
