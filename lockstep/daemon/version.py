"""The package version; coordinator and workers refuse each other when it differs."""

__version__ = "0.1.0"
