"""Many runs: plan, preview, run here or on a cluster, watch, resume.

Before: `grammar` expands a request into points, `compose` composes them, `exclude` leaves some out, `plan`
puts them together, `manifest` keeps sweeps/<name>/.
A launcher is one file with `launch(jobs, compose) -> exit code`: `preview`, `local`, `slurm`;
hydra_plugins/crescendo.py names them. For `slurm`, `shapes` groups runs into arrays, `snapshot` copies the
code, `scheduler` asks SLURM, `job` is what runs in it.
After: `state` and `standing` say how far runs are, `status`, `logs` and `control` are python -m launchers.
`screen` shows a local sweep at work, `table` is how everything looks.
"""
