"""The suite itself."""

import warnings

import pytest


@pytest.mark.parametrize("category", [DeprecationWarning, FutureWarning, PendingDeprecationWarning])
def test_what_our_code_is_warned_of_is_an_error(category):
    """By the libraries that it calls, and nothing that they are warned of themselves."""
    for module in ("olmem.modeling_olmem", "olmem_convert.cli"):
        with pytest.raises(category, match="old"):
            warnings.warn_explicit("old", category, "file.py", 1, module)
    with pytest.warns(category, match="old"):
        warnings.warn_explicit("old", category, "file.py", 1, "transformers.trainer")
