"""The commands of `python -m gpuadam`.

A command is a module or a package of this folder that has

    HELP                   its line in `python -m gpuadam --help`
    add_options(parser)    adds its options to an `argparse.ArgumentParser`
    run(options)           does the work and returns the exit status

`gpuadam/__main__.py` finds it, so a new command is one new file. Every command has the option `--json` without adding it. An
error that the user can mend is a `CommandError`. Nothing but the standard library, NumPy and gpuadam is imported before `run`:
`terminal.output.need` imports an optional package, or says how to install it.

`gpuadam/terminal/` has what the commands share with the examples: types of options, tables, files and figures. `measuring/` is
shared with the scripts in benchmarks/.
"""
