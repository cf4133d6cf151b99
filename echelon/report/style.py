"""The page's style sheet: everything coloured is a variable that light and dark each set."""

_COLOURS = {
    "light": ("#0969da", "#bc4c00", "#1a7f37", "#8250df", "#bf3989", "#0f766e", "#9a6700", "#57606a"),
    "dark": ("#58a6ff", "#f0883e", "#3fb950", "#bc8cff", "#f778ba", "#2dd4bf", "#d29922", "#8b949e"),
}
_PLAIN = {
    "light": "--bg:#fff;--fg:#1f2328;--dim:#59636e;--rule:#e4e7eb;--box:#f6f8fa;--good:#1a7f37;--bad:#cf222e",
    "dark": "--bg:#0d1117;--fg:#e6edf3;--dim:#9198a1;--rule:#272d36;--box:#151b23;--good:#3fb950;--bad:#ff7b72",
}


def _variables(mode: str) -> str:
    return _PLAIN[mode] + "".join(f";--c{index}:{colour}" for index, colour in enumerate(_COLOURS[mode]))


_SERIES = "".join(f".c{index}{{--c:var(--c{index})}}" for index in range(8))
_STRENGTHS = "".join(f".s{level}{{--s:{level / 8}}}" for level in range(1, 9))
_VERSIONS = "".join(
    f".samples:has(#by-version:checked) .v{index}{{background:color-mix(in srgb,var(--c{index}) 28%,transparent)}}"
    for index in range(8)
)
_LOGPROBS = "".join(
    f".samples:has(#by-logprob:checked) .l{level}{{background:color-mix(in srgb,var(--bad) {level * 9}%,transparent)}}"
    for level in range(1, 9)
)

STYLE = f"""
:root{{color-scheme:light dark;{_variables("light")}}}
@media(prefers-color-scheme:dark){{:root{{{_variables("dark")}}}}}
*{{box-sizing:border-box}}
body{{margin:0 auto;max-width:1400px;padding:1rem 1.5rem 4rem;background:var(--bg);color:var(--fg);
 font:15px/1.5 system-ui,sans-serif}}
h1{{font-size:1.6rem;margin:.5rem 0 0}} h2{{font-size:1.2rem;margin:2.2rem 0 .6rem;border-bottom:1px solid var(--rule)}}
h3{{font-size:1rem;margin:1rem 0 .3rem}} header p{{color:var(--dim);margin:.2rem 0}}
nav{{display:flex;flex-wrap:wrap;gap:.3rem 1rem;margin:.8rem 0}} a{{color:var(--c0)}}
.notes{{background:var(--box);border-left:3px solid var(--c1);padding:.5rem 1rem .5rem 2rem;margin:.6rem 0}}
.grid{{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,430px),1fr));gap:1rem}}
figure{{margin:0;padding:.7rem;background:var(--box);border:1px solid var(--rule);border-radius:6px;min-width:0}}
.wide{{margin-bottom:1rem}}
figcaption{{font-weight:600}} .unit{{font-weight:400;color:var(--dim);font-size:.87rem;margin-left:.3rem}}
svg{{display:block;width:100%;height:auto}} svg text{{fill:var(--dim);font:12px system-ui,sans-serif}}
svg .label{{fill:var(--fg)}}
.rule{{stroke:var(--rule);fill:none}} .axis{{stroke:var(--dim);fill:none}}
.line{{stroke:var(--c);fill:none;stroke-width:1.7;stroke-linejoin:round}} .line.dashed{{stroke-dasharray:5 4}}
.band{{fill:var(--c);opacity:.18}} .dot,.area{{fill:var(--c)}} .area{{fill-opacity:var(--s,.85)}}
.busy,.bound,.wait,.other,.away{{fill:var(--c);fill-opacity:var(--s,.85)}}
.busy{{--c:var(--c2)}} .bound{{--c:var(--c7)}} .wait{{--c:var(--c1)}} .other{{--c:var(--c4)}} .away{{--c:var(--bad)}}
.legend{{display:flex;flex-wrap:wrap;gap:.1rem .9rem;font-size:.85rem}}
.key{{display:flex;align-items:center;gap:.35rem}}
.key i{{width:14px;height:10px;border-radius:2px;background:var(--c)}}
.key i.dashed{{background:repeating-linear-gradient(90deg,var(--c) 0 4px,transparent 4px 7px)}}
.note{{color:var(--dim);font-size:.85rem;margin:.3rem 0 0}} .alarm{{color:var(--bad);font-weight:600}}
table{{border-collapse:collapse;font-size:.9rem}} th,td{{text-align:left;padding:.2rem .9rem .2rem 0;vertical-align:top;
 border-bottom:1px solid var(--rule);overflow-wrap:anywhere}} th{{font-weight:500;color:var(--dim)}}
td{{font-variant-numeric:tabular-nums}} ol{{margin:.3rem 0;padding-left:1.3rem}}
details{{margin:.4rem 0;padding:.35rem .7rem;background:var(--box);border:1px solid var(--rule);border-radius:6px}}
summary{{cursor:pointer;font-size:.9rem}} .prompt{{color:var(--dim);white-space:pre-wrap;overflow-wrap:anywhere}}
.text{{white-space:pre-wrap;overflow-wrap:anywhere;font-family:ui-monospace,monospace;font-size:.85rem}}
fieldset{{border:1px solid var(--rule);border-radius:6px;display:flex;flex-wrap:wrap;gap:1rem}}
.samples:has(#by-score:checked) .good{{background:color-mix(in srgb,var(--good) calc(var(--s)*55%),transparent)}}
.samples:has(#by-score:checked) .bad{{background:color-mix(in srgb,var(--bad) calc(var(--s)*55%),transparent)}}
{_SERIES}{_STRENGTHS}{_VERSIONS}{_LOGPROBS}
""".strip()
