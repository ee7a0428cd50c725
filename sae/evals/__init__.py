"""Metrics of a dictionary, one a file; `sae.evals.suite` runs them into eval.json."""
