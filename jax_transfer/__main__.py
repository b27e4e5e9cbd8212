"""Runs the command line of `jax_transfer.main`, so that `python -m jax_transfer` works."""

from jax_transfer.main import run

if __name__ == "__main__":
    run()
