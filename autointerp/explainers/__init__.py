"""Who writes explanations: a language model, or a search over simple rules."""
