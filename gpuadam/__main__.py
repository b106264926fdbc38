"""python -m gpuadam COMMAND: the commands are the modules of `gpuadam/cli/`."""

import argparse
import importlib
import pkgutil
import sys

from . import __version__, cli
from .terminal.arguments import writable
from .terminal.output import ending_plainly


@ending_plainly("gpuadam")
def main(argv=None):
    """Run a command and return its exit status."""
    parser = argparse.ArgumentParser(prog="gpuadam", description="The fused Adam update: try it, time it, check it.")
    parser.add_argument("--version", action="version", version=f"gpuadam {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    for _, name, _ in pkgutil.iter_modules(cli.__path__):
        module = importlib.import_module(f"{cli.__name__}.{name}")
        if hasattr(module, "run"):
            command = commands.add_parser(name, help=module.HELP)
            module.add_options(command)
            command.add_argument(
                "--json", type=writable, metavar="FILE", help="write the result as JSON; - for standard output"
            )
            command.set_defaults(run=module.run, parser=command)
    options, unknown = parser.parse_known_args(argv)
    if unknown:
        options.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    with ending_plainly(f"gpuadam {options.command}"):
        return options.run(options)


if __name__ == "__main__":
    sys.exit(main())
