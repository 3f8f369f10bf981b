"""What every daemon does the same way. Leaf modules: standard library only, importable by all."""
