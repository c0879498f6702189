"""`python -m broker` is the command `isthmus`."""

from broker.cli.main import main

if __name__ == "__main__":
    main()
