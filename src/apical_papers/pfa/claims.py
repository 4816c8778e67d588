"""The paper's claims about the plausibility of rules (arXiv 2405.20594 version 1, table 1), in the terms of the audit."""

from apical.bench.papers import Claims

CLAIMS = Claims(
    "arXiv 2405.20594 version 1, table 1",
    {
        "BP": ("bp",),
        "FA": ("fa",),
        "DFA": ("dfa",),
        "SF": ("usf", "brsf", "frsf"),
        "KP": ("kp",),
        "WM": ("wm",),
        "PFA": ("pfa",),
    },
    {
        "no_sign_transport": ("no", "yes", "yes", "no", "yes", "yes", "yes"),
        "no_magnitude_transport": ("no", "yes", "yes", "yes", "yes", "yes", "yes"),
        "one_phase": ("yes", "yes", "yes", "unclear", "yes", "no", "yes"),
        "no_symmetry": ("no", "partly", "partly", "partly", "no", "no", "yes"),
        "close_to_backprop": ("yes", "no", "no", "no", "yes", "yes", "yes"),
    },
)
"""Its row "BP-level accuracy" is answered by results, not by an audit. "No separate phase for feedback learning" is tested
here as one response per step. PAL, its eighth column, is not implemented."""
