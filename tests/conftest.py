import gc
import os

gc.set_threshold(50_000, 20, 20)  # imports and compilers make millions of objects, which are walked over and stay

import pytest  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton, whose kernels run on a CPU that way


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_ignore_collect(collection_path, config):
    """Leaves tests of other tools out unless they are named: `make ecosystem` has an environment for them."""
    is_named = any("ecosystem" in str(argument) for argument in config.args)
    return True if collection_path.name == "ecosystem" and not is_named else None
