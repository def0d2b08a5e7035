from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from bench.quality import canaries, embedding, sentences
from bench.quality.encoder import load_encoder
from bench.quality.loading import load_model
from bench.weights import weights_file
from bench.workload import load_workload
from tests.bench.quality import tiny
from vqkernels.errors import ConfigError, ContainerError, TensorError, UnsupportedError
from vqkernels.nn import VQLinear
from vqkernels.presets import parse_format
from vqkernels.quantize import quantize

DAMAGED = "encoder.layer.0.intermediate.dense.weight"

SENTENCES = """
[sentences.home]
kettle = "The kettle boils."
dog = "The dog barks at the postman."
cat = "The cat sleeps on the warm piano."
[sentences.out]
bus = "When it rains, the bus is late."
snow = "When it snows, nobody goes out, and the sea comes in, and the tide, and the moon, and more."
[[query]]
group = "home"
text = "the warm cat"
answers = { cat = 2, dog = 1 }
[[query]]
group = "home"
text = "boils"
answers = { kettle = 1 }
"""

CANARIES = """
[[nearer]]
name = "cats"
text = "The cat sleeps."
near = "The cat sleeps on the piano."
far = "In an hour, the bus is late; less than that, it rains."
margin = 0.02
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("embedding")
    (folder / "sentences.toml").write_text(SENTENCES)
    (folder / "canaries.toml").write_text(CANARIES)
    return tiny.make_bert(folder / "bert")


@pytest.fixture(scope="module")
def given(folder: Path) -> dict[str, Path]:
    return {name: folder.parent / f"{name}.toml" for name in ("sentences", "canaries")}


@pytest.fixture(scope="module")
def minilm() -> Path:
    path = weights_file(load_workload("minilm"))
    assert path is not None
    return path.parent


def damaged(folder: Path) -> dict[str, object]:
    tensors = tiny.linears(folder)
    return {**tensors, DAMAGED: tiny.damaged(tensors[DAMAGED])}


# ------------------------------------------------------------------------------------------------
# reports


def test_an_exact_quantisation_changes_nothing(folder: Path, given) -> None:
    report = embedding.compare(folder, tiny.linears(folder), **given)
    assert report.weights == 12
    assert [group.group for group in report.groups] == ["home", "out", "all"]
    assert [group.texts for group in report.groups] == [5, 2, 7]
    for group in report.groups:
        assert group.cosine == pytest.approx(1, abs=1e-12)
        assert group.cosine_min == pytest.approx(1, abs=1e-12)
        assert group.spearman == pytest.approx(1, abs=1e-12)
        assert group.kendall == pytest.approx(1, abs=1e-12)
        assert group.overlap == 1
    home, out, both = report.groups
    assert out.search is None
    for search in (home.search, both.search):
        assert (search.mrr, search.ndcg) == (search.mrr_dense, search.ndcg_dense)
    (canary,) = report.canaries
    assert canary.passed
    assert canary.quantised == canary.dense


def test_damage_shows_in_each_figure(folder: Path, given) -> None:
    report = embedding.compare(folder, damaged(folder), nearest=2, **given)
    both = report.all
    assert both.cosine_min < both.cosine < 0.99
    assert both.spearman < 0.95
    assert both.kendall < 0.95
    assert both.overlap < 1
    assert both.search.ndcg != both.search.ndcg_dense
    assert report.canaries[0].dense != report.canaries[0].quantised


def test_figures_are_those_of_the_vectors(folder: Path, given) -> None:
    """By hand: both models embed, and each figure is written out."""
    report = embedding.compare(folder, damaged(folder), nearest=2, **given)
    texts = sentences.load_sentences(given["sentences"])
    sides = []
    for tensors in ({}, damaged(folder)):
        encoder = load_encoder(folder)
        if tensors:
            encoder.model.put(tensors)
        ids = encoder.tokens([one.text for one in texts.texts])
        sides.append(np.concatenate([encoder.embed([one], batch=1) for one in ids]))
    dense, after = sides
    cosines = (dense * after).sum(axis=1)
    assert report.all.cosine == pytest.approx(cosines.mean(), abs=1e-6)
    home, out, both = report.groups
    assert home.cosine == pytest.approx(cosines[[0, 1, 2, 5, 6]].mean(), abs=1e-6)
    assert out.cosine_min == pytest.approx(cosines[[3, 4]].min(), abs=1e-6)
    names = ["kettle", "dog", "cat", "bus", "snow", "the warm cat", "boils"]
    assert both.worst == names[cosines.argmin()]
    overlaps, orders = [], []
    for at in range(7):
        others = [one for one in range(5) if one != at]
        tops = [set(sorted(others, key=lambda o: -(v[at] @ v[o]))[:2]) for v in sides]
        overlaps.append(len(tops[0] & tops[1]) / 2)
        signs = [
            np.sign([v[at] @ v[a] - v[at] @ v[b] for a in others for b in others if a < b])
            for v in sides
        ]
        orders.append((signs[0] * signs[1]).mean())
    assert both.overlap == pytest.approx(np.mean(overlaps))
    assert both.kendall == pytest.approx(np.mean(orders))
    ranks = [sorted(range(5), key=lambda o: -(after[6] @ after[o])).index(0)]
    best = min(sorted(range(5), key=lambda o: -(after[5] @ after[o])).index(o) for o in (1, 2))
    assert both.search.mrr == pytest.approx((1 / (1 + best) + 1 / (1 + ranks[0])) / 2)


def test_each_groups_queries_are_judged_by_their_own_answers(
    folder: Path, given, tmp_path: Path
) -> None:
    sets = {}
    for answer in ("bus", "snow"):
        more = f'[[query]]\ngroup = "out"\ntext = "the tide"\nanswers = {{ {answer} = 1 }}\n'
        sets[answer] = tmp_path / f"{answer}.toml"
        sets[answer].write_text(SENTENCES + more)
    found = {
        answer: embedding.compare(folder, damaged(folder), **{**given, "sentences": path})
        for answer, path in sets.items()
    }
    home, out, both = zip(*(found[answer].groups for answer in sets), strict=True)
    assert home[0] == home[1]
    encoder = load_encoder(folder)
    vectors = encoder.embed(
        encoder.tokens([one.text for one in sentences.load_sentences(sets["bus"]).texts]), batch=8
    )
    order = np.argsort(-(vectors[:5] @ vectors[7])).tolist()
    for report, place in zip(out, (3, 4), strict=True):
        assert report.search.mrr_dense == pytest.approx(1 / (1 + order.index(place)))
    assert both[0].search.mrr_dense == pytest.approx(
        (2 * home[0].search.mrr_dense + out[0].search.mrr_dense) / 3
    )


def test_reports_are_json_and_rows(folder: Path, given) -> None:
    report = embedding.compare(folder, damaged(folder), **given)
    again = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert again["groups"] == report.rows()
    assert {tuple(row) for row in report.rows()} == {tuple(report.rows()[0])}
    assert [row["passed"] for row in report.canary_rows()] == [report.canaries[0].passed]


def test_the_folder_is_left_as_it_was_and_runs_are_equal(folder: Path, given) -> None:
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    one, two = (embedding.compare(folder, damaged(folder), **given) for _ in range(2))
    assert one == two
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_batches_do_not_matter(folder: Path, given) -> None:
    one, two = (embedding.compare(folder, damaged(folder), batch=b, **given) for b in (1, 7))
    assert one.all.cosine == pytest.approx(two.all.cosine, abs=1e-6)
    assert one.all.kendall == two.all.kendall


def test_names_may_lack_weight_or_have_the_whole_models_prefix(folder: Path, given) -> None:
    short = {f"bert.{name[:-7]}": one for name, one in damaged(folder).items()}
    assert embedding.compare(folder, short, **given) == embedding.compare(
        folder, damaged(folder), **given
    )


def test_tensors_that_the_model_does_not_load_are_passed_over(
    folder: Path, given, tmp_path
) -> None:
    config = transformers.AutoConfig.from_pretrained(folder)
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    head = tiny.exact(tiny.weights(tmp_path)["classifier.weight"])
    tensors = {**tiny.linears(tmp_path), "classifier.weight": head}
    report = embedding.compare(tmp_path, tensors, **given)
    assert report.weights == 12
    with pytest.raises(TensorError, match="no quantised tensor is for this model"):
        embedding.compare(tmp_path, {"classifier.weight": head}, **given)


@pytest.mark.sweep  # compiles a kernel
def test_our_kernels_say_what_the_decode_says(folder: Path, given) -> None:
    exact = embedding.compare(folder, damaged(folder), **given)
    ours = embedding.compare(folder, damaged(folder), kernels=True, **given)
    assert ours.all.cosine == pytest.approx(exact.all.cosine, abs=1e-6)
    model = load_model(folder, "AutoModel")
    places = model.put(damaged(folder), kernels=True)
    assert {type(model.module.get_submodule(place[:-7])) for place in places} == {VQLinear}


# ------------------------------------------------------------------------------------------------
# the encoder


@pytest.mark.parametrize(
    ("settings", "pool"),
    [
        ({"pooling_mode_mean_tokens": True}, lambda hidden: hidden.mean(0)),
        ({"pooling_mode_cls_token": True}, lambda hidden: hidden[0]),
        ({"pooling_mode_max_tokens": True}, lambda hidden: hidden.amax(0)),
        ({"pooling_mode_lasttoken": True}, lambda hidden: hidden[-1]),
        ({"pooling_mode": "cls"}, lambda hidden: hidden[0]),
    ],
)
def test_vectors_are_pooled_as_the_folder_says(settings, pool, tmp_path: Path) -> None:
    folder = tiny.make_bert(tmp_path / "bert", pooling=settings)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = ["The dog barks.", "A loaf of bread takes an hour", "sea"]
    encoder = load_encoder(folder)
    found = encoder.embed(encoder.tokens(texts), batch=3)
    for text, vector in zip(texts, found, strict=True):
        with torch.no_grad():
            hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        expected = torch.nn.functional.normalize(pool(hidden), dim=0)
        assert vector == pytest.approx(expected.numpy(), abs=1e-5)


def test_long_texts_are_cut_where_the_folder_says(folder: Path) -> None:
    encoder = load_encoder(folder)
    assert [len(one) for one in encoder.tokens([tiny.TEXT, "sea"])] == [24, 3]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("1_Pooling/config.json", '{"pooling_mode": "weightedmean"}', "pools by weightedmean"),
        ("1_Pooling/config.json", "{}", "pools by nothing"),
        (
            "1_Pooling/config.json",
            '{"pooling_mode_cls_token": true, "pooling_mode_max_tokens": true}',
            "pools by pooling_mode_cls_token and pooling_mode_max_tokens",
        ),
        ("modules.json", '[{"type": "a.b.Dense", "path": "2_Dense"}]', "module 'Dense'"),
    ],
)
def test_what_is_not_known_is_refused(
    name: str, content: str, message: str, tmp_path: Path
) -> None:
    folder = tiny.make_bert(tmp_path / "bert")
    (folder / name).write_text(content)
    with pytest.raises(UnsupportedError, match=message):
        load_encoder(folder)


def test_a_damaged_modules_file_is_told(tmp_path: Path) -> None:
    folder = tiny.make_bert(tmp_path / "bert")
    for content in ("{", '{"a": 1}', "[1]"):
        (folder / "modules.json").write_text(content)
        with pytest.raises(ContainerError, match=r"modules.json: "):
            load_encoder(folder)


def test_a_model_that_reads_no_sentences_is_told(given, tmp_path: Path) -> None:
    folder = tiny.make_t5(tmp_path / "t5")
    with pytest.raises(UnsupportedError, match=r"t5: the model can't read text so \(ValueError"):
        embedding.compare(folder, {}, **given)


def test_a_tokenizer_of_another_model_is_told(folder: Path, given, tmp_path: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(folder)
    config.vocab_size = 9
    transformers.BertModel(config).save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    with pytest.raises(ContainerError, match=r"gives token .*, but the model has 9"):
        embedding.compare(tmp_path, {}, **given)


def test_texts_without_tokens_are_told(folder: Path) -> None:
    encoder = load_encoder(folder)
    bare = dataclasses.replace(
        encoder, tokenizer=lambda texts, **_: {"input_ids": [[] for _ in texts]}
    )
    with pytest.raises(ContainerError, match="gives nothing for 'sea'"):
        bare.tokens(["sea"])


def test_nan_is_told(folder: Path, given) -> None:
    huge = tiny.exact(torch.full_like(tiny.weights(folder)[DAMAGED], 3e38))
    with pytest.raises(TensorError, match="gives NaN, infinity or zeros"):
        embedding.compare(folder, {DAMAGED: huge}, **given)


# ------------------------------------------------------------------------------------------------
# the package's own data


def test_our_sentences_cover_what_they_should() -> None:
    found = sentences.load_sentences()
    by_group = {group: [s for s in found.sentences if s.group == group] for group in found.groups}
    assert set(by_group) == {"plain", "long", "rare", "multilingual", "code"}
    assert all(len(group) >= 5 for group in by_group.values())
    assert len({one.text for one in found.texts}) == len(found.texts)
    languages = {one.id.partition("_")[0] for one in by_group["multilingual"]}
    assert len(languages) >= 8
    scripts = {
        __import__("unicodedata").name(letter).partition(" ")[0]
        for one in by_group["multilingual"]
        for letter in one.text
        if letter.isalpha()
    }
    assert {"LATIN", "CYRILLIC", "GREEK", "ARABIC", "HEBREW", "CJK", "HANGUL", "THAI"} <= scripts
    assert {query.group for query in found.queries} == set(by_group)
    assert min(len(one.text.split()) for one in by_group["long"]) > 200


def test_our_canaries_are_of_both_kinds() -> None:
    found = canaries.load_canaries()
    assert len(found.nearer) >= 10
    assert len(found.continuations) >= 5


def nearer_only(path: Path) -> dict[str, Path]:
    """Our canaries, with few sentences, so that little is embedded."""
    (path / "few.toml").write_text(SENTENCES)
    return {"sentences": path / "few.toml"}


def test_our_canaries_pass_on_minilm_and_fail_where_it_is_damaged(
    minilm: Path, tmp_path: Path
) -> None:
    names = [f"encoder.layer.{at}.output.dense.weight" for at in range(6)]
    tensors = {name: tiny.damaged(tiny.exact(tiny.weights(minilm)[name], 32)) for name in names}
    report = embedding.compare(minilm, tensors, **nearer_only(tmp_path))
    rows = report.canary_rows()
    assert [row["name"] for row in rows if not row["dense_passed"]] == []
    assert sum(not row["passed"] for row in rows) >= 5
    assert report.all.cosine < 0.9


@pytest.mark.sweep
def test_minilm_in_full(minilm: Path) -> None:
    weights = tiny.weights(minilm)
    exact = {
        name: tiny.exact(one, 16)
        for name, one in weights.items()
        if ".dense." in name and one.ndim == 2
    }
    report = embedding.compare(minilm, exact)
    assert report.all.cosine == pytest.approx(1, abs=1e-12)
    assert (report.all.overlap, report.all.kendall) == (1, pytest.approx(1))
    name = "encoder.layer.3.intermediate.dense.weight"
    fine, coarse = (
        embedding.compare(minilm, {name: quantize(weights[name], parse_format(spec))})
        for spec in ("rq-2x256x8", "vq-256x8")
    )
    assert 1 > fine.all.cosine > coarse.all.cosine > 0.9
    assert 1 > fine.all.kendall > coarse.all.kendall
    assert all(one.passed for one in fine.canaries)


@pytest.mark.sweep
def test_vectors_are_sentence_transformers_own(minilm: Path) -> None:
    from sentence_transformers import SentenceTransformer

    texts = [one.text for one in sentences.load_sentences().texts]
    encoder = load_encoder(minilm)
    found = encoder.embed(encoder.tokens(texts), batch=16)
    model = SentenceTransformer(str(minilm), device="cpu")
    assert np.abs(found - model.encode(texts, normalize_embeddings=True)).max() < 1e-5


# ------------------------------------------------------------------------------------------------
# files of one's own


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("[sentences.home]", "[sentences.home"), "give a TOML file"),
        (('kettle = "The kettle boils."', 'kettle = ""'), "sentence 'kettle' has no text"),
        (('bus = "', 'dog = "'), "two sentences have the id 'dog'"),
        (("cat = 2", "cow = 2"), "query 1 is answered by 'cow', which is no sentence"),
        (("cat = 2", "cat = 0"), "query 1: the relevance of 'cat' is no number above 0"),
        (('group = "home"', 'group = "none"'), "query 1 is of the group 'none'"),
        (("answers = { kettle = 1 }", ""), "query 2 has no answers"),
        (('text = "boils"', "text = 3"), "query 2 has no text"),
        (("[[query]]", "[[queries]]"), "the file has 'queries'"),
        (('text = "boils"', 'text = "boils"\nlimit = 3'), "query 2 has 'limit'"),
    ],
)
def test_a_wrong_set_of_sentences_is_told(change, message: str, tmp_path: Path) -> None:
    assert change[0] in SENTENCES
    path = tmp_path / "mine.toml"
    path.write_text(SENTENCES.replace(*change))
    with pytest.raises(ConfigError, match=f"sentences .*mine.toml: .*{message}") as caught:
        sentences.load_sentences(path)
    assert "\n" not in str(caught.value)


def test_too_few_sentences_are_told(tmp_path: Path) -> None:
    (tmp_path / "two.toml").write_text('[sentences.a]\na = "a"\nb = "b"')
    with pytest.raises(ConfigError, match="fewer than 3 sentences"):
        sentences.load_sentences(tmp_path / "two.toml")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("margin = 0.02", ""), "nearer 1: missing 1 required positional argument: 'margin'"),
        (("margin = 0.02", "margin = nan"), "nearer 1: margin nan is no number from 0 to 2"),
        (("margin = 0.02", "margin = true"), "nearer 1: margin True is no number"),
        (("far =", "farther ="), "nearer 1: got an unexpected keyword argument 'farther'"),
        (("The cat sleeps.", " "), "nearer 1: text is no text"),
        (("[[nearer]]", "[[nearest]]"), "'nearest' is neither"),
        (("\n[[nearer]]", "[[nearer]]" + CANARIES.partition("]]")[2] + "[[nearer]]"), "two are"),
    ],
)
def test_a_wrong_list_of_canaries_is_told(change, message: str, tmp_path: Path) -> None:
    assert change[0] in CANARIES
    path = tmp_path / "mine.toml"
    path.write_text(CANARIES.replace(*change))
    with pytest.raises(ConfigError, match=f"canaries .*mine.toml: .*{message}") as caught:
        canaries.load_canaries(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "there is none in it"),
        ('[[continuation]]\nname = "a"\nprompt = "b"\ntokens = 0', "tokens 0 is no number from 1"),
        ('[[continuation]]\nname = "a"\nprompt = "b"\ntokens = 1.5', "tokens 1.5 is no"),
        ('[[continuation]]\nname = "a"\nprompt = ""\ntokens = 1', "prompt is no text"),
    ],
)
def test_wrong_continuations_are_told(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(content)
    with pytest.raises(ConfigError, match=message):
        canaries.load_canaries(tmp_path / "mine.toml")
