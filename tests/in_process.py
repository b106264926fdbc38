"""A command of gpuadam, or a benchmark, in this process: one of its own takes a second longer."""

import contextlib
import io
import runpy
import sys
from types import SimpleNamespace

import pytest

from gpuadam import __main__


def command(*arguments, code=0):
    """Run `gpuadam` with arguments. Return what it printed, after comparing its exit status."""
    return _ended(lambda: __main__.main(list(arguments)), ("gpuadam", *arguments), code)


def script(path, *arguments, code=0):
    """Likewise a script."""

    def call():
        runpy.run_path(str(path), run_name="__main__")

    return _ended(call, (str(path), *arguments), code)


def _ended(call, argv, code):
    out, error = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        patch.setattr(sys, "argv", list(argv))
        try:
            status = call() or 0
        except SystemExit as ended:
            status = ended.code or 0
    done = SimpleNamespace(stdout=out.getvalue(), stderr=error.getvalue())
    assert status == code, done.stdout + done.stderr
    return done
