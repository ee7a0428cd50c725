"""The frame that every page of the workbench is shown in: look, navigation, links. Started by `sae app`."""

from pathlib import Path

import streamlit as st

from app.names import ShadowedName, check_names
from app.theme import ICON, css_variables

HERE = Path(__file__).resolve().parent


def main() -> None:
    """Set the look, follow a clicked link, run the chosen page."""
    st.set_page_config(page_title="SAE workbench", page_icon=ICON, layout="wide")
    try:
        check_names()
    except ShadowedName as error:
        st.code(str(error), language=None, wrap_lines=True)  # our own packages may not be imported now
        st.stop()
    from app.parts.links import follow_links

    st.html(f"<style>{css_variables()}\n{(HERE / 'style.css').read_text(encoding='utf-8')}</style>")
    pages = {
        "overview": st.Page(HERE / "views/overview.py", title="Overview", url_path="overview", default=True),
        "training": st.Page(HERE / "views/training.py", title="Training", url_path="training"),
        "sweep": st.Page(HERE / "views/sweep.py", title="Sweep", url_path="sweep"),
        "features": st.Page(HERE / "views/features.py", title="Features", url_path="features"),
        "feature": st.Page(HERE / "views/feature.py", title="Feature", url_path="feature"),
        "steer": st.Page(HERE / "views/steer.py", title="Steer", url_path="steer"),
    }
    st.logo(ICON, size="large")
    page = st.navigation(list(pages.values()), position="top")
    follow_links(pages)
    page.run()


main()
