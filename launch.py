"""Runs gptjax from a clone of its repository, as the command `gptjax` does once it is installed.

python launch.py             trains the quickstart
python launch.py --help      explains the rest
"""

from gptjax.__main__ import main

if __name__ == "__main__":
    main()
