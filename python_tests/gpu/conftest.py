"""Tests of a GPU (--device cuda), or, in a dry run of gpu_check.py, of the SIMT engine; a CPU has nothing here."""


def pytest_ignore_collect(collection_path, config):
    return True if config.getoption("--device") == "cpu" and collection_path.name.startswith("test_") else None
