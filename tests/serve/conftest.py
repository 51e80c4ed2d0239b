from served import model, new_speaker, served  # noqa: F401
