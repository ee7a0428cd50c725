"""Explanations of features: written by a language model or a search over rules, and scored on text unseen by it."""
