"""`python -m jax_awq`: see `python -m jax_awq --help`."""

import sys


def main() -> int:
    try:
        from jax_awq.cli import app
    except ImportError as error:
        if error.name not in ("typer", "rich"):
            raise
        print(f"python -m jax_awq needs {error.name}: pip install 'jax_awq[cli]'", file=sys.stderr)
        return 1
    app(prog_name="python -m jax_awq")
    return 0


if __name__ == "__main__":
    sys.exit(main())
