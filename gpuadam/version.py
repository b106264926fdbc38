"""The version of the package, which checkpoints and the command line name. The build reads it from here."""

__version__ = "0.1.0"
