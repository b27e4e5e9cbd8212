"""python -m jax_transfer: the command of `jax_transfer.main`."""

from jax_transfer.main import run

if __name__ == "__main__":
    run()
