"""``comfyd submit``: a client for people and scripts, from a graph's file to the files that it makes."""

from comfyd.cli.submit.command import add_parser, submit_command

__all__ = ["add_parser", "submit_command"]
