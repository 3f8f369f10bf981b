"""Constraints on outputs: compiled and turned into masks of tokens, in processes of their own.

Nothing in the engine imports the compiler, so neither a grammar that takes long nor one that brings
it down can hold up or end the engine.
"""
