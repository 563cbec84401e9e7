"""Where the `retain` command begins (also `python -m retain`): signals are watched before anything heavy is imported."""

from __future__ import annotations

from retain import signals


def main() -> None:
    """Entry point of the `retain` command."""
    signals.watch()
    from retain import cli

    cli.main()


if __name__ == "__main__":
    main()
