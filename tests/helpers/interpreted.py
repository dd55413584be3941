"""Triton's interpreter without what it does again and again."""

from __future__ import annotations


def patch_language_once() -> None:
    """Within a launch the interpreter makes its language ready once. By itself it looks through all names of it again
    whenever a function is called by another, which is half of its time.
    """
    try:
        import triton.language as tl
        from triton.runtime import interpreter

        patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    except (ImportError, AttributeError):  # no Triton, or one of another make
        return
    ready: set[str] = set()  # the modules of the language, in the launch that runs

    def patch_what_is_not(fn):
        modules = {module.__name__ for module in (tl, tl.core) if any(x is module for x in fn.__globals__.values())}
        if modules <= ready:
            return None  # the launch itself, which is the first, takes back what it has changed
        ready.update(modules)
        return patch(fn)

    def launch_anew(self, *args, **kwargs):
        ready.clear()
        return launch(self, *args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_what_is_not, launch_anew
