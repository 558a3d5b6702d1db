"""The measuring bench: what a study is, how a cell of its grid is trained and measured, how the table is made."""
