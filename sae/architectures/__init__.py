"""One final class a file. `sae.registry` is the table of them."""
