"""The sinks of a run: terminal table, results.json, report.html, Markdown tables, Weights & Biases. All read one plain result document.

The modules are imported one by one (``from shared.report.terminal import claims_table``), so that no run pays for a sink it does not use.
"""
