from tests.running import settled  # noqa: F401
