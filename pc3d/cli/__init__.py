"""The command line: ``pc3d <command>``; one module per command."""

from pc3d.cli.app import main

__all__ = ["main"]
