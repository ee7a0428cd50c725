"""The one error of the feature store: a line that a person can act on."""


class StoreError(ValueError):
    """What was wrong with a store, what was expected and what to do, in one line."""
