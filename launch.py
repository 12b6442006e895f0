"""Runs gptjax from a clone of its repository. An installed gptjax has the command `gptjax` instead.

python launch.py             trains the quickstart
python launch.py --help      explains the modes and flags
"""

from gptjax.__main__ import main

if __name__ == "__main__":
    main()
