"""The base model and its adapter: loading, families, the vision tower and its stored features, fp16, fused LoRA.

Nothing is trained or scored here. May import `core`, `config` and `data`.
"""
