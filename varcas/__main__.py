"""`python -m varcas`."""

from varcas.cli import main

if __name__ == "__main__":
    main()
