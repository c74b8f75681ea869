"""`python -m bagscope`."""

from bagscope.cli.app import main

if __name__ == "__main__":
    main()
