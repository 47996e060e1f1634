"""One self-contained package per paper. A paper imports ``shared``, never another paper."""
