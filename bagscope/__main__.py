"""`python -m bagscope`."""

from bagscope.cli.entry import main

if __name__ == "__main__":
    main()
