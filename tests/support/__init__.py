"""
What tests share: a test file imports from here, and from no other test file.

- `training`: tiny models, digits, short runs and their outcomes. `recording` and `streaming`: trainers that keep what
  they see. `families`: models other than CLIP. `records`: of runs that never took place. `bad_data`: bad rows.
- `browser`: a real one, to look at pages with.
- `stand_in`: the Hub on loopback, of `loopback`, `repositories` and `large_files`. `pushing`, `storing`: scripts that
  take it for the Hub.
- `interrupting`: kills trainings of `victim`, at the moments of `moments`.
"""
