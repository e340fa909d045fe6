"""Delta checkpoints: a fine-tune or a merge kept as a small difference from its base, and read as a model.

A pack is a folder with `delta.safetensors` and `weft_delta.json`; docs/deltas.md says what they hold. Every way of
writing a difference down is one module: `exact`, `sparse`, `lowrank`, `onebit`, `quantised`. Each declares the
stored parts once, for the writer and the reader alike.
"""
