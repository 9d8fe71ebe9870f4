# SPDX-License-Identifier: GPL-2.0-or-later
"""argparse with errors that help: one sentence, and the nearest right spelling."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from vhostblk.cli.errors import USAGE, CliError

_LONGEST_WAIT = 1e6  # more than a week: nobody means more
_MOST_DIGITS = 9
_VALUE_OF_A_FLAG = re.compile(r"argument (\S+): ignored explicit argument ")


class Parser(argparse.ArgumentParser):
    """An argument parser for one subcommand."""

    def __init__(self, **kwargs: Any) -> None:
        # Abbreviations would turn every new option into a break of old scripts.
        super().__init__(
            allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs
        )

    def error(self, message: str) -> NoReturn:
        if given := _VALUE_OF_A_FLAG.match(message):
            message = f"option {given[1]} takes no value"
        raise CliError(f"{message} (see '{self.prog} --help')", status=USAGE)

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        # `--state "$UNSET"` is a mistake of the caller, and nowhere is "" a useful value.
        if not arg_string and action.nargs != argparse.PARSER:
            raise argparse.ArgumentError(action, "the value may not be empty")
        return super()._get_value(action, arg_string)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = [str(choice) for choice in action.choices]
            text = f"'{value}' is not one of {', '.join(known)}{did_you_mean(str(value), known)}"
            raise argparse.ArgumentError(action, text)

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> argparse.Namespace:
        """As argparse's, with a suggestion for an unknown option."""
        parsed: argparse.Namespace
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            first = next((word for word in unknown if word.startswith("-")), unknown[0])
            option = first.split("=")[0]
            if option.startswith("-"):
                hint = did_you_mean(option, self._option_string_actions)
                self.error(f"unknown option '{option}'{hint}")
            self.error(f"unexpected argument '{first}'")
        return parsed


def seconds(text: str) -> float:
    """A time to wait, as a `type` of an option."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= _LONGEST_WAIT:
        raise argparse.ArgumentTypeError(
            f"'{text}' is not a number of seconds from 0 to {_LONGEST_WAIT:g}"
        )
    return value


def number(text: str) -> int:
    """A number from 1 on, as a `type` of an option."""
    if not text.isdecimal() or not text.isascii() or len(text) > _MOST_DIGITS or not int(text):
        raise argparse.ArgumentTypeError(
            f"'{text}' is not a number from 1 on of at most {_MOST_DIGITS} digits"
        )
    return int(text)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A suggestion to append to an error, or nothing."""
    import difflib  # only when something is wrong: costs start-up time

    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean '{near[0]}'?" if near else ""


class Step(argparse.Action):
    """Collects options with their values in the order they were written."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        steps = list(getattr(namespace, "steps", None) or [])
        steps.append((option_string or self.option_strings[0], values))
        namespace.steps = steps
