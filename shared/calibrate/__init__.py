"""Device models held against silicon: micro-benchmarks, a fit of few physical figures, and its error on models outside the fit.

``python run.py calibrate=cpu`` (or ``cuda``) measures this machine and writes ``conf/device/<id>.yaml`` and
``results/calibration/<id>.json``. ``points`` are the micro-benchmarks, ``models`` the held-out ones, ``measure`` times both (it needs
nothing but torch and timm), ``fit`` finds the figures, ``validate`` their error, ``devicefile`` and ``table`` write what was found.
"""
