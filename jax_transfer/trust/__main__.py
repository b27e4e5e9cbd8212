"""Runs the command of `jax_transfer.trust.command`."""

from jax_transfer.trust.command import main

if __name__ == "__main__":
    main()
