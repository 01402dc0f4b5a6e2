"""`python -m afina`."""

from afina.cli.main import main

if __name__ == "__main__":
    main()
