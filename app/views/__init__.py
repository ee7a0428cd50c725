"""The pages, one script each, run by `app.main`.

Not named `pages`: Streamlit runs the scripts of a folder of that name beside the main script by themselves, without
the frame, until the first call of `st.navigation`; so a shared link that is the first to reach a new server would come
up bare.
"""
