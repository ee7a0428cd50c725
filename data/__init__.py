"""Texts, tokens and the feature store; import the submodule you need (`data.corpora`, `data.tokens`, `data.store`)."""
