"""How Gradio's own parts look: quiet, one accent, the colours of the viewer. Fonts are the system's; nothing is fetched."""

from __future__ import annotations

from pathlib import Path

from gradio import themes

CSS = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")

_LIGHT = {"ground": "#fbfbf9", "panel": "#ffffff", "ink": "#1d2430", "soft": "#5d6675", "line": "#e3e5ea", "wash": "#f5f6f8"}
_DARK = {"ground": "#12151b", "panel": "#1a1f28", "ink": "#e8ebf1", "soft": "#a3adbd", "line": "#2c333f", "wash": "#222834"}
_WHERE = {
    "body_background_fill": "ground",
    "background_fill_primary": "panel",
    "background_fill_secondary": "ground",
    "block_background_fill": "panel",
    "block_border_color": "line",
    "border_color_primary": "line",
    "body_text_color": "ink",
    "body_text_color_subdued": "soft",
    "block_label_text_color": "soft",
    "block_title_text_color": "soft",
    "block_label_background_fill": "panel",
    "block_label_border_color": "panel",
    "block_info_text_color": "soft",
    "accordion_text_color": "soft",
    "input_background_fill": "panel",
    "input_border_color": "line",
    "input_placeholder_color": "soft",
    "button_secondary_background_fill": "panel",
    "button_secondary_background_fill_hover": "wash",
    "button_secondary_border_color": "line",
    "button_secondary_text_color": "ink",
}


def theme() -> themes.Base:
    sans = ["Inter", "system-ui", "Segoe UI", "sans-serif"]
    made = themes.Base(
        primary_hue=themes.colors.blue,
        neutral_hue=themes.colors.gray,
        radius_size=themes.sizes.radius_sm,
        spacing_size=themes.sizes.spacing_sm,
        text_size=themes.sizes.text_sm,
        font=sans,
        font_mono=["ui-monospace", "Menlo", "Consolas", "monospace"],
    )
    colours = {name: _LIGHT[ink] for name, ink in _WHERE.items()}
    colours |= {f"{name}_dark": _DARK[ink] for name, ink in _WHERE.items()}
    accents = {"color_accent": "#2f5fd0", "button_primary_background_fill": "#2f5fd0", "button_primary_text_color": "#ffffff"}
    accents |= {"button_primary_background_fill_hover": "#264fb0", "button_primary_background_fill_dark": "#86a7ff"}
    accents |= {"button_primary_background_fill_hover_dark": "#a3bcff", "button_primary_text_color_dark": "#12151b"}
    accents |= {"input_border_color_focus": "#2f5fd0", "input_border_color_focus_dark": "#86a7ff", "slider_color": "#2f5fd0"}
    return made.set(
        **colours,
        **accents,
        block_shadow="none",
        block_shadow_dark="none",
        input_shadow="none",
        input_shadow_focus="none",
        button_primary_shadow="none",
        block_title_text_weight="500",
        block_title_text_size="12.5px",
        block_label_text_size="12.5px",
        button_large_text_size="14px",
        button_large_text_weight="600",
        input_border_width="1px",
        layout_gap="10px",
    )
