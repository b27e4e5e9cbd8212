"""Runs the command of `jax_transfer.main` as `python -m jax_transfer`."""

from jax_transfer.main import run

if __name__ == "__main__":
    run()
