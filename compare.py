"""``python compare.py outputs/``: comparison tables over finished runs. ``python compare.py --help`` says more."""

from shared.compare.cli import main

if __name__ == "__main__":
    main()
