"""Who judges explanations: a language model, or the rule itself. Always on windows that no explainer has seen."""
