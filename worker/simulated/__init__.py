"""A worker without a model: the real worker's protocol and tables, tokens from a pure function."""
