"""Searches that the store answers alone: by the words of labels, and by a token."""

from autointerp.search.found import LIMIT, Found, Hit, check_labels, check_limit, check_rank, check_text, found
from data.store import Store
from data.store.read import token_text
from data.store.search import ALL, Filters, on_token, with_words

_OTHERWISE = "try --by meaning, fewer words, or --by prompt with a text in which they occur"


def by_words(store: Store, text: str, *, filters: Filters = ALL, limit: int = LIMIT) -> Found:
    """Features whose label has, for each word of `text`, a word that begins with it; case does not count.

    Those with more of the words as whole words come first, then those whose best label it is, then by score.
    Raises InputError for a text without words, and a store without labels.
    """
    check_limit(limit)
    words = check_text(text).split()
    check_labels(store)
    rows, total = with_words(store, words, filters, limit=limit)
    return found(
        store,
        by="words",
        query=text,
        rank="words",
        hits=[Hit(facts=facts, numbers={"words": float(whole)}) for facts, whole in rows],
        total=total,
        definitions={"words": "words of the search that are whole words of the label; the others begin one"},
        filters=filters,
        otherwise=f"No label has all of these words: {_OTHERWISE}.",
    )


def by_token(store: Store, text: str, *, rank: str = "firings", filters: Filters = ALL, limit: int = LIMIT) -> Found:
    """Features that fire on the token `text` most, or most strongly; blanks around it and case do not count.

    rank: 'firings' (share of the feature's firings that are on it) or 'value' (mean value there, as a share of the
    feature's largest). Of each feature the 10 tokens of most firings and the 10 of largest mean value are looked at.
    Raises InputError for an empty text.
    """
    check_limit(limit)
    check_rank(rank, "token")
    query = check_text(text)
    ids = store.ids_of(query)
    rows, total = on_token(store, ids, filters, order=rank, limit=limit)
    hits = [
        Hit(
            facts=row.facts,
            numbers={
                "of_firings": row.of_firings,
                "of_token": row.of_token,
                "mean": row.mean,
                "of_max": row.of_max,
                "n": float(row.n),
            },
            token=token_text(store.vocab, row.id),
        )
        for row in rows
    ]
    no_token = f"{query!r} is not one token of this vocabulary: try a shorter one, or --by prompt with this text."
    return found(
        store,
        by="token",
        query=text,
        rank=rank,
        hits=hits,
        total=total,
        definitions={
            "of_firings": "firings on the token as a share of the feature's firings",
            "of_token": "firings on the token as a share of its ordinary occurrences",
            "mean": "mean value over those firings",
            "of_max": "that mean as a share of the feature's largest value of that sign",
            "n": "firings on the token in the indexed text",
        },
        filters=filters,
        otherwise="No feature has it among its tokens: try --by prompt with a text around it." if ids else no_token,
    )
