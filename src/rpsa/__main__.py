"""`python -m rpsa`: the `rpsa` command, and what `accelerate launch -m rpsa` starts in each of its processes."""

from rpsa.cli import main

if __name__ == "__main__":
    main()
