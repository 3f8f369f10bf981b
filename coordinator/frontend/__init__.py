"""The frontend: validation, tokenising, chat templates, detokenising and client streams."""
