"""Colours of the figures: placeholders that the canvas replaces by CSS variables of the page."""

INK, MUTED, LINE, FAINT, ACCENT, PAPER = "#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04", "#0a0b05", "#0a0b06"
COOL, WARM = "#0a0b07", "#0a0b08"
VARIABLES = {
    INK: "currentColor",
    MUTED: "var(--muted)",
    LINE: "var(--line)",
    FAINT: "var(--faint)",
    ACCENT: "var(--accent)",
    PAPER: "var(--paper)",
    COOL: "var(--cool)",
    WARM: "var(--warm)",
}
"""Placeholder → its CSS value."""
