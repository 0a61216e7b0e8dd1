"""ftcore: fine-tuning of large language models with proof at every step. This package knows no Ray."""

__version__ = "0.1.0"
