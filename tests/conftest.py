"""What holds for the whole suite: drawn examples are the same on every run and may take their time."""

from hypothesis import settings

settings.register_profile("suite", deadline=None, derandomize=True, database=None, max_examples=40)
settings.load_profile("suite")
