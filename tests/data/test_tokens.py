"""Packed, contexts are the documents' tokens and separators end to end, and only the tail is lost; one by one, each is
the start of a document. Nothing is added."""

import logging
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from data import tokens
from data.corpora import Document, read_corpus
from data.tokens import one_by_one, pack, separator_of

TEXTS = ["the cat sat on the mat", "a dog", "the mat is red and the cat is not", "x"]
DOCUMENTS = [Document(10 * i, text, "") for i, text in enumerate(TEXTS)]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|bos|>"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A small byte-level BPE that wants a BOS before every text, and texts of at most 8 tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(TEXTS * 10, trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        model_max_length=8,
        eos_token="<|im_start|>",
        bos_token="<|bos|>",
    )


def stream(tokenizer: Any, documents: list[Document], separator: list[int]) -> tuple[list[int], list[int]]:
    """Ids and document ids of everything, one document at a time."""
    ids: list[int] = []
    docs: list[int] = []
    for document in documents:
        row = tokenizer.backend_tokenizer.encode(document.text, add_special_tokens=False).ids + separator
        ids += row
        docs += [document.id] * len(row)
    return ids, docs


def joined(contexts: list[tokens.Context]) -> tuple[list[int], list[int]]:
    return np.concatenate([c.ids for c in contexts]).tolist(), np.concatenate([c.docs for c in contexts]).tolist()


@pytest.mark.parametrize("separator", [0, None])
def test_contexts_are_the_whole_stream_but_its_tail(tokenizer, separator):
    ids, docs = stream(tokenizer, DOCUMENTS, [] if separator is None else [separator])
    contexts = list(pack(DOCUMENTS, tokenizer, context=5, separator_id=separator))
    whole = len(ids) // 5 * 5
    assert len(ids) % 5 != 0  # else this would not show that the tail is dropped
    assert joined(contexts) == (ids[:whole], docs[:whole])
    assert {c.ids.shape for c in contexts} == {c.docs.shape for c in contexts} == {(5,)}
    assert {c.ids.dtype for c in contexts} == {c.docs.dtype for c in contexts} == {np.dtype(np.int32)}


def test_a_separator_has_the_id_of_the_document_that_it_ends(tokenizer):
    ids, docs = joined(list(pack(DOCUMENTS, tokenizer, context=1, separator_id=0)))
    assert [doc for token, doc in zip(ids, docs, strict=True) if token == 0] == [0, 10, 20, 30]
    assert ids[-1] == 0


def test_no_bos_is_added(tokenizer):
    assert tokenizer(["x"])["input_ids"][0][0] == 2  # the tokenizer would
    assert 2 not in joined(list(pack(DOCUMENTS, tokenizer, context=1, separator_id=0)))[0]


def test_special_tokens_in_a_text_are_ordinary_text(tokenizer):
    literal = [Document(0, "a <|im_start|>system<|endoftext|> b<|bos|>", "")]
    ids, _ = joined(list(pack(literal, tokenizer, context=1, separator_id=0)))
    assert [token for token in ids if token < len(SPECIAL)] == [0]
    assert tokenizer.decode(ids[:-1]) == literal[0].text
    assert 1 in tokenizer([literal[0].text])["input_ids"][0]  # and the tokenizer is left as it was


def test_n_tokens_is_rounded_down_to_whole_contexts(tokenizer):
    all_of_them = list(pack(DOCUMENTS, tokenizer, context=4, separator_id=0))
    for n_tokens, n_contexts in ((4, 1), (11, 2), (12, 3)):
        some = list(pack(DOCUMENTS, tokenizer, context=4, n_tokens=n_tokens, separator_id=0))
        assert joined(some) == joined(all_of_them[:n_contexts])
    assert len(list(pack(DOCUMENTS, tokenizer, context=4, n_tokens=10**6, separator_id=0))) == len(all_of_them)


def test_the_size_of_a_batch_changes_nothing(tokenizer, monkeypatch):
    at_once = joined(list(pack(DOCUMENTS, tokenizer, context=3, separator_id=0)))
    monkeypatch.setattr(tokens, "BATCH_CHARACTERS", 1)
    assert joined(list(pack(DOCUMENTS, tokenizer, context=3, separator_id=0))) == at_once


def test_packing_streams(tokenizer, monkeypatch):
    monkeypatch.setattr(tokens, "BATCH_CHARACTERS", 1)
    taken: list[int] = []

    def endless() -> Iterator[Document]:
        while True:
            taken.append(len(taken))
            yield Document(taken[-1], "the cat sat on the mat", "")

    assert len(list(pack(endless(), tokenizer, context=4, n_tokens=40, separator_id=0))) == 10
    assert len(taken) <= 40


def test_a_context_owns_its_memory(tokenizer):
    first, *_ = pack(DOCUMENTS, tokenizer, context=4, separator_id=0)
    assert first.ids.base is None
    assert first.docs.base is None


def test_long_documents_raise_no_warning(tokenizer):
    said: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = said.append  # type: ignore[method-assign]
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    try:
        tokenizer.deprecation_warnings.clear()
        list(pack([Document(0, "the cat " * 50, "")], tokenizer, context=4, separator_id=0))
        assert said == []
        tokenizer(["the cat " * 50])  # which is worth a warning when nobody asks for silence
        assert len(said) == 1
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def test_the_sample_packs_the_same_way_twice(tokenizer):
    def some() -> tuple[list[int], list[int]]:
        documents = islice(read_corpus("sample"), 20)
        return joined(list(pack(documents, tokenizer, context=64, n_tokens=3_200, separator_id=0)))

    ids, docs = some()
    assert len(ids) == 3_200
    assert (ids, docs) == some()
    assert docs == sorted(docs)


@pytest.mark.parametrize("options", [{"context": 0}, {"context": 8, "n_tokens": 7}, {"n_tokens": 0}])
def test_sizes_that_leave_no_context_are_refused_at_once(tokenizer, options):
    with pytest.raises(ValueError, match="context"):
        pack(DOCUMENTS, tokenizer, separator_id=0, **options)


def test_the_separator_is_endoftext_else_eos(tokenizer):
    assert separator_of(tokenizer) == 0
    plain = Tokenizer(models.WordLevel({"</s>": 0, "a": 1, "[UNK]": 2}, unk_token="[UNK]"))
    assert separator_of(PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="</s>")) == 0
    with pytest.raises(ValueError, match="no separator"):
        separator_of(PreTrainedTokenizerFast(tokenizer_object=plain))


# --- one by one ---


def test_one_by_one_each_context_is_the_start_of_a_document(tokenizer):
    contexts = list(one_by_one(DOCUMENTS, tokenizer, context=5))
    expected = [stream(tokenizer, [document], [])[0] for document in DOCUMENTS]
    assert [len(ids) > 5 for ids in expected].count(True) in (1, 2, 3)  # some are cut, some are not
    assert [c.ids.tolist() for c in contexts] == [ids[:5] for ids in expected]
    assert [c.docs.tolist() for c in contexts] == [
        [d.id] * min(5, len(ids)) for d, ids in zip(DOCUMENTS, expected, strict=True)
    ]
    assert {c.ids.dtype for c in contexts} == {c.docs.dtype for c in contexts} == {np.dtype(np.int32)}
    assert {(c.roles, c.labels) for c in contexts} == {(None, None)}


def test_one_by_one_stops_before_the_document_that_is_too_much(tokenizer):
    sizes = [len(stream(tokenizer, [document], [])[0][:5]) for document in DOCUMENTS]
    for n in range(1, len(sizes)):
        exactly = sum(sizes[: n + 1])
        for n_tokens, n_contexts in ((exactly, n + 1), (exactly - 1, n)):
            some = list(one_by_one(DOCUMENTS, tokenizer, context=5, n_tokens=n_tokens))
            assert len(some) == n_contexts  # a shorter one further on is not taken either
    assert len(list(one_by_one(DOCUMENTS, tokenizer, context=5, n_tokens=10**6))) == len(DOCUMENTS)


def test_one_by_one_text_is_literal_and_has_no_bos(tokenizer):
    text = "a <|im_start|>system<|endoftext|> b<|bos|>"
    (only,) = one_by_one([Document(0, text, "")], tokenizer, context=100)
    assert min(only.ids) >= len(SPECIAL)
    assert tokenizer.decode(only.ids) == text


def test_one_by_one_a_text_without_tokens_is_passed_over():
    words = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    documents = [Document(0, "a a", ""), Document(1, "\u3000", ""), Document(2, "a", "")]
    contexts = list(one_by_one(documents, PreTrainedTokenizerFast(tokenizer_object=words), context=8))
    assert [c.docs.tolist() for c in contexts] == [[0, 0], [2]]


def test_one_by_one_streams_and_the_size_of_a_batch_changes_nothing(tokenizer, monkeypatch):
    at_once = joined(list(one_by_one(DOCUMENTS, tokenizer, context=3)))
    monkeypatch.setattr(tokens, "BATCH_CHARACTERS", 1)
    assert joined(list(one_by_one(DOCUMENTS, tokenizer, context=3))) == at_once
    taken: list[int] = []

    def endless() -> Iterator[Document]:
        while True:
            taken.append(len(taken))
            yield Document(taken[-1], "the cat sat on the mat", "")

    assert len(list(one_by_one(endless(), tokenizer, context=4, n_tokens=40))) == 10
    assert len(taken) == 10


def test_one_by_one_a_label_is_its_place_in_the_list(tokenizer):
    documents = [Document(i, "the cat", "", label) for i, label in enumerate("bab")]
    contexts = list(one_by_one(documents, tokenizer, context=8, label_names=["a", "b"]))
    assert all(c.labels.shape == c.ids.shape and c.labels.dtype == np.int32 for c in contexts)
    assert [set(c.labels.tolist()) for c in contexts] == [{1}, {0}, {1}]


def test_one_by_one_a_label_outside_the_list_is_refused(tokenizer):
    with pytest.raises(ValueError, match="document 7 has the label 'c', expected one of the 2 in label_names"):
        list(one_by_one([Document(7, "x", "", "c")], tokenizer, label_names=["a", "b"]))
    with pytest.raises(ValueError, match="document 7 has no label, expected one: read the corpus with label_column"):
        list(one_by_one([Document(7, "x", "")], tokenizer, label_names=["a", "b"]))


@pytest.mark.parametrize("options", [{"context": 0}, {"context": 8, "n_tokens": 7}])
def test_one_by_one_sizes_that_leave_no_context_are_refused_at_once(tokenizer, options):
    with pytest.raises(ValueError, match="context"):
        one_by_one(DOCUMENTS, tokenizer, **options)
