"""Many runs: their records, aligned, compared and reported."""
