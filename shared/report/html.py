"""``report.html``: one self-contained page made from the result document alone. It opens from the disk and asks for no network."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.report import format as fmt
from shared.report import plots
from shared.report.document import write_atomic

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

_ASSETS = Path(__file__).with_name("assets")
_MIME = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg"}


def write_html(document: Mapping[str, Any], folder: Path | str) -> Path:
    """Write ``report.html`` into ``folder``, where the pictures of the document lie, and return its path.

    A plot that cannot be drawn or a picture that is missing is said so in its place. Raises :class:`shared.errors.UserError`
    when the file cannot be written.
    """
    folder = Path(folder)
    return write_atomic(folder / "report.html", render(document, folder))


def render(document: Mapping[str, Any], folder: Path) -> str:
    """The page as text. All text of the document is escaped by the template engine; only our own SVG, CSS and script are not."""
    rows = list(document.get("claims", []))
    claims = [row for row in rows if row.get("kind", "claim") == "claim"]
    findings = [row for row in rows if row.get("kind", "claim") != "claim"]
    claims_plot, claims_problem = _plot(plots.claims_svg, rows)
    return (
        templates()
        .get_template("report.html.j2")
        .render(
            schema_version=document.get("schema_version"),
            paper=document.get("paper", ""),
            title=document.get("title") or document.get("paper", ""),
            facts=list(_facts(document)),
            lead=_lead(claims),
            counts=fmt.counts({"claims": claims}),
            finding_counts=fmt.counts({"claims": findings}),
            warnings=list(_warnings(rows)),
            claims=[claim_view(row) for row in claims],
            findings=[claim_view(row) for row in findings],
            claims_plot=claims_plot,
            claims_problem=claims_problem,
            not_drawn=", ".join(str(row["id"]) for row in rows if plots.ratio(row) is None),
            measurements=[_measurement(item) for item in document.get("measurements", [])],
            pictures=[_picture(item, folder) for item in document.get("pictures", [])],
            sensitivities=list(_sensitivities(rows)),
            notes=document.get("notes", []),
            environment=list(_flat(document.get("environment") or {})),
            config=yaml_text(document.get("config") or {}),
            **assets("report.js"),
        )
    )


def assets(*scripts: str) -> dict[str, Markup]:
    """What every page carries inside itself: the style sheet, its scripts as one, and their hash for the page's own policy."""
    from markupsafe import Markup

    script = "".join((_ASSETS / name).read_text(encoding="utf-8") for name in scripts)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    css = (_ASSETS / "report.css").read_text(encoding="utf-8")
    return {"css": Markup(css), "script": Markup(script), "script_hash": Markup(f"sha256-{digest}")}


@lru_cache(maxsize=1)
def templates() -> Environment:
    """The templates of all pages: escaping, and strict about names."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_ASSETS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=False,
        newline_sequence="\n",
    )
    environment.filters["slug"] = lambda verdict: str(verdict).replace(" ", "-")
    environment.filters["glyph"] = lambda verdict: fmt.GLYPHS.get(verdict, "?")
    return environment


def _facts(document: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    environment = document.get("environment") or {}
    commit = str(environment.get("commit") or "unknown")[:10]
    yield "Device", str(document.get("device", ""))
    yield "Scale", str(document.get("scale", ""))
    yield "Seed", str(document.get("seed", ""))
    yield "Run on", fmt.machine(document)
    yield "Commit", commit + (" + local changes" if environment.get("dirty") else "")
    yield "Started", fmt.date(document.get("started"))
    yield "Took", fmt.duration(document.get("seconds"))


def _lead(claims: Sequence[Mapping[str, Any]]) -> str:
    """The headline in one sentence: how many of the paper's claims hold."""
    if not claims:
        return "No claim of the paper was run"
    found = fmt.counts({"claims": claims})
    untested = found.get("not tested", 0)
    sentence = f"{found.get('replicated', 0)} of {len(claims)} claims replicated"
    return sentence + (f", {untested} not tested" if untested else "")


def _warnings(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str, str]]:
    """Colour, heading and text of what a reader must not miss."""
    passed = [str(row["id"]) for row in rows if (row.get("control") or {}).get("ok") is False]
    if passed:
        text = "with the paper's idea switched off the claim still holds, so it does not show that the idea works"
        yield "not-replicated", ", ".join(passed), text
    suspicious = [str(row["id"]) for row in rows if row.get("suspicious")]
    if suspicious:
        yield "direction-only", ", ".join(suspicious), "far better than the paper's number, so look for a mistake first"


def claim_view(row: Mapping[str, Any]) -> dict[str, Any]:
    """What one row of a claims table shows."""
    ours, _, bounds = fmt.ours(row).partition(" [")
    stated, verdict, control = fmt.stated_value(row), row.get("verdict"), row.get("control") or {}
    seeds = row.get("n_seeds") or 1
    return {
        "id": str(row["id"]),
        "anchor": str(row["id"]),
        "statement": row.get("statement") or "",
        "verdict": verdict,
        "rank": fmt.VERDICTS.index(verdict) if verdict in fmt.VERDICTS else len(fmt.VERDICTS),
        "reason": row.get("reason") if verdict != "replicated" else None,
        "stated": fmt.stated(row),
        "stated_label": "Paper" if row.get("kind", "claim") == "claim" else "Stated",
        "stated_sort": _sort_key(stated[0] if isinstance(stated, list | tuple) else stated),
        "recalled": fmt.is_recalled(row),
        "ours": ours,
        "ours_sort": _sort_key(row.get("value")),
        "interval": f"[{bounds}" if bounds else "",
        "evidence": row.get("evidence") or "",
        "seeds": f"{seeds} seeds" if seeds > 1 else "",
        "source": row.get("source") or "",
        "suspicious": bool(row.get("suspicious")),
        "control_passed": control.get("ok") is False,
        "control": fmt.control_text(row),
        "more": list(_more(row)),
    }


def _more(row: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The folded details of a row; entries without a value are left out by the template."""
    yield "Verdict", str(row.get("reason") or "") if row.get("verdict") == "replicated" else ""
    yield "How", str(row.get("note") or "")
    yield "Tolerance", fmt.tolerance(row)
    yield "Control", fmt.control_text(row)
    conditions = row.get("conditions") or {}
    yield "Conditions", ", ".join(f"{key}: {value}" for key, value in _flat(conditions))
    values = row.get("values") or []
    unit = fmt.unit_for(row.get("unit"), row.get("value"))
    yield "Each seed", ", ".join(unit.text(value) for value in values) if len(values) > 1 else ""
    yield "Reference", str(row.get("ref") or "")
    yield "Provenance", str(row.get("tag") or "")
    took = "from the cache" if row.get("from_cache") else fmt.duration(row.get("seconds"))
    yield "Experiment", f"{row['experiment']}, {took}" if row.get("experiment") else ""


def _plot(make: Callable[[Any], str | None], content: Any) -> tuple[Markup | None, str | None]:
    """The SVG of ``content``, or what went wrong: one plot must never cost the report of a long run."""
    from markupsafe import Markup

    try:
        plot = make(content)
    except Exception as error:
        return None, str(error) or type(error).__name__
    return (Markup(plot) if plot else None), None


def _measurement(item: Mapping[str, Any]) -> dict[str, Any]:
    plot, problem = _plot(plots.measurement_svg, item)
    return {
        "title": item.get("title") or item.get("name") or "",
        "experiment": item.get("experiment") or "",
        "note": item.get("note"),
        "plot": plot,
        "problem": problem,
        "table": table(item.get("rows", [])),
    }


def table(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Columns and cells of a table of plain values; a column is numeric when all its values are."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    numeric = {name: all(_is_number(row.get(name)) for row in rows if row.get(name) is not None) for name in names}
    return {
        "columns": [{"name": name, "numeric": numeric[name]} for name in names],
        "rows": [
            [
                {"text": _cell(row.get(name)), "numeric": numeric[name], "sort": _sort_key(row.get(name))}
                for name in names
            ]
            for row in rows
        ],
    }


def _sensitivities(rows: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    for row in rows:
        if row.get("sensitivity"):
            plot, problem = _plot(plots.sensitivity_svg, row)
            items = {"id": row["id"], "verdict": row.get("verdict"), "table": table(row["sensitivity"])}
            yield items | {"plot": plot, "problem": problem}


def _picture(item: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    path = (folder / str(item.get("file"))).resolve()
    data = None
    if path.is_relative_to(folder.resolve()) and path.suffix.lower() in _MIME and path.is_file():
        data = f"data:{_MIME[path.suffix.lower()]};base64,{base64.b64encode(path.read_bytes()).decode()}"
    return {
        "title": item.get("title") or item.get("name") or "",
        "experiment": item.get("experiment") or "",
        "note": item.get("note"),
        "file": item.get("file"),
        "data": data,
    }


def _flat(mapping: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Nested dictionaries as ``outer.inner`` pairs of text, None left out."""
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            yield from ((f"{key}.{inner}" if key != "versions" else inner, text) for inner, text in _flat(value))
        elif value is not None:
            yield str(key), _cell(value)


def yaml_text(config: Mapping[str, Any]) -> str:
    """A configuration for people to read."""
    import yaml

    return yaml.safe_dump(dict(config), allow_unicode=True, sort_keys=False).strip()


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or isinstance(value, int | float):
        return fmt.number(value)
    if isinstance(value, list | tuple):
        return ", ".join(_cell(item) for item in value)
    return str(value)


def _sort_key(value: Any) -> str:
    if value is None:
        return ""
    return repr(value) if _is_number(value) else str(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
