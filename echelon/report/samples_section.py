"""Sampled completions to read, their tokens coloured by what was recorded of them; the choice needs no script."""

from collections.abc import Sequence
from html import escape

from echelon.report.run_facts import RunFacts
from echelon.report.samples import SampledText

MIN_LOGPROB = -6.0
"""Nats; a token less likely than that has the strongest colour."""
MAX_SCORE = 2.0
COLOURS = (("version", "policy version"), ("score", "advantage"), ("logprob", "log-probability"))
NO_DETAIL = "This run did not record versions and log-probabilities token by token: its tokens have no colours."
HOW = (
    "Version: a colour each, by age within the completion. Advantage: the reward against its group, green above, red "
    "below, one value a completion. Log-probability: the darker, the less likely. Which tokens were accepted drafts is "
    "not recorded."
)


def samples_section(runs: Sequence[RunFacts]) -> str:
    if not any(run.samples for run in runs):
        return "<p class=note>This run has no samples.</p>"
    radios = "".join(
        f'<label><input type="radio" name="colour" id="by-{name}"{" checked" if not index else ""}> {label}</label>'
        for index, (name, label) in enumerate(COLOURS)
    )
    parts = [f'<div class="samples"><fieldset><legend>Colour tokens by</legend>{radios}</fieldset>']
    parts.append(f'<p class="note">{HOW}</p>')
    for run in runs:
        if len(runs) > 1:
            parts.append(f"<h3>{escape(run.name)}</h3>")
        if run.samples and all(sample.versions is None for sample in run.samples):
            parts.append(f'<p class="note">{NO_DETAIL}</p>')
        parts += [_sample(sample) for sample in run.samples]
    return "".join(parts) + "</div>"


def _sample(sample: SampledText) -> str:
    facts = [f"step {sample.step}", f"reward {sample.reward:.3g}", f"{sample.total:,} tokens"]
    if sample.score is not None:
        facts.append(f"advantage {sample.score:+.2f}")
    if sample.versions:
        facts.append(f"versions {min(sample.versions)} to {max(sample.versions)}")
    if sample.truncated:
        facts.append("truncated")
    more = f" … and {sample.total - len(sample.tokens):,} tokens more" if sample.total > len(sample.tokens) else ""
    return (
        f"<details><summary>{escape(' · '.join(facts))}<br><span class=prompt>{escape(_short(sample.prompt))}</span>"
        f'</summary><p class="prompt">{escape(sample.prompt)}</p><p class="text {_score_class(sample.score)}">'
        f"{_tokens(sample)}{more}</p></details>"
    )


def _short(text: str, limit: int = 100) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _tokens(sample: SampledText) -> str:
    """Neighbours that look the same share an element."""
    newest = max(sample.versions, default=0) if sample.versions else 0
    parts: list[str] = []
    before, text = "", ""
    for index, token in enumerate(sample.tokens):
        kind = ""
        if sample.versions is not None and index < len(sample.versions):
            kind = f"v{min(7, newest - sample.versions[index])}"
        if sample.logprobs is not None and index < len(sample.logprobs):
            kind += f" l{min(8, round(8 * sample.logprobs[index] / MIN_LOGPROB))}"
        if kind != before and text:
            parts.append(f'<span class="{before}">{escape(text)}</span>')
            text = ""
        before, text = kind, text + token
    return "".join([*parts, f'<span class="{before}">{escape(text)}</span>'])


def _score_class(score: float | None) -> str:
    if score is None or score == 0:
        return ""
    return f"{'good' if score > 0 else 'bad'} s{max(1, min(8, round(8 * abs(score) / MAX_SCORE)))}"
