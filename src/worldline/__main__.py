"""`python -m worldline`, so that `torchrun -m worldline` works too."""

from worldline.cli.main import main

if __name__ == "__main__":
    main()
