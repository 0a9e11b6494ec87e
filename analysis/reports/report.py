"""One experiment for a reader: a self-contained HTML page, and the same in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from analysis.numbers.formatting import (
    NOT_MEASURED,
    glued,
    interval_text,
    load_label,
    percent,
    value_text,
    words,
)
from analysis.reports.figures_of_rates import ratio_strip
from analysis.reports.replica_tables import imbalance_table, rates_table
from analysis.reports.report_figures import calibration_group, figure_groups
from analysis.reports.report_tables import (
    Table,
    assumed_table,
    checks_table,
    fidelity_table,
    from_paper_table,
    identity_table,
    near_critical_table,
    numbers_table,
    others_table,
    record_tables,
    runs_table,
    step_time_table,
    trust_tables,
)
from analysis.reports.waves_in_report import waves_table
from analysis.schedulers.frames import RunFrames
from analysis.verdicts.verdict import Verdict

RULES = {
    "confirmed": "The 90 % interval of measured / predicted lies inside 1 ± {theta}, a valid run "
    "below the predicted rate is stable and one above it grows.",
    "refuted": "The 95 % interval of measured / predicted lies outside 1 ± {theta}.",
    "inconclusive": "The data neither confirm nor refute the prediction within {theta}.",
    "premise_violated": "The claim would be refuted, but a premise of it failed by its own "
    "threshold, and the model with that mechanism lands within {theta}.",
    "invalid": "The load that was offered is not the one that was claimed, or records are damaged. "
    "Nothing is concluded.",
}
PREMISES_NOTE = (
    "The premises of the claim, each with its numeric threshold; their tests use limits and "
    "occupancy, never the drift."
)
AUDIT_NOTE = "Do records, counters and conservation laws agree with each other?"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportContext:
    """What a report shows beside the verdict and the runs.

    ``created`` is an ISO date and time. ``missing`` says in sentences which records the folder
    lacks.
    """

    title: str
    created: str
    environment: Mapping[str, Any]
    limits: Mapping[str, Any]
    calibration: Mapping[str, Any] | None
    config: str
    missing: tuple[str, ...] = ()
    workload: Mapping[str, Any] | None = None
    to_raise: str = ""
    """What binds, what raising it gives, and what binds next."""


def report_html(verdict: Verdict, runs: Sequence[RunFrames], context: ReportContext) -> str:
    """The report as one HTML page without scripts or outside resources.

    Runs are matched to their judgements by id; a judged run without frames, and what ``context``
    lists as missing, is stated.
    """
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["glued"] = glued
    source = files("analysis.reports").joinpath("report.html.j2").read_text(encoding="utf-8")
    return environment.from_string(source).render(
        verdict=verdict,
        context=context,
        outcome=words(verdict.outcome),
        rule=rule_of(verdict),
        facts=_facts(verdict),
        binding=_binding(verdict, context),
        strip=_strip(verdict),
        groups=[*figure_groups(verdict, runs), *calibration_group(context.calibration)],
        missing=_missing(verdict, runs, context),
        warnings=warnings_of(verdict),
        tables=_tables(verdict),
        inputs=_inputs(context),
    )


def report_md(verdict: Verdict, context: ReportContext) -> str:
    """The report's text and tables in Markdown."""
    lines = [f"# {context.title}", "", f"critrate, {context.created}. {verdict.mode}".strip(), ""]
    lines += [f"## {words(verdict.outcome)}: {verdict.headline}", "", rule_of(verdict), ""]
    for name, value, interval, how in _facts(verdict):
        lines.append(f"- **{name}**: {value} {interval} ({how})")
    lines += [f"- {_binding(verdict, context)}", ""]
    for title, sentences in (
        ("Reasons", verdict.reasons),
        ("Advice", verdict.advice),
        ("Warnings", warnings_of(verdict)),
        ("Missing", _missing(verdict, None, context)),
    ):
        if sentences:
            lines += [f"### {title}", "", *(f"- {s}" for s in sentences), ""]
    for table in (*_tables(verdict), *_inputs(context)):
        lines += _markdown_table(table)
    fence = "`" * max(3, _longest_backticks(context.config) + 1)
    lines += ["## Configuration", "", f"{fence}yaml", context.config.rstrip(), fence, ""]
    return "\n".join(lines)


def rule_of(verdict: Verdict) -> str:
    """What the outcome means, in one sentence."""
    return RULES[verdict.outcome].format(theta=percent(verdict.theta, None))


def _binding(verdict: Verdict, context: ReportContext) -> str:
    to_raise = f" To raise it: {context.to_raise}." if context.to_raise else ""
    return binding_sentence(verdict) + to_raise


def binding_sentence(verdict: Verdict) -> str:
    """Which ceiling the prediction says binds, and which one the runs showed."""
    predicted = f"The prediction says that {words(verdict.binding)} binds"
    if verdict.binding_observed is None:
        return f"{predicted}; the runs do not show what binds."
    if verdict.binding_observed == verdict.binding:
        return f"{predicted}, and under overload it did."
    return f"{predicted}; under overload {words(verdict.binding_observed)} did."


def warnings_of(verdict: Verdict) -> tuple[str, ...]:
    """Warnings of the experiment and of its runs, each once, the run named."""
    own = [f"{run.id}: {warning}" for run in verdict.runs for warning in run.warnings]
    return tuple(dict.fromkeys((*verdict.waves, *verdict.warnings, *own)))


def _facts(verdict: Verdict) -> list[tuple[str, str, str, str]]:
    """Name, value, interval, method of the three numbers at the top and the GAP."""
    facts = [("Predicted", *_parts(verdict.predicted))]
    facts.append(("Measured", *_parts(verdict.measured)))
    facts.append(("Measured / predicted", *_parts(verdict.ratio)))
    distance = NOT_MEASURED if verdict.gap is None else percent(verdict.gap)
    facts.append(("GAP", distance, "", "|predicted - measured| / measured"))
    return facts


def _parts(estimate: Any) -> tuple[str, str, str]:
    if estimate is None:
        return NOT_MEASURED, "", "see the reasons"
    level = "" if estimate.level == 1.0 else f"{percent(estimate.level, None)} interval; "
    return value_text(estimate), interval_text(estimate), f"{level}{estimate.method}"


def _strip(verdict: Verdict) -> Markup | None:
    if verdict.ratio is None:
        return None
    return Markup(ratio_strip(verdict.ratio, verdict.theta))


def _missing(
    verdict: Verdict, runs: Sequence[RunFrames] | None, context: ReportContext
) -> tuple[str, ...]:
    sentences = list(context.missing)
    if verdict.measured is None:
        sentences.append("No critical rate was measured.")
    if verdict.ratio is None:
        sentences.append("Without it there is no ratio of measured to predicted.")
    if context.calibration is None:
        sentences.append("There is no calibration record.")
    for run in verdict.runs:
        if run.completed == 0:
            sentences.append(f"Run {run.id} (load {load_label(run.load)}) completed no request.")
    if runs is not None:
        have = {frames.run.id for frames in runs}
        lost = [run.id for run in verdict.runs if run.id not in have]
        sentences += [
            f"The records of run {name} are not here, so no figure shows it." for name in lost
        ]
        if runs and all(frames.gpu.empty for frames in runs):
            sentences.append("No GPU was sampled, so no figure shows one.")
    return tuple(sentences)


def _tables(verdict: Verdict) -> list[Table]:
    tables = [
        numbers_table(verdict),
        runs_table(verdict.runs),
        *([rates_table(verdict), imbalance_table(verdict)] if verdict.replicas else []),
        *([near_critical_table(verdict.near_critical)] if verdict.near_critical else []),
        *([waves_table(verdict.synchrony)] if verdict.synchrony else []),
        assumed_table(verdict),
        checks_table("Premises of the claim", verdict.premises, PREMISES_NOTE),
        checks_table("Audit", verdict.audit, AUDIT_NOTE),
        from_paper_table(verdict),
        identity_table(verdict),
        others_table(verdict),
        fidelity_table(verdict.runs),
    ]
    return tables


def _inputs(context: ReportContext) -> list[Table]:
    tables = record_tables("Limits read back from the server", context.limits)
    if context.workload is not None:
        tables += record_tables("Workload", context.workload)
    if context.calibration is not None:
        law = step_time_table(context.calibration)
        tables += [law] if law is not None else []
        tables += trust_tables(context.calibration)
        tables += record_tables("Calibration", context.calibration)
    return tables + record_tables("Environment", context.environment)


def _markdown_table(table: Table) -> list[str]:
    lines = [f"## {table.title}", ""]
    if table.note:
        lines += [table.note, ""]
    if not table.rows:
        return [*lines, "Nothing was recorded here.", ""]
    lines.append(_markdown_row(table.header))
    lines.append("|" + " --- |" * len(table.header))
    for row in table.rows:
        padded = (f"**{row[0]}**",) + ("",) * (len(table.header) - 1) if len(row) == 1 else row
        lines.append(_markdown_row(padded))
    return [*lines, ""]


def _markdown_row(cells: Sequence[str]) -> str:
    escaped = (c.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ") for c in cells)
    return "| " + " | ".join(escaped) + " |"


def _longest_backticks(text: str) -> int:
    longest = run = 0
    for character in text:
        run = run + 1 if character == "`" else 0
        longest = max(longest, run)
    return longest
