"""From audio and text to records. Installed as `llasa_jax.data`."""
