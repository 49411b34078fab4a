"""GPT models in JAX and Flax: data, training, fine-tuning, sampling and serving."""

__version__ = "0.2.0"
