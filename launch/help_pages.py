"""Help pages whose lists of commands say the whole first sentence of each, on as many lines as it takes; click cuts it
off at the width of the terminal.
"""

import click


class Group(click.Group):
    """A command with commands of its own."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of commands."""
        commands = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        rows = [(name, one.get_short_help_str(limit=1000)) for name, one in commands if one and not one.hidden]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


Group.group_class = Group  # of groups in groups
