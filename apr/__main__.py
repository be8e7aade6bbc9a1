"""`python -m apr`: the same as the `apr` command."""

from apr.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
