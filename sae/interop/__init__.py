"""Dictionaries in the files of other tools: one module a format, each with `read`, and `write` where we can give back.

A dictionary comes out as one of `sae.registry`, float32, with everything folded in that the format keeps apart (scales,
biases that are not centred, norms), so that the rest never knows where it came from. `sae.interop.detect` tells formats
apart by their files; `sae.load_sae` asks it. Foreign files are untrusted: see `sae.interop.tensors`.
"""
