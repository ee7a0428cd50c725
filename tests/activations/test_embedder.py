"""The embedder: means over a text's own tokens, in the order given; the real one knows a paraphrase by its meaning."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from activations.embedder import Embedder, load_embedder
from activations.errors import InputError

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefgh"]
TEXTS = ["a b c d e f g h", "", "a", "c b a", "h h h h h", "b"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny random BERT of 16 positions, saved as sentence-transformers would."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        initializer_range=0.5,  # or all texts would be alike
    )
    BertModel(config).save_pretrained(tmp_path)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]").save_pretrained(tmp_path)
    write(tmp_path / "sentence_bert_config.json", max_seq_length=8)
    write(tmp_path / "1_Pooling" / "config.json", pooling_mode_cls_token=False, pooling_mode_mean_tokens=True)
    return tmp_path


def write(path: Path, **settings: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(settings))


def by_hand(embedder: Embedder, text: str) -> torch.Tensor:
    """One text alone, unpadded: the mean over all of its tokens, scaled to norm 1."""
    ids = embedder.tokenizer(text, verbose=False)["input_ids"]
    if len(ids) > embedder.max_tokens:
        ids = [*ids[: embedder.max_tokens - 1], ids[-1]]
    with torch.no_grad():
        states = embedder.hf(torch.tensor([ids])).last_hidden_state[0]
    total = sum(states[i] for i in range(len(ids)))
    return total / total.square().sum().sqrt()


@pytest.mark.parametrize("batch", [1, 2, 4, 64])
def test_each_text_has_its_own_vector_whatever_is_beside_it(folder, batch):
    embedder = load_embedder(str(folder), device="cpu")
    vectors = embedder.embed(TEXTS, batch=batch)
    assert vectors.dtype == torch.float32
    assert vectors.shape == (len(TEXTS), embedder.d)
    torch.testing.assert_close(vectors, torch.stack([by_hand(embedder, t) for t in TEXTS]), atol=1e-5, rtol=0)
    assert (vectors @ vectors.T).fill_diagonal_(0).max() < 0.999  # else the order would not show


def test_texts_are_cut_where_the_model_says(folder):
    long = ["a b c d e f g h", "a b c d e f h h"]
    assert torch.equal(*load_embedder(str(folder)).embed(long, batch=1))
    (folder / "sentence_bert_config.json").unlink()
    whole = load_embedder(str(folder))
    assert whole.max_tokens == 16  # as many as it has positions
    assert not torch.equal(*whole.embed(long, batch=1))
    write(folder / "sentence_bert_config.json", max_seq_length=512)
    assert load_embedder(str(folder)).max_tokens == 16


def test_no_texts_give_no_vectors(folder):
    assert load_embedder(str(folder)).embed([]).shape == (0, 16)


def test_a_model_without_a_pooling_file_is_pooled_by_the_mean(folder):
    expected = load_embedder(str(folder)).embed(TEXTS)
    (folder / "1_Pooling" / "config.json").unlink()
    assert torch.equal(load_embedder(str(folder)).embed(TEXTS), expected)
    write(folder / "1_Pooling" / "config.json", pooling_mode="mean")  # how newer files say it
    assert torch.equal(load_embedder(str(folder)).embed(TEXTS), expected)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls_token"),
        ({"pooling_mode_max_tokens": True, "pooling_mode_mean_tokens": True}, "max_tokens and mean_tokens"),
        ({"pooling_mode": "lasttoken"}, "lasttoken"),
    ],
)
def test_another_pooling_is_refused(folder, settings, said):
    write(folder / "1_Pooling" / "config.json", **settings)
    with pytest.raises(InputError, match=f"pools by {said}, expected mean: choose another embedder"):
        load_embedder(str(folder))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "no/such-model"}, "Embedder 'no/such-model' could not be loaded .* expected 'all-minilm-l6-v2'"),
        ({"device": "toaster"}, "Device 'toaster' is not here"),
    ],
)
def test_wrong_names_are_one_plain_line(arguments, message):
    with pytest.raises(InputError, match=message) as error:
        load_embedder(**arguments)
    assert "\n" not in str(error.value)


def test_a_single_string_and_an_empty_batch_are_refused(folder):
    embedder = load_embedder(str(folder))
    with pytest.raises(InputError, match=r"embed got one text \('a b'\), expected several"):
        embedder.embed("a b")
    with pytest.raises(InputError, match="batch=0 texts at a time"):
        embedder.embed(["a"], batch=0)


# --- the real one ---

PAIRS = [
    ("A man is eating a plate of pasta.", "Someone is having noodles for dinner."),
    ("The stock market fell sharply on Monday.", "Share prices dropped a lot at the start of the week."),
    ("How do I reset my password?", "I forgot my login and need a new one."),
    ("The cat slept on the warm roof.", "A kitten was napping on top of the house."),
]


@pytest.fixture(scope="module")
def minilm() -> Embedder:
    return load_embedder(device="cpu")


@pytest.mark.slow
def test_minilm_puts_each_paraphrase_nearest(minilm):
    left, right = (minilm.embed([pair[side] for pair in PAIRS]) for side in (0, 1))
    nearness = left @ right.T
    assert nearness.argmax(dim=0).tolist() == nearness.argmax(dim=1).tolist() == [0, 1, 2, 3]
    apart = nearness[~torch.eye(4, dtype=torch.bool)]
    assert nearness.diagonal().min() > apart.max() + 0.2


@pytest.mark.slow
def test_minilm_is_the_mean_by_hand_padded_or_not(minilm):
    texts = [*(text for pair in PAIRS for text in pair), "word " * 500, "", "x"]
    assert (minilm.max_tokens, minilm.d) == (256, 384)
    expected = torch.stack([by_hand(minilm, text) for text in texts])
    for batch in (1, 3, 64):
        torch.testing.assert_close(minilm.embed(texts, batch=batch), expected, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_minilm_gives_the_cosines_that_sentence_transformers_documents(minilm):
    """Its quickstart prints these to four places."""
    a, b, c = minilm.embed(["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."])
    assert [float(x @ y) for x, y in ((a, b), (a, c), (b, c))] == pytest.approx([0.6660, 0.1046, 0.1411], abs=6e-5)
