"""Finding features: by words or meaning of their labels, by a token, by a text they fire on, by another feature.

`search(address, text, by=...)` loads what a question needs; beneath it is one function for each way of asking, for who
has the store, the dictionary and the model open already. All take the same `Filters` and give the same `Found`.
"""

from autointerp.search.address import WAYS as WAYS
from autointerp.search.address import search as search
from autointerp.search.found import Found as Found
from autointerp.search.found import Hit as Hit
from autointerp.search.meaning import LabelVectors as LabelVectors
from autointerp.search.meaning import by_meaning as by_meaning
from autointerp.search.prompt import Reading as Reading
from autointerp.search.prompt import by_prompt as by_prompt
from autointerp.search.prompt import read_text as read_text
from autointerp.search.similar import by_feature as by_feature
from autointerp.search.stored import by_token as by_token
from autointerp.search.stored import by_words as by_words
