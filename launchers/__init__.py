"""Many runs: plan, preview, run.

`grammar` expands a request into points, `compose` composes them, `exclude` leaves some out, `plan` puts them
together and knows their state, `manifest` keeps sweeps/<name>/, `screen` follows
what runs, `table` lays out what they all print.
A launcher is one file with `launch(jobs, compose) -> exit code`; hydra_plugins/crescendo.py names them.
"""
