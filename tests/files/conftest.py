from tests.tier.conftest import disk_folder  # noqa: F401
