"""`python -m rpsa.cli`: the `rpsa` command."""

from rpsa.cli import main

if __name__ == "__main__":
    main()
