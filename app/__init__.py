"""The workbench in the browser (Streamlit) and the `sae` command line."""
