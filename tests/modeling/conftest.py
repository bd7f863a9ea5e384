import dataclasses

import pytest

try:
    from triton import language
    from triton.runtime import interpreter
except ImportError:
    interpreter = None


@pytest.fixture(autouse=True, scope="session")
def quick_interpreter():
    """Makes Triton's interpreter replace its language once a launch, not at each call inside a kernel, and leave out
    the checks of integer overflow, whose results it drops unless it debugs."""
    if interpreter is None:
        yield
        return
    launch, replace = interpreter.GridExecutor.__call__, interpreter._patch_lang
    replaced = set()

    def launch_anew(*args, **kwargs):
        replaced.clear()
        return launch(*args, **kwargs)

    def replace_once(function):
        names = {id(value) for value in function.__globals__.values() if value is language or value is language.core}
        if not names <= replaced:
            replaced.update(names)
            return replace(function)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.GridExecutor, "__call__", launch_anew)
        patch.setattr(interpreter, "_patch_lang", replace_once)
        options = dataclasses.replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
        patch.setattr(interpreter.interpreter_builder, "options", options)
        yield
