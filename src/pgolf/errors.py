"""What can go wrong, sorted by who has to act. Each message is one sentence for a person."""


class PgolfError(Exception):
    """Base of all errors that a command reports in one line, without a traceback."""

    exit_code = 1


class Refused(PgolfError):
    """The submission breaks a rule."""

    exit_code = 1


class UsageError(PgolfError):
    """The command was called with something that cannot work."""

    exit_code = 2


class EnvironmentBroken(PgolfError):
    """The machine or the data is not fit to give a score; says nothing about the submission."""

    exit_code = 3
