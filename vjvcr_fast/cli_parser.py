"""argparse for people: an error is one line that proposes the word that was meant, and help has an option's two names.

The option of a field has up to four spellings, `--train.log_every`, `--train.log-every`, `--log_every`, `--log-every`.
"""

import argparse
import difflib
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from vjvcr_fast.settings import ConfigError, meant


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line on stderr and exit code 2.

    on_help: called with the options given so far, before help is shown. It may raise ConfigError.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(formatter_class=_Formatter, allow_abbrev=False, add_help=False, **settings)
        self.on_help: Callable[[argparse.Namespace], None] = lambda given: None
        self.add_argument("-h", "--help", action=_Help, nargs=0, default=argparse.SUPPRESS, help="show this and end")

    def error(self, message: str) -> NoReturn:
        """Prints one line on stderr and ends with exit code 2."""
        print(f"{self.prog}: {message}", file=sys.stderr)
        sys.exit(2)

    def reject(self, unknown: list[str]) -> NoReturn:
        """Ends with the unknown option, the nearest ones that exist, and where all are listed."""
        name = next((u for u in unknown if u.startswith("-")), unknown[0]).split("=")[0]
        near, options = dict[str, str](), self._option_string_actions
        for spelling in difflib.get_close_matches(name.lower(), options, n=8):
            near.setdefault(options[spelling].dest, spelling)
        hint = f"did you mean {' or '.join([*near.values()][:3])}? " if near else ""
        what = "no such option" if name.startswith("-") else "unexpected argument"
        self.error(f"{name}: {what}; {hint}`{self.prog} --help` lists all")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """argparse's own: refuses what is not one of an argument's choices, a command too."""
        if action.choices is not None and value not in action.choices:
            words = [*map(str, action.choices)]
            wrong = f"{value!r}: must be one of {', '.join(words)}{meant(value, words)}"
            raise argparse.ArgumentError(action, wrong)


def help_last(arguments: list[str]) -> list[str]:
    """The arguments with a request for help at the end, so that help knows all others: the preset, for example."""
    others = [a for a in arguments if a not in ("-h", "--help")]
    return others if others == arguments else [*others, "--help"]


class _Help(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, *_: Any) -> None:
        assert isinstance(parser, Parser)
        try:
            parser.on_help(namespace)
        except ConfigError as error:
            parser.error(str(error))
        parser.print_help()
        parser.exit()


class _Formatter(argparse.HelpFormatter):
    def _format_action_invocation(self, action: argparse.Action) -> str:
        """argparse's own: an option's names in help. Of a field's: `--train.log_every, --log-every X`."""
        if "." not in action.dest:
            return super()._format_action_invocation(action)
        usual = [name for name in action.option_strings if ("-" if "." in name else "_") not in name[2:]]
        return f"{', '.join(usual)} {action.metavar}"
