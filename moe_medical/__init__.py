"""Train medical LLMs as mixtures of low-rank experts (MoLoRA) over many imbalanced tasks."""

__version__ = "0.1.0"
