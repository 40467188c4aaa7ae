"""GGUF, the files of llama.cpp: how its blocks store weights, and what a model's names and settings are called there.

Nothing here imports the `gguf` package before it is used: it is an optional dependency.
"""
