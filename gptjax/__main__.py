"""The start of the program, for `python -m gptjax`, the command `gptjax`, and `launch.py`."""

from gptjax.cli import malloc


def main() -> None:
    """Runs the command line of this process, and exits with the exit code of the command."""
    # `use_huge_pages` is called before the other imports, because it may restart Python, which
    # would then do these imports twice.
    malloc.use_huge_pages()
    from gptjax.cli import main as program

    program.run()


if __name__ == "__main__":
    main()
