"""``python run.py paper=<name>``: check a paper's numbers. ``python run.py --help`` lists papers, devices and keys."""

from shared.runner.cli import main

if __name__ == "__main__":
    main()
