"""Between Hugging Face's formats and ours. Installed as `llasa_jax.convert`."""
