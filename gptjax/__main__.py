"""The program: `python -m gptjax`, the command `gptjax`, and `python launch.py`."""

from gptjax.cli import malloc


def main() -> None:
    """Runs the command line of this process, and exits with its code."""
    # First, because it may start this process again, which would repeat the imports.
    malloc.use_huge_pages()
    from gptjax.cli import main as program

    program.run()


if __name__ == "__main__":
    main()
