"""A voice behind an address: OpenAI's speech endpoint over one `Speaker` (the extra `serve`)."""
